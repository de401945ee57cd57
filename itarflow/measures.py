"""Figures of cleaned images. A metric is a function of what has been cleaned; `METRICS` are those in use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from itarflow.codec import to_uint8
from itarflow.flow.tarflow import TARFlow
from itarflow.pipeline.pipeline import ITARFlowPipeline


class Cleaned(NamedTuple):
    """What a metric sees: the images of one generator, cleaned in one way."""

    codes: Tensor | None
    """(B, C, H, W) float32 on the CPU; None = cleaned by their decoder, so that there are no clean codes."""
    labels: Tensor | None
    """(B,) int64 on the CPU, or None."""
    images: Tensor
    """(B, C, H, W) float32 in about [-1, 1], on the CPU; the codes themselves in pixel space."""
    seconds: float
    """An image, from noisy codes to pixels."""


@dataclass(frozen=True)
class Metric:
    """A figure for each generator and way of cleaning."""

    title: str
    meaning: str
    """What is computed, exactly."""
    measure: Callable[[Cleaned], float | None]
    """None = there is no such figure."""


def residual_noise(images: Tensor) -> Tensor:
    """Standard deviation (B,) of the noise in images (B, C, H, W) in [-1, 1], in grey levels of 255.

    By Immerkaer, "Fast noise variance estimation" (1996). The images, rounded to 8 bits, are filtered by the
    difference of two Laplacians, which lets nothing of a smooth image through; sqrt(pi / 2) / 6 times the mean
    magnitude of the rest is the standard deviation of white Gaussian noise. Fine texture counts as noise too, so
    compare with real images. Channels are averaged.

    Raises:
        ValueError: images of less than 3 pixels a side.
    """
    if min(images.shape[-2:]) < 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected at least 3 x 3 pixels.")
    kernel = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    grey = to_uint8(images.nan_to_num()).float().cpu()
    filtered = F.conv2d(grey.flatten(0, 1)[:, None], kernel[None, None])
    return math.sqrt(math.pi / 2) / 6 * filtered.abs().mean(dim=(1, 2, 3)).unflatten(0, images.shape[:2]).mean(dim=1)


METRICS = (
    Metric(
        "residual noise",
        "noise that is left in the images, estimated by Immerkaer's filter (1996), in grey levels of 255; mean over "
        "channels and images. Fine texture counts as noise, and noise of codes, once decoded, looks like texture: "
        "compare with real images, and look at the pictures",
        lambda cleaned: float(residual_noise(cleaned.images).mean()),
    ),
    Metric(
        "seconds an image",
        "from noisy codes to pixels, cleaning and decoding, in the batches of this comparison; the first use of a "
        "model included",
        lambda cleaned: cleaned.seconds,
    ),
)
"""The metrics that need no model; a `nats_per_dim` for each flow that can judge comes on top."""


def nats_per_dim(name: str, pipeline: ITARFlowPipeline, batch_size: int) -> Metric:
    """How improbable a noise-conditioned flow finds cleaned codes, at the smallest noise level it was trained on."""
    noise_range = pipeline.flow.config.noise_range
    level = noise_range[0] if noise_range else pipeline.scheduler.config.t_min
    meaning = (
        f"-log p(x, t = {level:g}) / (C * H * W) under {name}, in nats, of the cleaned codes x as they are, without "
        "adding noise of that level, given their labels; mean over images. Overly smooth images score low too"
    )
    return Metric(
        f"nats/dim, {name}", meaning, lambda cleaned: _nats_per_dim(pipeline.flow, level, batch_size, cleaned)
    )


def _nats_per_dim(flow: TARFlow, level: float, batch_size: int, cleaned: Cleaned) -> float | None:
    if cleaned.codes is None:
        return None
    total = 0.0
    for part in parts(len(cleaned.codes), batch_size):
        labels = None if cleaned.labels is None else cleaned.labels[part].to(flow.device)
        total -= float(flow.log_prob(cleaned.codes[part].to(flow.device), labels, level).sum())
    return total / cleaned.codes.numel()


def parts(count: int, size: int) -> Iterator[slice]:
    """0 .. count - 1 in slices of at most `size`."""
    return (slice(start, start + size) for start in range(0, count, size))
