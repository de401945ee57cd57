r"""iTARFlow-B on ImageNet at 64 pixels (arXiv 2604.20041): FID 1.68 in the paper.

In one process, or on eight GPUs; a folder has train/ and val/:

    itarflow train imagenet64_pixel --data.path /data/imagenet
    accelerate launch --config_file recipes/launch/gpus8.yaml recipes/imagenet64_pixel.py \
        --data.path /data/imagenet

The first block alone is guided, as the paper says (section 3.2). The weight 2.1 and its FID are of the published
evaluation, which guides all blocks and takes 30 steps: --sampling.guidance.blocks None
--sampling.num-denoise-steps 30. The paper's smaller models, iTARFlow-S and TARFlow-S at the level 0.3:

    itarflow train imagenet64_pixel --name itarflow_s_imagenet64 --model.num-layers 2 2 2 12
    itarflow train imagenet64_pixel --name tarflow_s_imagenet64 --model.num-layers 2 2 2 12 \
        --model.no-noise-conditioned --noise.distribution constant --noise.weight one --noise.t-min 0.3 \
        --sampling.num-denoise-steps 1
"""

from itarflow.commands.train import main
from itarflow.presets import T_MAX, T_MIN, itarflow_model
from itarflow.training import DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

recipe = Recipe(
    name="imagenet64_pixel",
    model=itarflow_model("B", 64),
    data=DataConfig(path="ILSVRC/imagenet-1k", held_out_split="validation"),
    noise=NoiseConfig(t_min=T_MIN, t_max=T_MAX[64]),
    train=TrainConfig(epochs=300, batch_size=512, mixed_precision="bf16", gradient_checkpointing=True),
    sampling=SamplingConfig(guidance=Guidance(weight=2.1, blocks=1), batch_size=16, denoise_batch_size=4),
)

if __name__ == "__main__":
    main(recipe, __doc__)
