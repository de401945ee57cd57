r"""TARFlow on animal faces (AFHQ) at 256 pixels, one noise level (arXiv 2412.06329, table 7: 8-768-8-8-N(0, 0.07^2)).

All training images are trained on, as in the paper; --data.held-out-images 500 sets some aside and evaluates on them.
In one process, or on eight GPUs:

    itarflow train tarflow_afhq256 --data.path /data/afhq
    accelerate launch --config_file recipes/launch/gpus8.yaml recipes/tarflow_afhq256.py --data.path /data/afhq
"""

from itarflow.commands.train import main
from itarflow.presets import TARFLOW
from itarflow.training import DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

row = TARFLOW["afhq256"]

recipe = Recipe(
    name="tarflow_afhq256",
    model=row.model(),
    data=DataConfig(path="huggan/AFHQ", held_out_images=0),
    noise=NoiseConfig(t_min=row.noise_std, t_max=row.noise_std, distribution="constant", weight="one"),
    train=TrainConfig(epochs=row.epochs, batch_size=row.batch_size, mixed_precision="bf16"),
    # The guidance weight is ours, not the paper's.
    sampling=SamplingConfig(
        guidance=Guidance(weight=2.0, rule="log_scale", schedule="linear"),
        num_denoise_steps=1,
        batch_size=16,
        denoise_batch_size=4,
    ),
)

if __name__ == "__main__":
    main(recipe, __doc__)
