r"""STARFlow's text-to-image model of 256 pixels (arXiv 2506.06276): 3.86B parameters, captions by flan-T5-XL.

Encode images and captions once, then train; steps touch neither the VAE nor the text encoder. `--captions` names the
column with the captions; its text encoder needs `pip install -e ".[text]"`:

    python vae/encode_dataset.py /data/captioned codes/captioned \
        --vae stabilityai/sd-vae-ft-ema --size 256 --no-flips --captions caption --text-encoder google/flan-t5-xl
    itarflow train starflow_text

On eight GPUs each, sharded, with the same options: accelerate launch --config_file recipes/launch/fsdp2.yaml FILE.
The published weights, ready to sample from, are in docs/pretrained.md; the paper's data is not public.

The same on a CPU in minutes, on the digits of scikit-learn with captions such as "a photo of a seven": the recipe
digits_text.
"""

from itarflow.commands.train import main
from itarflow.presets import SD_VAE, STARFLOW_NOISE, starflow_text_model
from itarflow.training import CodecConfig, DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

# Batch, learning rates, noise and guidance are those of the published configuration and commands, the length is ours.
# Left out of the published loss: 1e-4 times the mean square of what goes into each block.
recipe = Recipe(
    name="starflow_text",
    model=starflow_text_model(),
    data=DataConfig(path="codes/captioned", horizontal_flip=False),
    codec=CodecConfig(vae=SD_VAE),
    noise=NoiseConfig(t_min=STARFLOW_NOISE, t_max=STARFLOW_NOISE, distribution="constant", weight="one"),
    train=TrainConfig(
        epochs=10, batch_size=1024, learning_rate=6.4e-5, mixed_precision="bf16", gradient_checkpointing=True
    ),
    sampling=SamplingConfig(
        guidance=Guidance(weight=3.6, rule="gaussian", schedule="constant", blocks=1),
        num_denoise_steps=1,
        batch_size=16,
        denoise_batch_size=4,
    ),
)

if __name__ == "__main__":
    main(recipe, __doc__)
