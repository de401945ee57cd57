r"""Encode a data set once with a VAE, for flows that model its codes instead of pixels.

OUT gets parquet files with, of each image and its mirror image, the mean and log-variance of the VAE's posterior in
float16 and scaled for the flow, the labels, and a card of the data set for people and for the Hub. Training reads it
by --data.path OUT --codec.vae VAE. An interrupted command goes on where it stopped when it is run again.

    accelerate launch vae/encode_dataset.py /data/imagenet imagenet256-codes \
        --vae stabilityai/sd-vae-ft-ema --size 256 --split train validation

One process a GPU encodes its share of the files; plain `python` encodes all of them with one.
"""

from itarflow.commands.encode_dataset import main

if __name__ == "__main__":
    main(__doc__)
