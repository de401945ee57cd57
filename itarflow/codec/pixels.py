"""8-bit pixels and the numbers in [-1, 1] that stand for them."""

from __future__ import annotations

import torch
from PIL import Image
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

    It is the only rounding in the project, so that saved images, metrics and training agree; `to_pixels` undoes it.
    """
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1], C = 1 or 3 -> greyscale or RGB images of PIL."""
    arrays = to_uint8(images.nan_to_num()).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
