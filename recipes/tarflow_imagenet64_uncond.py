r"""TARFlow without labels on 64-pixel ImageNet, one noise level (arXiv 2412.06329, table 7: 2-768-8-8-N(0, 0.05^2)).

In one process, or on eight GPUs; a folder has train/ and val/:

    itarflow train tarflow_imagenet64_uncond --data.path /data/imagenet
    accelerate launch --config_file recipes/launch/gpus8.yaml recipes/tarflow_imagenet64_uncond.py \
        --data.path /data/imagenet
"""

from itarflow.commands.train import main
from itarflow.presets import TARFLOW
from itarflow.training import DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

row = TARFLOW["imagenet64_uncond"]

# The paper's row uses the downsampled ImageNet64 of van den Oord et al. (2016): give a folder of it to compare.
recipe = Recipe(
    name="tarflow_imagenet64_uncond",
    model=row.model(),
    data=DataConfig(path="ILSVRC/imagenet-1k", held_out_split="validation"),
    noise=NoiseConfig(t_min=row.noise_std, t_max=row.noise_std, distribution="constant", weight="one"),
    train=TrainConfig(epochs=row.epochs, batch_size=row.batch_size, mixed_precision="bf16"),
    # Guidance without labels: by attention temperature (appendix B). These two values are ours, not the paper's.
    sampling=SamplingConfig(
        guidance=Guidance(weight=1.0, rule="log_scale", schedule="linear", temperature=1.5),
        num_denoise_steps=1,
        batch_size=16,
        denoise_batch_size=4,
    ),
)

if __name__ == "__main__":
    main(recipe, __doc__)
