"""Likelihoods of images: nats/dim of images with noise, and bits/dim of the 8-bit images without.

A flow is a density of noisy values, an 8-bit image is one of 256^D. What joins the two is the noise that is added to
the image. If an image x becomes y by q(y | x), let K(y) be the sum of q(y | x') over all 8-bit images x'. Then

    P(x) = E_q(y | x) [p(y) / K(y)]

is a probability of x: it is that of drawing y from the flow, and then one of the x' in proportion to q(y | x'). For
the uniform noise of one grey level K is constant, and P(x) the mass of the flow in the image's cell, which gives the
usual bits/dim. For Gaussian noise it is another model of images, which asks the flow about what it was trained on. In
both cases the mean over draws of -log2(p / K) / D is an upper bound on -log2 P(x) / D, and so, in expectation, is
-log2 of the mean of p / K over k draws (Burda et al. 2016), which falls to it as k grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from itarflow.codec import Posterior
from itarflow.flow.density import LOG_2PI
from itarflow.flow.noise import LEVELS_PER_UNIT, dequantise
from itarflow.flow.tarflow import TARFlow
from itarflow.runtime.devices import tf32_products
from itarflow.runtime.seeds import mixed_seed

Kind = Literal["uniform", "gaussian"]
"""Of the noise that is added to images."""
_AT_A_TIME = 2**14
"""Values that are compared with all 256 grey levels at a time, unless an image has more."""


@dataclass(frozen=True)
class Noise:
    """The noise that is added to images before their likelihood is computed."""

    kind: Kind
    level: float | None
    """The noise level at which the flow is evaluated; of Gaussian noise also its standard deviation. None = the
    flow has none, which goes with uniform noise only."""

    @property
    def title(self) -> str:
        """Such as "gaussian t=0.02"."""
        return self.kind if self.level is None else f"{self.kind} t={self.level:g}"

    @property
    def entropy(self) -> float:
        """Of the noise, in nats/dim: however good a flow is, its nats/dim of noisy images are no lower on average."""
        return (
            -math.log(LEVELS_PER_UNIT)
            if self.kind == "uniform"
            else 0.5 * (LOG_2PI + 1) + math.log(self.level or math.nan)
        )


class Likelihoods(NamedTuple):
    """Of B images with each of P noises; float64, on the CPU."""

    nll: Tensor
    """(B, P), -log p(y) / D in nats: the mean over the draws."""
    bits: Tensor | None
    """(B, P), -log2 of the mean over the draws of p(y) / K(y), / D: bits/dim. None if not asked for."""
    bits_one_draw: Tensor | None
    """(B, P), the same with each draw by itself, and then the mean: what a single draw gives, in expectation."""


class Mean(NamedTuple):
    """A mean over images."""

    mean: float | None
    """None if one of the values is not finite."""
    standard_error: float | None
    """Standard deviation of the values over the square root of their number; None if there are fewer than two."""
    not_finite: int
    """How many of the values are no finite numbers."""


def noises_of(
    flow: TARFlow,
    *,
    kind: Kind | None = None,
    levels: Sequence[float] | None = None,
    count: int = 4,
    noise_range: tuple[float, float] | None = None,
    codes: bool = False,
) -> tuple[Noise, ...]:
    """The noises that suit a flow.

    Args:
        flow: gives the density.
        kind: None = both, as far as they apply: uniform noise for pixels, and Gaussian noise at levels that are given
            or known from training. Uniform noise goes with the smallest level, if the flow is conditioned on it.
        levels: None = evenly spaced over the flow's noise_range, or its only one.
        count: how many, if they are evenly spaced.
        noise_range: stands in for the flow's own, if that has not recorded one.
        codes: whether the flow models a VAE's codes. Uniform noise is of grey levels, which codes have not.

    Raises:
        ValueError: levels outside the flow's noise_range, not > 0, or twice; uniform noise for codes; Gaussian noise
            of unknown level.
    """
    if codes and kind == "uniform":
        raise ValueError(
            "uniform noise is that of the grey levels of pixels, but this flow models a VAE's codes, which have none; "
            "expected gaussian noise. The pixels' bits/dim can't be had from codes."
        )
    chosen = _levels(flow.config.noise_range or noise_range, count) if levels is None else tuple(levels)
    if not chosen and (kind == "gaussian" or codes or flow.config.noise_conditioned):
        raise ValueError("the noise levels that this flow was trained on are not recorded; name those to measure at.")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"noise levels {list(chosen)} name one twice; expected each once.")
    for level in chosen:
        if not (level > 0 and math.isfinite(level)):
            raise ValueError(f"noise level {level} is no standard deviation; expected a finite number > 0.")
        flow.check_noise_range(level)
    gaussian = tuple(Noise("gaussian", level) for level in chosen)
    uniform = Noise("uniform", min(chosen) if flow.config.noise_conditioned else None)
    if kind is None:
        return gaussian if codes else (uniform, *gaussian)
    return gaussian if kind == "gaussian" else (uniform,)


def _levels(noise_range: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if count < 1:
        raise ValueError(f"the number of noise levels is {count}; expected a number >= 1.")
    if noise_range is None:
        return ()
    low, high = noise_range
    return (low,) if low == high or count == 1 else tuple(np.linspace(low, high, count).round(6).tolist())


@torch.no_grad()
@tf32_products(False)
def likelihoods(
    flow: TARFlow,
    images: Posterior,
    labels: Tensor | None,
    noises: Sequence[Noise],
    *,
    draws: int = 1,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    bits: bool = True,
    context: Tensor | None = None,
) -> Likelihoods:
    """Likelihoods of images with noise; every draw of an image is the same for all levels.

        P(x) = integral of p(x + u) over u in [0, bin]^D, uniform noise     (TARFlow, section 2.4)

    by Monte Carlo over `draws`; for Gaussian noise see the head of this module.

    Args:
        flow: in float32.
        images: (B, C, H, W) of the 256 levels k / 127.5 - 1 without variance, or codes, drawn anew with the noise.
        labels: (B,), or None = all unlabelled.
        noises: see `noises_of`.
        draws: k, times that noise is drawn for each image.
        seed: of the noise, with the number of the image and that of the draw, and nothing else.
        numbers: of the images; None = 0, 1, ...
        bits: False for a VAE's codes, which have no grey levels, or where only nats are wanted.
        context: (B, T, E) of captions, for a flow that takes prompts.

    Raises:
        ValueError: draws < 1, a flow in lower precision, or as `TARFlow.log_prob`.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}; expected a number >= 1.")
    if torch.finfo(flow.dtype).bits < 32:
        raise ValueError(f"the flow is in {flow.dtype}, too coarse for likelihoods; expected float32: flow.float().")
    numbers = range(len(images.mean)) if numbers is None else numbers
    dims, shape = images.mean[0].numel(), (draws, len(images.mean), len(noises))
    log_prob, log_weight = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    for draw in range(draws):
        seeds = [(seed, number, draw) for number in numbers]
        clean = images.mean
        if images.log_variance is not None:
            clean = images.sample(_drawn(torch.randn, seeds, 2, clean))
        eps = _drawn(torch.randn, seeds, 1, clean)
        for column, noise in enumerate(noises):
            if noise.kind == "uniform":
                noisy = dequantise(clean, _drawn(torch.rand, seeds, 0, clean))
            else:
                noisy = clean + (noise.level or 0.0) * eps
            log_prob[draw, :, column] = flow.log_prob(noisy, labels, noise.level, context).cpu().double()
            if bits:
                log_weight[draw, :, column] = log_prob[draw, :, column] - log_cover(noisy, noise).cpu().double()
    nll = -log_prob.mean(dim=0) / dims
    if not bits:
        return Likelihoods(nll, None, None)
    bits_a_nat = -1 / (dims * math.log(2))
    together = log_weight.logsumexp(dim=0) - math.log(draws)
    return Likelihoods(nll, together * bits_a_nat, log_weight.mean(dim=0) * bits_a_nat)


def log_cover(noisy: Tensor, noise: Noise) -> Tensor:
    """log K(y) (B,) of y (B, C, H, W): the density that the noise of all 8-bit images together has at y, in nats."""
    if noise.kind == "uniform":
        return noisy.new_full((len(noisy),), noisy[0].numel() * math.log(LEVELS_PER_UNIT))
    level = noise.level or math.nan
    grey = torch.arange(256, device=noisy.device) / 127.5 - 1
    found = []
    for part in noisy.flatten(1).split(max(1, _AT_A_TIME // noisy[0].numel())):
        exponents = -0.5 * ((part[..., None] - grey) / level).square()
        found.append((exponents.logsumexp(dim=-1) - math.log(level) - 0.5 * LOG_2PI).sum(dim=1))
    return torch.cat(found)


def mean_of(values: Tensor) -> Mean:
    """The mean of (N,) values and its standard error, N >= 1."""
    broken = int((~values.isfinite()).sum())
    if broken:
        return Mean(None, None, broken)
    error = float(values.std(correction=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(float(values.mean()), error, 0)


def _drawn(sample: Callable[..., Tensor], seeds: Sequence[tuple[int, ...]], purpose: int, like: Tensor) -> Tensor:
    """Noise (B, ...) of the shape of `like`, an image a seed; drawn on the CPU, so that devices agree."""
    rows = [
        sample(like.shape[1:], generator=torch.Generator().manual_seed(mixed_seed(*of_image, purpose)))
        for of_image in seeds
    ]
    return torch.stack(rows).to(like.device)
