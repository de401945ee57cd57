"""One image: any usual file becomes a square uint8 array, by the conventions that published numbers rest on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from itarflow.runtime.errors import DataError

Crop = Literal["center", "adm", "edm"]
"""The published protocols by which an image becomes square."""


def convert_image(image: Image.Image, in_channels: int) -> Image.Image:
    """Upright 8-bit RGB (in_channels 3) or L (1) version of an image of any usual mode.

    EXIF orientation is applied, transparency laid on white, 16-bit grey scaled from 0..65535 to 0..255.

    Raises:
        DataError: in_channels is neither 1 nor 3, or the range of the pixels is unknown (floats, 32-bit).
    """
    mode = pillow_mode(in_channels)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(_sixteen_to_eight_bit(np.asarray(image)))
    elif image.mode == "F":
        raise DataError("image mode F (floats) has no known range; expected 8 or 16-bit pixels: convert it")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def crop_image(image: Image.Image, size: int, protocol: Crop = "center") -> Image.Image:
    """Square `size` x `size` version of an RGB or L image, by a published protocol (see `DataConfig.crop`).

    An image that has this size already is returned as it is.

    Raises:
        DataError: the protocol is unknown.
    """
    check_crop(protocol)
    resampling = Image.Resampling
    if image.size == (size, size):
        return image
    if protocol == "edm":
        return _center(image, min(image.size)).resize((size, size), resampling.LANCZOS)
    if protocol == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), resampling.BOX)
        scale = size / min(image.size)
        image = image.resize(_pair(round(side * scale) for side in image.size), resampling.BICUBIC)
        return _center(image, size)
    # Truncated here and rounded to the nearest even below, exactly as torchvision does.
    short = min(image.size)
    image = image.resize(_pair(int(size * side / short) for side in image.size), resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def to_array(image: Image.Image, in_channels: int) -> np.ndarray:
    """uint8 (in_channels, H, W) array of an image of any usual mode; rules, errors: see `convert_image`."""
    array = np.array(convert_image(image, in_channels))
    return array[None] if in_channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def pillow_mode(in_channels: int) -> str:
    """Pillow's name of 8-bit images with so many channels: "L" or "RGB".

    Raises:
        DataError: in_channels is neither 1 nor 3.
    """
    if in_channels not in (1, 3):
        raise DataError(f"in_channels is {in_channels}; expected 1 (grey) or 3 (RGB): use one of these")
    return "L" if in_channels == 1 else "RGB"


def check_crop(protocol: str) -> None:
    """Refuse a crop that is not one of `Crop`.

    Raises:
        DataError: the protocol is unknown.
    """
    if protocol not in get_args(Crop):
        raise DataError(f"crop {protocol!r} is unknown; use one of {', '.join(get_args(Crop))}")


def check_image_size(image_size: int, in_channels: int, protocol: str) -> None:
    """Refuse sizes and channels that images can't have.

    Raises:
        DataError: a size < 1, channels that are neither 1 nor 3, or an unknown crop.
    """
    pillow_mode(in_channels)
    check_crop(protocol)
    if image_size < 1:
        raise DataError(f"image_size is {image_size}; expected a positive number of pixels")


def spread_over(total: int, count: int) -> list[int]:
    """`count` indices of 0 .. total - 1, evenly spaced from the first on: such as of images from all over a set."""
    return [index * total // count for index in range(count)]


def _sixteen_to_eight_bit(array: np.ndarray) -> np.ndarray:
    low, high = array.min(), array.max()
    if low < 0 or high > 65535:
        raise DataError(f"integer pixels reach from {low} to {high}; expected 0..65535: convert the image")
    return np.round(array / 257).astype(np.uint8)


def _center(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _pair(sides: Iterable[int]) -> tuple[int, int]:
    width, height = sides
    return width, height
