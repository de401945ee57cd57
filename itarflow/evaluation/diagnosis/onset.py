"""Where along the tokens of images blur begins: a change of level in curves of detail, token by token.

A curve is the `fine_energy` of an image's cells in raster order, less the mean of real images at the same place, in
units of their standard deviation there. The two-level fit by least squares splits it in two. A flow that blurs what
it generates late drops at a token in its own order: in raster order, or in reverse, since blocks alternate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FALSE_ALARMS = 0.05
"""Share of real images, or of groups of them, in which a beginning is found though there is none."""
STEP = 2.0
"""Least factor between the fine energy, relative to real images, of other tokens and blurred ones."""
RESAMPLES = 200
"""Of the images, for the interval."""


@dataclass(frozen=True)
class Normal:
    """The detail of real images, place by place."""

    mean: Tensor
    """(N,) log2 of squared grey levels."""
    std: Tensor
    """(N,)"""
    limit: float
    """Strength of the two-level fit that 95 % of real images stay below: their objects have levels too."""
    count: int
    """m: how many real images these are taken from."""


@dataclass(frozen=True)
class Onset:
    """Blur that begins at a token."""

    token: int
    """Where blurred tokens and others meet, numbered in raster order: the first blurred token of order raster, the
    last one of order reverse."""
    low: int
    high: int
    """The interval in which `token` lies with 95 % confidence, by resampling the images."""
    order: Literal["raster", "reverse"]
    """raster = blurred from there to the end; reverse = from there back to the first token."""
    blurred: float
    """Energy of fine structure in the blurred tokens, relative to real images: < 1, and < others / 2."""
    others: float
    """The same of the other tokens."""


def normal_detail(energy: Tensor) -> Normal:
    """What is normal, of the fine energy (n, N) of real images.

    Raises:
        ValueError: fewer than two images.
    """
    if len(energy) < 2:
        raise ValueError(f"{len(energy)} image has no spread; expected two real images or more.")
    mean, std = energy.mean(dim=0), energy.std(dim=0).clamp(min=1e-3)
    _, strength = level_change((energy - mean) / std)
    return Normal(mean, std, float(strength.abs().quantile(1 - FALSE_ALARMS)), len(energy))


def level_change(curves: Tensor) -> tuple[Tensor, Tensor]:
    """The two-level fits by least squares to curves (n, N).

    Returns:
        (first, strength), each (n,): the first token of the second level, 1 .. N - 1, and the square root of what the
        fit takes off the sum of squares, positive where the curve falls. For N = 1 both are 0.
    """
    strengths = _strengths(curves)
    if strengths.shape[1] == 0:
        return torch.zeros(len(curves), dtype=torch.int64), torch.zeros(len(curves))
    best = strengths.abs().argmax(dim=1)
    return best + 1, strengths.gather(1, best[:, None]).flatten()


def find_onset(energy: Tensor, normal: Normal, generator: torch.Generator) -> Onset | None:
    """Where blur begins in images that have it in common, or None if no place stands out.

    The rule: the mean of the images' curves is split by the two-level fit. The strength of that fit must exceed
    `normal.limit` * sqrt(1 / n + 1 / m), which the mean of n real images does in about 5 of 100 cases: what it
    differs by from that of the m other ones is chance in both. The lower level must be below that of real images,
    since next to too much detail the rest is not blurred, and have half the energy of the other one or less, since
    with many images the least difference shows.

    Args:
        energy: fine energy (n, N) of the images, n >= 1.
        normal: of real images.
        generator: resamples the images for the interval, which is widened by what chance does to `normal.mean`.
    """
    relative = energy - normal.mean
    curves, ratios = relative / normal.std, relative.mean(dim=0)
    splits, strengths = level_change(curves.mean(dim=0, keepdim=True))
    split, falls = int(splits), bool(strengths > 0)
    before, after = (2.0 ** float(part.mean()) for part in (ratios[:split], ratios[split:]))
    blurred, others = (after, before) if falls else (before, after)
    limit = normal.limit * math.sqrt(1 / len(curves) + 1 / normal.count)
    if abs(float(strengths)) <= limit or blurred >= 1 or others < STEP * blurred:
        return None
    low, high = _interval(curves, normal.count, falls, generator)
    if falls:
        return Onset(split, low, high, "raster", blurred, others)
    return Onset(split - 1, low - 1, high - 1, "reverse", blurred, others)


def _interval(curves: Tensor, count: int, falls: bool, generator: torch.Generator) -> tuple[int, int]:
    """Between which splits the same change lies for 95 of 100 resamplings of the curves (n, N).

    The `count` real images that they are compared with vary as they do: that adds n / count to the variance.
    """
    draws = torch.randint(len(curves), (RESAMPLES, len(curves)), generator=generator)
    weights = torch.zeros(RESAMPLES, len(curves)).scatter_add_(1, draws, torch.ones(draws.shape)) / len(curves)
    mean = curves.mean(dim=0)
    means = mean + (weights @ curves - mean) * math.sqrt(1 + len(curves) / count)
    splits = (_strengths(means) * (1 if falls else -1)).argmax(dim=1) + 1
    low, high = splits.float().quantile(torch.tensor([0.025, 0.975]), interpolation="nearest").int().tolist()
    return low, high


def _strengths(curves: Tensor) -> Tensor:
    """(n, N) -> (n, N - 1): strength of the fit with the second level from token 1, 2, .. on."""
    total = curves.shape[1]
    before = torch.arange(1, total)
    sums = curves.cumsum(dim=1)
    left, right = sums[:, :-1], sums[:, -1:] - sums[:, :-1]
    return (before * (total - before) / total).sqrt() * (left / before - right / (total - before))
