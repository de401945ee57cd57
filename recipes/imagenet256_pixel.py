r"""iTARFlow-XL on ImageNet at 256 pixels (arXiv 2604.20041): FID 3.32 in the paper.

In one process, or one model over eight GPUs; a folder has train/ and val/:

    itarflow train imagenet256_pixel --data.path /data/imagenet
    accelerate launch --config_file recipes/launch/fsdp2.yaml recipes/imagenet256_pixel.py \
        --data.path /data/imagenet

The first block alone is guided, as the paper says (section 3.2). The weight 4.2 and its FID are of the published
evaluation, which guides all blocks and takes 70 steps: --sampling.guidance.blocks None
--sampling.num-denoise-steps 70.
"""

from itarflow.commands.train import main
from itarflow.presets import T_MAX, T_MIN, itarflow_model
from itarflow.training import DataConfig, Guidance, NoiseConfig, Recipe, SamplingConfig, TrainConfig

recipe = Recipe(
    name="imagenet256_pixel",
    model=itarflow_model("XL", 256),
    data=DataConfig(path="ILSVRC/imagenet-1k", held_out_split="validation"),
    noise=NoiseConfig(t_min=T_MIN, t_max=T_MAX[256]),
    # No label is dropped, as in the published command: without one, the mean of the class embeddings stands for it.
    train=TrainConfig(epochs=600, batch_size=512, label_drop=0.0, mixed_precision="bf16", gradient_checkpointing=True),
    sampling=SamplingConfig(guidance=Guidance(weight=4.2, blocks=1), batch_size=16, denoise_batch_size=4),
)

if __name__ == "__main__":
    main(recipe, __doc__)
