r"""TARFlow on 64-pixel ImageNet, one noise level (arXiv 2412.06329, table 7: 2-1024-8-8-N(0, 0.05^2)).

In one process, or on eight GPUs; a folder has train/ and val/:

    itarflow train tarflow_imagenet64_cond --data.path /data/imagenet
    accelerate launch --config_file recipes/launch/gpus8.yaml recipes/tarflow_imagenet64_cond.py \
        --data.path /data/imagenet

Table 7 has FID 2.66. The published command trains a narrower model, less long:

    itarflow train tarflow_imagenet64_cond --name tarflow_imagenet64_cond_published --model.channels 768 \
        --train.batch-size 256 --train.epochs 200

One of the four levels of figure 4, 0.01, 0.05, 0.2 and 0.5, on patches of 4:

    itarflow train tarflow_imagenet64_cond --name tarflow_figure4_0.2 --model.patch-size 4 --train.batch-size 512 \
        --train.epochs 100 --noise.t-min 0.2 --noise.t-max 0.2 --sampling.guidance.weight 2
"""

from itarflow.commands.train import main
from itarflow.presets import TARFLOW
from itarflow.training import DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

row = TARFLOW["imagenet64_cond"]

recipe = Recipe(
    name="tarflow_imagenet64_cond",
    model=row.model(),
    data=DataConfig(path="ILSVRC/imagenet-1k", held_out_split="validation"),
    noise=NoiseConfig(t_min=row.noise_std, t_max=row.noise_std, distribution="constant", weight="one"),
    train=TrainConfig(epochs=row.epochs, batch_size=row.batch_size, mixed_precision="bf16"),
    sampling=SamplingConfig(
        guidance=Guidance(weight=2.3, rule="log_scale", schedule="linear"),
        num_denoise_steps=1,
        batch_size=16,
        denoise_batch_size=4,
    ),
)

if __name__ == "__main__":
    main(recipe, __doc__)
