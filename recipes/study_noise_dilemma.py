"""The noise dilemma, measured: TARFlows of one noise level beside an iTARFlow of a range, on CIFAR-10.

A TARFlow adds noise of one level in training and removes it by one step: with little noise its images lack global
structure, with much they are blurred. An iTARFlow knows a range of levels and removes noise in several steps, its own
or a TARFlow's. Four flows are trained alike (TARFlow at 0.05, 0.1 and 0.3, iTARFlow on [0.01, 0.3]); each generates
from the same noise and labels, and its images are cleaned by one step of its own and by 1, 2, 5, 10 and 20 of the
iTARFlow's. The same command goes on after an interruption:

    python recipes/study_noise_dilemma.py --scale cpu          # about an hour on two cores
    python recipes/study_noise_dilemma.py --scale gpu          # a larger model, for one GPU
"""

from itarflow.commands.noise_dilemma import Study
from itarflow.commands.study import main
from itarflow.training import DataConfig, Guidance, ModelConfig, NoiseConfig, Recipe, SamplingConfig, TrainConfig

data = DataConfig(path="uoft-cs/cifar10", held_out_split="test")
cpu = Recipe(
    name="itarflow",
    model=ModelConfig(image_size=32, num_classes=10, patch_size=4, channels=192, num_layers=(1, 1, 1, 4)),
    data=data,
    noise=NoiseConfig(t_min=0.01, t_max=0.3),
    train=TrainConfig(
        epochs=1.5,
        batch_size=64,
        learning_rate=1e-3,
        min_learning_rate=1e-5,
        warmup_epochs=0.1,
        ema_decay=0.99,
        mixed_precision="bf16",
        evaluate_every_epochs=1,
        sample_every_epochs=1,
        save_every=200,
    ),
    sampling=SamplingConfig(guidance=Guidance(weight=1.0, blocks=1), num_images=40),
)
# Weights of four such models, in bfloat16, are 64 MB.
gpu = Recipe(
    name="itarflow",
    model=ModelConfig(image_size=32, num_classes=10, patch_size=2, channels=256, num_layers=(1, 1, 1, 6)),
    data=data,
    noise=NoiseConfig(t_min=0.01, t_max=0.3),
    train=TrainConfig(
        epochs=30,
        batch_size=256,
        learning_rate=7e-4,
        min_learning_rate=1e-6,
        warmup_epochs=1,
        ema_decay=0.999,
        mixed_precision="bf16",
        evaluate_every_epochs=10,
        sample_every_epochs=10,
        save_every=500,
    ),
    sampling=SamplingConfig(guidance=Guidance(weight=1.0, blocks=1), num_images=100),
)
levels = (0.05, 0.1, 0.3)
scales = {
    # Distances by a small network that needs no download; they are no FID.
    "cpu": Study(
        recipe=cpu,
        single_levels=levels,
        num_samples=1000,
        reference_split="train[:5000]",
        extractor="efficientnet-lite0",
    ),
    "gpu": Study(recipe=gpu, single_levels=levels, num_samples=10_000, likelihood_images=2000, batch_size=500),
}

if __name__ == "__main__":
    main(scales, __doc__)
