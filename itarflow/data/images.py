"""One image: any usual file becomes a square uint8 array, by the conventions that published numbers rest on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from itarflow.data.resize import resize_window
from itarflow.runtime.errors import DataError

Crop = Literal["center", "adm", "edm", "pad"]
"""How an image becomes square: by a published protocol, or, as pad, whole and on white."""

LARGEST = 32768
"""Pixels of the largest side that images may be asked to have."""

_SCALED = ("PPM", "JPEG2000")  # formats that Pillow brings to all of 16 bits, whatever depth they say
_12_BITS, _16_BITS = 4095, 65535


def convert_image(image: Image.Image, in_channels: int) -> Image.Image:
    """Upright 8-bit RGB (in_channels 3) or L (1) version of an image of any usual mode.

    EXIF orientation is applied, unless the EXIF block is damaged, and transparency laid on white. Grey and colour of
    more than 8 bits are scaled to 0..255 from the range that their file states, else from 0..65535. Most files state
    how pixels are stored, but not that a scanner used 12 bits of 16: whether such an image is dark can't be told.

    Raises:
        DataError: in_channels is neither 1 nor 3, the range of the pixels is unknown (floats, 32-bit), or an image of
            16 bits, of a file that states no other range, uses at most 12 of them and is not all black.
        OSError: the image is damaged; Pillow may raise nearly anything else.
    """
    mode = pillow_mode(in_channels)
    file_format = image.format
    tiles = [str(tile) for tile in getattr(image, "tile", ())]  # known until the pixels are read
    deep, packed = any(";16" in tile for tile in tiles), any(";12" in tile for tile in tiles)
    image.load()
    image = _upright(image)
    if image.mode.startswith("I"):
        top, stated = _12_BITS if packed else _16_BITS, packed or file_format in _SCALED
        image = Image.fromarray(_to_eight_bit(np.asarray(image), top, stated))
    elif deep and image.mode in ("LA", "RGB", "RGBA") and 0 < _brightest(image) < 16:
        raise DataError(
            f"colour of 16 bits reaches only to {_brightest(image)} of 255: the pixels seem to have 12 bits or fewer; "
            "multiply them, so that they use all 16"
        )
    elif image.mode == "F":
        raise DataError("image mode F (floats) has no known range; expected 8 or 16-bit pixels: convert it")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def crop_image(image: Image.Image, size: int, protocol: Crop = "center") -> Image.Image:
    """Square `size` x `size` version of an RGB or L image, as `DataConfig.crop` says.

    An image that has this size already is returned as it is. Of a thin image only the middle is enlarged, so that no
    more memory is needed than for any other.

    Raises:
        DataError: the protocol is unknown.
    """
    check_crop(protocol)
    resampling = Image.Resampling
    if image.size == (size, size):
        return image
    if protocol == "edm":
        return _center(image, min(image.size)).resize((size, size), resampling.LANCZOS)
    if protocol == "pad":
        scale = size / max(image.size)
        whole = image.resize(_pair(max(round(side * scale), 1) for side in image.size), resampling.BILINEAR)
        square = Image.new(image.mode, (size, size), "white")
        square.paste(whole, ((size - whole.width) // 2, (size - whole.height) // 2))
        return square
    if protocol == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), resampling.BOX)
        scale = size / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        return resize_window(image, (width, height), left, top, size, resampling.BICUBIC)
    # Truncated here and rounded to the nearest even below, exactly as torchvision does.
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = (round((side - size) / 2) for side in (width, height))
    return resize_window(image, (width, height), left, top, size, resampling.BILINEAR)


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
        DataError: a size < 1 or > `LARGEST`, channels that are neither 1 nor 3, or an unknown crop.
    """
    pillow_mode(in_channels)
    check_crop(protocol)
    if not 1 <= image_size <= LARGEST:
        raise DataError(f"image_size is {image_size}; expected 1 to {LARGEST} pixels")


def square_side(shape: tuple[int, int, int]) -> int:
    """The side in pixels of square images (C, H, W).

    Raises:
        DataError: they are not square, as those of data sets always are.
    """
    _, height, width = shape
    if height != width:
        raise DataError(
            f"the images are {height} x {width} pixels, but those of a data set are made square when they are read; "
            "a flow of images that are not square can make pictures, and not be trained or measured here"
        )
    return height


def spread_over(total: int, count: int) -> list[int]:
    """`count` indices of 0 .. total - 1, evenly spaced from the first on: such as of images from all over a set."""
    return [index * total // count for index in range(count)]


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF block says that it is to be seen; as it is if that block is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises nearly anything, and the pixels are sound: they have been loaded
        return image


def _to_eight_bit(array: np.ndarray, top: int, stated: bool) -> np.ndarray:
    """Pixels scaled to 0..255 from 0..top, which the file has `stated`, or not."""
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > top:
        raise DataError(f"integer pixels reach from {low} to {high}; expected 0..{top}: convert the image")
    if 0 < high <= _12_BITS and not stated:
        bits = 8 if high <= 255 else 12
        raise DataError(
            f"its values reach {high:,} of {top:,}: {bits} bits in a file of more, or nearly black; "
            "convert it to 8 bits"
        )
    return np.round(array / (top / 255)).astype(np.uint8)


def _brightest(image: Image.Image) -> int:
    """The highest value of a channel that is not alpha."""
    colours = image.split()[: 1 if image.mode == "LA" else 3]
    return max(int(np.asarray(channel).max()) for channel in colours)


def _center(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _pair(sides: Iterable[int]) -> tuple[int, int]:
    width, height = sides
    return width, height
