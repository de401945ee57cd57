r"""iTARFlow-L on ImageNet at 128 pixels (arXiv 2604.20041): FID 2.44 in the paper.

In one process, or on eight GPUs; a folder has train/ and val/:

    itarflow train imagenet128_pixel --data.path /data/imagenet
    accelerate launch --config_file recipes/launch/gpus8.yaml recipes/imagenet128_pixel.py \
        --data.path /data/imagenet

The first block alone is guided, as the paper says (section 3.2). The weight 3.7 and its FID are of the published
evaluation, which guides all blocks and takes 50 steps: --sampling.guidance.blocks None
--sampling.num-denoise-steps 50.
"""

from itarflow.commands.train import main
from itarflow.presets import T_MAX, T_MIN, itarflow_model
from itarflow.training import DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

recipe = Recipe(
    name="imagenet128_pixel",
    model=itarflow_model("L", 128),
    data=DataConfig(path="ILSVRC/imagenet-1k", held_out_split="validation"),
    noise=NoiseConfig(t_min=T_MIN, t_max=T_MAX[128]),
    train=TrainConfig(epochs=450, batch_size=512, mixed_precision="bf16", gradient_checkpointing=True),
    sampling=SamplingConfig(guidance=Guidance(weight=3.7, blocks=1), batch_size=16, denoise_batch_size=4),
)

if __name__ == "__main__":
    main(recipe, __doc__)
