"""iTARFlow on CIFAR-10: 50,000 colour images of 32x32 pixels, 10 classes. One GPU, about a day.

itarflow train cifar10
accelerate launch --config_file recipes/launch/gpus8.yaml recipes/cifar10.py    # on eight GPUs
"""

from itarflow.commands.train import main
from itarflow.training import DataConfig, Guidance, ModelConfig, NoiseConfig, Recipe, SamplingConfig, TrainConfig

# The paper has no CIFAR-10 model: this one follows its shape (shallow blocks, then a deep one) at a fitting size.
recipe = Recipe(
    name="cifar10",
    model=ModelConfig(image_size=32, num_classes=10, patch_size=2, channels=512, num_layers=(2, 2, 2, 12)),
    data=DataConfig(path="uoft-cs/cifar10", held_out_split="test", in_memory=True),
    noise=NoiseConfig(t_min=0.01, t_max=0.3),
    # Learning rate, limit on the gradient and average are ours: the papers have 1e-4 and neither of the other two.
    train=TrainConfig(
        epochs=1000, batch_size=256, learning_rate=2e-4, max_grad_norm=1.0, ema_decay=0.9999, mixed_precision="bf16"
    ),
    sampling=SamplingConfig(guidance=Guidance(weight=1.0, blocks=1), num_images=100),
)

if __name__ == "__main__":
    main(recipe, __doc__)
