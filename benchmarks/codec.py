"""What encoding costs an image: PSNR of its way to codes and back, directly and by way of a data set of codes.

    python benchmarks/codec.py --vae madebyollin/taesd --data photos/ --codes codes/photos --size 128

The codes must have been made from the same data by vae/encode_dataset.py; it needs no GPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from itarflow.codec import CodecConfig, VaeCodec, load_vae, stored_codes, to_pixels, to_uint8, vae_identity, vae_traits
from itarflow.data import DataConfig, load_data
from itarflow.training.decoder.losses import psnr


@dataclass(frozen=True)
class Options:
    """Which VAE, and which images."""

    vae: str
    """A folder or a Hub name."""
    data: str
    """The images, as --data.path in training."""
    codes: str
    """The folder with their codes."""
    size: int
    """Side of the images in pixels."""
    held_out_split: str | None = None
    """Split of both that is measured; None = images set aside."""
    images: int = 64
    """How many are measured."""


@torch.no_grad()
def run(options: Options) -> Table:
    """Measure, and tell as a table."""
    vae = load_vae(CodecConfig(vae=options.vae))
    codec, channels = VaeCodec(vae, slice_size=8), vae_traits(vae).channels
    config = DataConfig(
        path=options.data, held_out_split=options.held_out_split, held_out_images=options.images, horizontal_flip=False
    )
    pictures = load_data(config, image_size=options.size, in_channels=vae_traits(vae).in_channels).held_out
    images = to_pixels(torch.stack([pictures[index].image for index in range(len(pictures))]))
    direct = codec.encode(images)
    cached_set = load_data(
        replace(config, path=options.codes),
        image_size=direct.mean.shape[-1],
        in_channels=channels,
        vae=vae_identity(vae),
    ).held_out
    if not torch.equal(cached_set.labels, pictures.labels):
        sys.exit("The codes are not of these images: their labels differ.")
    stored = torch.stack([cached_set[index].image for index in range(len(cached_set))])
    cached = stored_codes(stored, torch.zeros(len(stored), dtype=torch.bool), None)
    back, back_cached = codec.decode(direct.mean), codec.decode(cached)
    table = Table(
        title=f"{len(images)} images of {options.size} pixels by {Path(options.vae).name}", show_header=False
    )
    table.add_row("PSNR of images decoded from codes, mean", f"{psnr(back, images).mean():.4f} dB")
    table.add_row("PSNR of images decoded from cached codes, mean", f"{psnr(back_cached, images).mean():.4f} dB")
    table.add_row(
        "largest difference of an image", f"{(psnr(back, images) - psnr(back_cached, images)).abs().max():.4f} dB"
    )
    table.add_row("largest difference of a code", f"{(direct.mean - cached).abs().max():.4f}")
    table.add_row("largest difference of the codes' standard deviation", _spread(direct.log_variance, stored))
    levels = (to_uint8(back).int() - to_uint8(back_cached).int()).abs()
    table.add_row("pixel values that differ, by at most", f"{(levels > 0).float().mean():.2%}, {levels.max()} of 255")
    return table


def _spread(log_variance: torch.Tensor | None, stored: torch.Tensor) -> str:
    if log_variance is None:
        return "none: this VAE gives no variance"
    return f"{((0.5 * log_variance).exp() - (0.5 * stored[:, 0, 1].float()).exp()).abs().max():.2g}"


if __name__ == "__main__":
    Console(width=120).print(run(tyro.cli(Options, description=__doc__)))
