"""A window of a resized image, made without the rest of it: what thin images need, which are enlarged a lot."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

_LONGEST = 8  # sides of the window; an image that is resized to more is not resized as a whole
_BITS = 22  # of Pillow's fixed-point weights


def resize_window(
    image: Image.Image, size: tuple[int, int], left: int, top: int, side: int, resampling: Image.Resampling
) -> Image.Image:
    """`image.resize(size, resampling).crop((left, top, left + side, top + side))`, to the pixel, in bounded memory.

    Args:
        image: RGB or L.
        size: (width, height) in pixels of all of it; one of them is `side`.
        left: of the window.
        top: of the window.
        side: of the window.
        resampling: BILINEAR or BICUBIC.
    """
    if max(size) <= _LONGEST * side or side <= min(image.size):  # the rest is no larger than the image, nearly
        return image.resize(size, resampling).crop((left, top, left + side, top + side))
    # Pillow resizes rows, rounds, then columns; so does this.
    if size[0] > size[1]:
        columns = np.asarray(image).swapaxes(0, 1)
        narrow = _rows_of(columns, image.width, size[0], left, side, resampling, 0).swapaxes(0, 1)
        return Image.fromarray(np.ascontiguousarray(narrow)).resize((side, side), resampling)
    first, stop = _needed(image.height, size[1], top, side, resampling)
    rows = image.crop((0, first, image.width, stop)).resize((side, stop - first), resampling)
    return Image.fromarray(_rows_of(np.asarray(rows), image.height, size[1], top, side, resampling, first))


def _spans(
    length: int, resized: int, start: int, count: int, resampling: Image.Resampling
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Of each resized pixel its centre, and the first and last + 1 pixel that it is made of; the filter's scale."""
    scale = length / resized
    spread = max(scale, 1.0)
    support = (2.0 if resampling == Image.Resampling.BICUBIC else 1.0) * spread
    centres = (np.arange(start, start + count) + 0.5) * scale
    first = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centres + support + 0.5).astype(np.int64), length)
    return centres, first, stop, spread


def _needed(length: int, resized: int, start: int, count: int, resampling: Image.Resampling) -> tuple[int, int]:
    _, first, stop, _ = _spans(length, resized, start, count, resampling)
    return int(first[0]), int(stop[-1])


def _rows_of(
    rows: np.ndarray, length: int, resized: int, start: int, count: int, resampling: Image.Resampling, offset: int
) -> np.ndarray:
    """Rows start .. start + count - 1 of `length` rows that are resized, of which `rows` begins at `offset`.

    The arithmetic is Pillow's (Resample.c, 8 bits a channel), step by step, so that no pixel differs.
    """
    centres, first, stop, spread = _spans(length, resized, start, count, resampling)
    taps = math.ceil((2.0 if resampling == Image.Resampling.BICUBIC else 1.0) * spread) * 2 + 1
    places = first[:, None] + np.arange(taps)
    inside = places < stop[:, None]
    distances = np.abs((places - centres[:, None] + 0.5) * (1.0 / spread))
    weights = np.where(inside, _cubic(distances) if resampling == Image.Resampling.BICUBIC else
                       np.maximum(1.0 - distances, 0.0), 0.0)  # fmt: skip
    total = np.zeros(count)
    for tap in range(taps):  # in this order, for the last bit
        total += weights[:, tap]
    weights = weights / total[:, None]
    fixed = (np.copysign(0.5, weights) + weights * (1 << _BITS)).astype(np.int64)
    resized_rows = np.full((count, *rows.shape[1:]), 1 << (_BITS - 1), dtype=np.int64)
    for tap in range(taps):
        values = rows[np.minimum(places[:, tap], stop - 1) - offset].astype(np.int64)
        resized_rows += values * fixed[:, tap].reshape(-1, *(1,) * (rows.ndim - 1))
    return np.clip(resized_rows >> _BITS, 0, 255).astype(np.uint8)


def _cubic(x: np.ndarray) -> np.ndarray:
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
