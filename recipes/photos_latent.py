r"""A small latent iTARFlow for your own images at 128 pixels, in minutes on two CPU cores.

Encode a folder of images (one sub-folder a class) by TAESD, a tiny VAE, then train on the codes:

    python vae/encode_dataset.py photos/ codes/photos --vae madebyollin/taesd --size 128 --dtype bf16
    itarflow train photos_latent --data.path codes/photos --model.num-classes 5
"""

from itarflow.commands.train import main
from itarflow.training import (
    CodecConfig,
    DataConfig,
    Guidance,
    ModelConfig,
    NoiseConfig,
    Recipe,
    SamplingConfig,
    TrainConfig,
)

recipe = Recipe(
    name="photos_latent",
    model=ModelConfig(
        image_size=16, in_channels=4, num_classes=5, patch_size=2, channels=192, num_layers=(1, 1, 1, 5)
    ),
    data=DataConfig(path="codes/photos", in_memory=True),
    codec=CodecConfig(vae="madebyollin/taesd"),
    noise=NoiseConfig(t_min=0.05, t_max=0.5),
    # Learning rate, limit on the gradient and average are ours, for a training of minutes.
    train=TrainConfig(
        epochs=20,
        batch_size=32,
        learning_rate=1e-3,
        min_learning_rate=1e-5,
        warmup_epochs=1,
        max_grad_norm=1.0,
        ema_decay=0.99,
        mixed_precision="bf16",
        evaluate_every_epochs=4,
        sample_every_epochs=10,
        save_every=500,
    ),
    # All blocks are guided, where the paper guides the first alone (blocks=1).
    sampling=SamplingConfig(guidance=Guidance(weight=3.0, blocks=None), num_images=40, batch_size=40),
)

if __name__ == "__main__":
    main(recipe, __doc__)
