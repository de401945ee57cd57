"""How images become 8-bit pixels before their features are taken: by rounding, or as the papers' scripts do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from itarflow.codec import to_uint8

Protocol = Literal["rounded", "official"]

_GREY = "values that are not finite become 128, mid-grey"
CONVERSIONS: Mapping[Protocol, str] = {
    "rounded": f"round((clip(x, -1, 1) + 1) * 127.5) to uint8; {_GREY}",
    "official": f"truncate(255 * 0.5 * (clip(x, -1, 1) + 1)) to uint8; {_GREY}",
}
"""What is done to samples, as it is stored with them."""
PROTOCOLS: Mapping[Protocol, str] = {
    "rounded": "pixels are rounded to the nearest level, real images taken as they are; the scripts of TARFlow and "
    "iTARFlow truncate pixels, samples' and real ones', and flip real images at random: see --protocol official",
    "official": "as in the scripts of TARFlow and iTARFlow: pixels are truncated to the level below, also those of "
    "real images on their way through [-1, 1], and each real image is flipped with probability 1/2",
}


def truncated(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, any shape: clamped, then cut off at the level below, as torchmetrics does."""
    return (0.5 * (images.float().clamp(-1, 1) + 1) * 255).byte()


def to_levels(protocol: Protocol) -> Callable[[Tensor], Tensor]:
    """The function by which samples in [-1, 1] become uint8."""
    return truncated if protocol == "official" else to_uint8


def as_scripts_see(images: Tensor, first: int) -> Tensor:
    """Real images as the official scripts see them.

    They come as value / 255, normalised to [-1, 1], and are truncated on the way back, by which a quarter of the 256
    levels loses one. Whether image i is flipped depends on i alone.

    Args:
        images: uint8 (B, C, H, W).
        first: number of the first one in its set.
    """
    levels = truncated((images.float() / 255 - 0.5) / 0.5)
    draws = [
        torch.rand(1, generator=torch.Generator().manual_seed(first + index)) < 0.5 for index in range(len(images))
    ]
    flipped = torch.cat(draws).to(images.device)[:, None, None, None]
    return torch.where(flipped, levels.flip(-1), levels)
