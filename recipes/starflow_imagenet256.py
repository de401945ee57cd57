r"""STARFlow on ImageNet at 256 pixels (arXiv 2506.06276): its blocks, on codes, at one noise level.

Two FIDs belong to it in the papers: 2.40 of noisy samples through a decoder that was fine-tuned on noisy codes, and
2.96 after one denoising step, through the plain VAE, as the recipe stands. Encode the images and train:

    python vae/encode_dataset.py ILSVRC/imagenet-1k codes/imagenet256 \
        --vae stabilityai/sd-vae-ft-ema --size 256 --crop adm --split train validation
    itarflow train starflow_imagenet256

For the other, fine-tune the decoder first, and train with it:

    python vae/finetune_decoder.py ILSVRC/imagenet-1k runs/decoder \
        --vae stabilityai/sd-vae-ft-ema --size 256 --t-max 0.3
    itarflow train starflow_imagenet256 --codec.vae runs/decoder/vae --sampling.method skip

On eight GPUs each, with the same options: accelerate launch --config_file recipes/launch/gpus8.yaml FILE.

The STARFlow-B of iTARFlow's table 7, at the level 0.3 or 0.5; and TARFlow's blocks instead of STARFlow's:

    itarflow train starflow_imagenet256 --name starflow_b_0.3 --model.channels 1280 --model.num-layers 4 4 4 24
    itarflow train starflow_imagenet256 --name starflow_b_0.5 --model.channels 1280 --model.num-layers 4 4 4 24 \
        --noise.t-min 0.5 --noise.t-max 0.5
    itarflow train starflow_imagenet256 --name tarflow_imagenet256_codes --model.rotary-side 0 \
        --model.no-start-token --model.no-final-norm --model.soft-clip 0 --model.no-softplus-scale \
        --model.no-first-block-reversed --model.context-dim 0 --model.context-tokens 0
"""

from itarflow.commands.train import main
from itarflow.presets import SD_VAE, STARFLOW_NOISE, starflow_model
from itarflow.training import CodecConfig, DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

# 400 million images of ImageNet's 1.28 million are 312 epochs. The guidance weight is ours. Left out of the published
# loss: 1e-4 times the mean square of what goes into each block.
recipe = Recipe(
    name="starflow_imagenet256",
    model=starflow_model(),
    data=DataConfig(path="codes/imagenet256", held_out_split="validation", crop="adm"),
    codec=CodecConfig(vae=SD_VAE),
    noise=NoiseConfig(t_min=STARFLOW_NOISE, t_max=STARFLOW_NOISE, distribution="constant", weight="one"),
    train=TrainConfig(epochs=312, batch_size=512, mixed_precision="bf16", gradient_checkpointing=True),
    sampling=SamplingConfig(
        guidance=Guidance(weight=2.0, rule="gaussian", schedule="constant", blocks=1),
        num_denoise_steps=1,
        batch_size=16,
        denoise_batch_size=8,
    ),
)

if __name__ == "__main__":
    main(recipe, __doc__)
