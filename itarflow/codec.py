"""Between 8-bit pixels and the values that a flow models. In pixel space that is a scaling, written once."""

from __future__ import annotations

import torch
from torch import Tensor


def to_pixels(images: Tensor) -> Tensor:
    """uint8 in 0 .. 255 -> float32 in [-1, 1], any shape: x / 127.5 - 1.

    Raises:
        ValueError: the images are not uint8 (converted twice, for instance).
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images have dtype {images.dtype}; expected torch.uint8 values in 0..255")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, any shape: clamped, then rounded to the nearest of the 256 levels.

    It is the only rounding in the project, so that pictures, metrics and training agree; `to_pixels` undoes it.
    """
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
