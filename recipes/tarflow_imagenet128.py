r"""TARFlow on ImageNet at 128 pixels, one noise level (arXiv 2412.06329, table 7: 4-1024-8-8-N(0, 0.15^2)).

In one process, or on eight GPUs; a folder has train/ and val/:

    itarflow train tarflow_imagenet128 --data.path /data/imagenet
    accelerate launch --config_file recipes/launch/gpus8.yaml recipes/tarflow_imagenet128.py \
        --data.path /data/imagenet

The same at the level 0.05, of table 4:

    itarflow train tarflow_imagenet128 --name tarflow_imagenet128_0.05 --noise.t-min 0.05 --noise.t-max 0.05
"""

from itarflow.commands.train import main
from itarflow.presets import TARFLOW
from itarflow.training import DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

row = TARFLOW["imagenet128"]

recipe = Recipe(
    name="tarflow_imagenet128",
    model=row.model(),
    data=DataConfig(path="ILSVRC/imagenet-1k", held_out_split="validation"),
    noise=NoiseConfig(t_min=row.noise_std, t_max=row.noise_std, distribution="constant", weight="one"),
    train=TrainConfig(epochs=row.epochs, batch_size=row.batch_size, mixed_precision="bf16"),
    # The guidance weight is ours, not the paper's.
    sampling=SamplingConfig(
        guidance=Guidance(weight=2.5, rule="log_scale", schedule="linear"),
        num_denoise_steps=1,
        batch_size=16,
        denoise_batch_size=4,
    ),
)

if __name__ == "__main__":
    main(recipe, __doc__)
