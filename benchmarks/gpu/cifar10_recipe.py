"""A small iTARFlow of CIFAR-10, for minutes of one GPU; its weights in bfloat16 are 22 MB."""

from itarflow.commands.train import main
from itarflow.training import DataConfig, Guidance, ModelConfig, NoiseConfig, Recipe, SamplingConfig, TrainConfig

recipe = Recipe(
    name="cifar10_small",
    model=ModelConfig(image_size=32, num_classes=10, patch_size=2, channels=256, num_layers=(2, 2, 2, 8)),
    data=DataConfig(path="uoft-cs/cifar10", held_out_split="test", in_memory=True),
    noise=NoiseConfig(t_min=0.01, t_max=0.3),
    train=TrainConfig(
        epochs=30, batch_size=256, learning_rate=7e-4, min_learning_rate=1e-6, warmup_epochs=1, max_grad_norm=1.0,
        ema_decay=0.999, mixed_precision="bf16", save_every=500,
    ),
    sampling=SamplingConfig(guidance=Guidance(weight=1.0, blocks=1), num_images=100),
)  # fmt: skip

if __name__ == "__main__":
    main(recipe, __doc__)
