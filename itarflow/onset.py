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


@dataclass(frozen=True)
class Onset:
    """Blur that begins at a token."""

    token: int
    """Number of the first blurred token in raster order."""
    low: int
    high: int
    """The interval in which `token` lies with 95 % confidence, by resampling the images."""
    order: Literal["raster", "reverse"]
    """raster = blurred from there to the end; reverse = from there back to the first token."""
    blurred: float
    """Energy of fine structure in the blurred tokens, relative to real images: < 1."""
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
    return Normal(mean, std, float(strength.abs().quantile(1 - FALSE_ALARMS)))


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
    `normal.limit` / sqrt(n), which the mean of n real images does in 5 of 100 cases, and the lower level must be below
    0, that of real images: where there is too much detail elsewhere, the rest is not blurred.

    Args:
        energy: fine energy (n, N) of the images, n >= 1.
        normal: of real images.
        generator: resamples the images for the interval.
    """
    curves = (energy - normal.mean) / normal.std
    mean = curves.mean(dim=0)
    first, strength = (float(value) for value in level_change(mean[None]))
    if abs(strength) <= normal.limit / math.sqrt(len(curves)):
        return None
    falls, split = strength > 0, int(first)
    if float((mean[split:] if falls else mean[:split]).mean()) >= 0:
        return None
    draws = torch.randint(len(curves), (RESAMPLES, len(curves)), generator=generator)
    weights = torch.zeros(RESAMPLES, len(curves)).scatter_add_(1, draws, torch.ones(draws.shape)) / len(curves)
    strengths = _strengths(weights @ curves) * (1 if falls else -1)
    low, high = (int(strengths.argmax(dim=1).float().quantile(q, interpolation="nearest")) + 1 for q in (0.025, 0.975))
    ratios = (energy - normal.mean).mean(dim=0)
    before, after = 2.0 ** float(ratios[:split].mean()), 2.0 ** float(ratios[split:].mean())
    if falls:
        return Onset(split, low, high, "raster", after, before)
    return Onset(split - 1, low - 1, high - 1, "reverse", before, after)


def _strengths(curves: Tensor) -> Tensor:
    """(n, N) -> (n, N - 1): strength of the fit with the second level from token 1, 2, .. on."""
    total = curves.shape[1]
    before = torch.arange(1, total)
    sums = curves.cumsum(dim=1)
    left, right = sums[:, :-1], sums[:, -1:] - sums[:, :-1]
    return (before * (total - before) / total).sqrt() * (left / before - right / (total - before))
