r"""TARFlow for likelihoods of 64-pixel ImageNet, in bits/dim (arXiv 2412.06329, table 7: 2-768-8-8-U(0, 1/128)).

In one process, or on eight GPUs. Matrix products are float32, without TF32 (appendix C):

    itarflow train tarflow_imagenet64_bpd --data.path /data/imagenet64
    accelerate launch --config_file recipes/launch/gpus8.yaml recipes/tarflow_imagenet64_bpd.py \
        --data.path /data/imagenet64

Table 7 has batches of 384 and 60 epochs. The published command has others:

    itarflow train tarflow_imagenet64_bpd --name tarflow_imagenet64_bpd_published --data.path /data/imagenet64 \
        --train.batch-size 256 --train.epochs 100
"""

from itarflow.commands.train import main
from itarflow.presets import TARFLOW
from itarflow.training import DataConfig, NoiseConfig, Recipe, SamplingConfig, TrainConfig

row = TARFLOW["imagenet64_bpd"]

# Bits/dim depend on how the images were made small: published figures use the downsampled ImageNet64 of
# van den Oord et al. (2016), so give a folder of those images. Flips and low precision would also change them.
recipe = Recipe(
    name="tarflow_imagenet64_bpd",
    model=row.model(),
    data=DataConfig(path=None, horizontal_flip=False),
    noise=NoiseConfig(distribution="dequantise", weight="one"),
    train=TrainConfig(epochs=row.epochs, batch_size=row.batch_size),
    sampling=SamplingConfig(method="skip", batch_size=16),
)

if __name__ == "__main__":
    main(recipe, __doc__)
