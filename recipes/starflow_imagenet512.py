r"""STARFlow on ImageNet at 512 pixels (arXiv 2506.06276): FID 3.00 in the paper, of 4096 tokens, 64 x 64 codes.

The figure is of noisy samples through a decoder that was fine-tuned on noisy codes. Encode the images (about 170 GB),
fine-tune the decoder, train:

    python vae/encode_dataset.py ILSVRC/imagenet-1k codes/imagenet512 \
        --vae stabilityai/sd-vae-ft-ema --size 512 --crop adm --split train validation
    python vae/finetune_decoder.py ILSVRC/imagenet-1k runs/decoder512 \
        --vae stabilityai/sd-vae-ft-ema --size 512 --t-max 0.3
    itarflow train starflow_imagenet512 --codec.vae runs/decoder512/vae --sampling.method skip

As it stands the recipe decodes with the plain VAE, after one denoising step. On eight GPUs each, with the same
options: accelerate launch --config_file recipes/launch/gpus8.yaml FILE.
"""

from itarflow.commands.train import main
from itarflow.presets import SD_VAE, STARFLOW_NOISE, starflow_model
from itarflow.training import CodecConfig, DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

# Length, batch and guidance weight are those of starflow_imagenet256.
recipe = Recipe(
    name="starflow_imagenet512",
    model=starflow_model(resolution=512),
    data=DataConfig(path="codes/imagenet512", held_out_split="validation", crop="adm"),
    codec=CodecConfig(vae=SD_VAE),
    noise=NoiseConfig(t_min=STARFLOW_NOISE, t_max=STARFLOW_NOISE, distribution="constant", weight="one"),
    train=TrainConfig(epochs=312, batch_size=512, mixed_precision="bf16", gradient_checkpointing=True),
    sampling=SamplingConfig(
        guidance=Guidance(weight=2.0, rule="gaussian", schedule="constant", blocks=1),
        num_denoise_steps=1,
        num_images=16,
        batch_size=4,
        denoise_batch_size=2,
    ),
)

if __name__ == "__main__":
    main(recipe, __doc__)
