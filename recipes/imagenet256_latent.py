r"""iTARFlow-B on SD-VAE codes of ImageNet at 256 pixels (arXiv 2604.20041): FID 2.32 in the paper.

Encode the images once, both as they are and mirrored (about 42 GB), then train; steps never touch the VAE:

    python vae/encode_dataset.py ILSVRC/imagenet-1k codes/imagenet256 \
        --vae stabilityai/sd-vae-ft-ema --size 256 --crop adm --split train validation
    itarflow train imagenet256_latent

On eight GPUs each, with the same options: accelerate launch --config_file recipes/launch/gpus8.yaml FILE.
"""

from itarflow.commands.train import main
from itarflow.presets import SD_VAE, T_MAX_CODES, T_MIN, latent_itarflow_model
from itarflow.training import CodecConfig, DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

# The guidance weight is ours.
recipe = Recipe(
    name="imagenet256_latent",
    model=latent_itarflow_model("B"),
    data=DataConfig(path="codes/imagenet256", held_out_split="validation", crop="adm"),
    codec=CodecConfig(vae=SD_VAE),
    noise=NoiseConfig(t_min=T_MIN, t_max=T_MAX_CODES),
    train=TrainConfig(epochs=600, batch_size=512, mixed_precision="bf16", gradient_checkpointing=True),
    sampling=SamplingConfig(guidance=Guidance(weight=2.0, blocks=1), batch_size=32, denoise_batch_size=8),
)

if __name__ == "__main__":
    main(recipe, __doc__)
