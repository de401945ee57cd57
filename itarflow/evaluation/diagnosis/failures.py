"""How a generated image fails: a collapsed background, or blur. Measures of single images, compared with real ones.

Each measure gives a number an image that is low where the image fails. What is too low, real images say: the threshold
is the value below which a given share of them lies, one in a hundred for instance. `MEASURES` are those in use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 8
"""Pixels a side that an image must have, so that there is a background and detail."""
CELLS = 8
"""Cells a side, at most, in which the background is measured."""
FINE = 0.25
"""Cycles per pixel above which structure is fine: less than 4 pixels long."""
WINDOWS = 5
"""Places a side of the windows in which sharpness is measured; each has half of the side."""
STEP = 2.0
"""Least factor between the fine energy, relative to real images, of other tokens and blurred ones."""
ROUNDING = 1 / 12
"""Variance of what rounding to 8 bits adds to a pixel, in squared grey levels."""


@dataclass(frozen=True)
class Measure:
    """A number an image, low where it fails."""

    name: str
    """Of the failure."""
    title: str
    """Of the number."""
    meaning: str
    """What is computed, exactly."""
    measure: Callable[[Tensor], Tensor]
    """uint8 (N, C, H, W) -> float32 (N,)."""


def background_brightness(images: Tensor) -> Tensor:
    """How bright the border is: half of its cells are darker than this. (N,) in grey levels, 0 .. 255.

    Cells are as in `cells`, `default_patch` pixels a side; a cell's brightness is the mean of its brightest channel.

    Args:
        images: uint8 (N, C, H, W), square, at least 8 x 8 pixels.

    Raises:
        ValueError: images of another kind.
    """
    check_images(images)
    inside = cells(images, default_patch(images.shape[-1]))
    return _median_of_border(inside.mean(dim=-1).amax(dim=1))


def background_contrast(images: Tensor) -> Tensor:
    """How much there is to see in the border: half of its cells have less contrast than this. (N,) in grey levels.

    A cell's contrast is the standard deviation of its pixels, root mean square over the channels.

    Args:
        images: as in `background_brightness`.

    Raises:
        ValueError: images of another kind.
    """
    check_images(images)
    inside = cells(images, default_patch(images.shape[-1]))
    return _median_of_border(inside.var(dim=-1, correction=0).mean(dim=1).sqrt())


def fine_detail(images: Tensor) -> Tensor:
    """How sharp an image is where it is least sharp, (N,): the smallest share of fine structure in 25 windows.

    A window has half of the image's side, so that an image of which a half or a quarter is blurred is found too. In
    each one, the share is that of structure finer than 4 pixels in the energy of the gradient: in photographs, all
    scales have about as much of it, in textures as at edges. It does not depend on brightness or contrast. A window
    of one colour, which is not blurred, has the share of what rounding leaves. Noise is fine: it hides blur.

    Args:
        images: as in `background_brightness`.

    Raises:
        ValueError: images of another kind.
    """
    check_images(images)
    size = images.shape[-1]
    side = size // 2
    places = [round(step * (size - side) / (WINDOWS - 1)) for step in range(WINDOWS)]
    # The orthonormal cosine transform sees a window continued by its mirror image: opposite edges need not fit.
    steps = torch.arange(side, dtype=torch.float64)
    basis = (2 / side) ** 0.5 * torch.cos(math.pi / side * steps[:, None] * (steps + 0.5))
    basis[0] *= 0.5**0.5
    frequency = torch.hypot(steps[:, None], steps[None, :]) / (2 * side)  # cycles per pixel
    gradient, fine = frequency.square().float(), frequency > FINE
    grey, least = images.float().mean(dim=1), torch.ones(len(images))
    for top, left in itertools.product(places, places):  # one at a time: all would take 6 times the image
        window = grey[:, top : top + side, left : left + side]
        energy = gradient * ((basis.float() @ window @ basis.float().T).square() + ROUNDING)
        least = torch.minimum(least, (energy * fine).sum(dim=(1, 2)) / energy.sum(dim=(1, 2)))
    return least


MEASURES = (
    Measure(
        "black",
        "background brightness",
        "median over the cells of the border of their brightness (mean of the brightest channel), in grey levels; an "
        "image is split into at most 8 x 8 cells, of which the outermost ring is the border",
        background_brightness,
    ),
    Measure(
        "flat",
        "background contrast",
        "median over the cells of the border of their standard deviation (root mean square over the channels), in "
        "grey levels",
        background_contrast,
    ),
    Measure(
        "blurred",
        "fine detail",
        "least of 25 windows of half the side, of the share above 0.25 cycles per pixel in the energy of the grey "
        "image's gradient, by the cosine transform. It does not depend on contrast; noise counts as detail, and hides "
        "blur",
        fine_detail,
    ),
)
"""What an image is tested for. "black" and "flat" are the collapsed ones."""


def fine_energy(images: Tensor, patch: int) -> Tensor:
    """Energy of fine structure in each cell, (N, H / patch, W / patch), as log2 of squared grey levels.

    The grey image less its binomial mean over 3 x 3 pixels, squared, mean over the cell. What rounding to 8 bits would
    leave is added, so that cells of one colour have a value.

    Args:
        images: uint8 (N, C, H, W), square, at least 8 x 8 pixels.
        patch: side of a cell in pixels, a divisor of H; with the patch size of a flow, the cells are its tokens.

    Raises:
        ValueError: images of another kind, or cells that do not fit.
    """
    check_images(images)
    grey = images.float().mean(dim=1, keepdim=True)
    line = torch.tensor([0.25, 0.5, 0.25])
    smooth = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.outer(line, line)[None, None])
    return (cells((grey - smooth).square(), patch).mean(dim=(1, -1)) + ROUNDING).log2()


def quartiles(curves: Tensor) -> Tensor:
    """(n, N) -> (3, N): lower quartile, median and upper quartile at each place."""
    return torch.from_numpy(np.quantile(curves.numpy(), (0.25, 0.5, 0.75), axis=0)).float()


@dataclass(frozen=True)
class Onset:
    """Blur that begins at a token."""

    token: int
    """In raster order: the first blurred token of order raster, the last one of order reverse."""
    order: Literal["raster", "reverse"]
    """raster = blurred from there to the end; reverse = from there back to the first token, as blocks alternate."""
    blurred: float
    """Energy of fine structure in the blurred tokens, relative to real images: < 1, and < others / 2."""
    others: float
    """The same of the other tokens."""


def find_onset(curve: Tensor) -> Onset | None:
    """Where blur begins that images have in common, or None if no place stands out.

    The two-level fit by least squares splits the curve. Its lower level is blurred if it is below real images and has
    half the energy of the other one or less. That is a rule and no test: curves of few images are split by chance.

    Args:
        curve: (N,) log2 of the fine energy relative to real images, in raster order; such as the images' median.
    """
    total = len(curve)
    if total < 2:
        return None
    before = torch.arange(1, total)
    sums = curve.cumsum(dim=0)
    left, right = sums[:-1] / before, (sums[-1] - sums[:-1]) / (total - before)
    split = int((before * (total - before) * (left - right).square()).argmax())
    ahead, behind = 2.0 ** float(left[split]), 2.0 ** float(right[split])
    blurred, others = min(ahead, behind), max(ahead, behind)
    if blurred >= 1 or others < STEP * blurred:
        return None
    if behind < ahead:
        return Onset(split + 1, "raster", blurred, others)
    return Onset(split, "reverse", blurred, others)


def threshold(values: Tensor, share: float) -> float:
    """The largest value (of one of `values`) that at most this share of `values` (N,) is below.

    Raises:
        ValueError: no values, or a share that is not between 0 and 1.
    """
    if not 0 < share < 1 or len(values) == 0:
        raise ValueError(f"{len(values)} values have no quantile at {share}; expected some, and 0 < quantile < 1.")
    return float(values.sort().values[math.floor(share * len(values))])


# -- pixels -----------------------------------------------------------------------------------------------------


def default_patch(size: int) -> int:
    """Side of the cells, at most `CELLS` a side, that an image of this size is split into: its smallest divisor."""
    return next(side for side in range(2, size + 1) if size % side == 0 and size // side <= CELLS)


def check_patch(size: int, patch: int) -> None:
    """Refuse cells that an image can't be split into.

    Raises:
        ValueError: the patch is no divisor of the size.
    """
    if patch < 1 or size % patch:
        raise ValueError(f"patch size {patch} does not divide the {size} pixels of a side; use a divisor of {size}.")


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of square 8-bit images.

    Raises:
        ValueError: see above.
    """
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[2] != shape[3] or shape[3] < SMALLEST:
        raise ValueError(
            f"images are {images.dtype} of shape {shape}; expected uint8 (N, C, S, S) with S >= {SMALLEST}."
        )


def cells(images: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) -> float32 (N, C, H / patch, W / patch, patch * patch): the pixels of each cell.

    Raises:
        ValueError: the patch is no divisor of the size.
    """
    check_patch(images.shape[-1], patch)
    return images.float().unfold(2, patch, patch).unfold(3, patch, patch).flatten(-2)


def _median_of_border(values: Tensor) -> Tensor:
    """(N, R, R) -> (N,): the median over the outermost ring."""
    inner = torch.zeros(values.shape[1:], dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    return values[:, ~inner].quantile(0.5, dim=1)
