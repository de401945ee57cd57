r"""ITARFlow with STARFlow's blocks, on SD-VAE codes of ImageNet at 256 pixels. Neither paper has this model.

All noise levels up to 0.5 are learned, as in imagenet256_latent (iTARFlow, arXiv 2604.20041), by the blocks of
starflow_imagenet256 (STARFlow, arXiv 2506.06276): ten steps denoise what STARFlow leaves to a decoder. Of the codes
that both train on:

    itarflow train itarflow_starflow256
    accelerate launch --config_file recipes/launch/gpus8.yaml recipes/itarflow_starflow256.py    # on eight GPUs

The size of iTARFlow-B, to compare with its FID of 2.32 with TARFlow's blocks:

    itarflow train itarflow_starflow256 --name itarflow_b_starflow256 --model.channels 1280 \
        --model.num-layers 4 4 4 24
"""

from itarflow.commands.train import main
from itarflow.presets import SD_VAE, T_MAX_CODES, T_MIN, itarflow_starflow_model
from itarflow.training import CodecConfig, DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

# Batch, length and guidance weight are those of imagenet256_latent.
recipe = Recipe(
    name="itarflow_starflow256",
    model=itarflow_starflow_model(),
    data=DataConfig(path="codes/imagenet256", held_out_split="validation", crop="adm"),
    codec=CodecConfig(vae=SD_VAE),
    noise=NoiseConfig(t_min=T_MIN, t_max=T_MAX_CODES),
    train=TrainConfig(epochs=600, batch_size=512, mixed_precision="bf16", gradient_checkpointing=True),
    sampling=SamplingConfig(guidance=Guidance(weight=2.0, blocks=1), batch_size=16, denoise_batch_size=8),
)

if __name__ == "__main__":
    main(recipe, __doc__)
