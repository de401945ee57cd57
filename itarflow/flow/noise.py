"""How the noise level is drawn in training, how the loss is weighted, and uniform dequantisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from itarflow.runtime.ranges import check_number
from itarflow.runtime.tables import Table, choices

LEVELS_PER_UNIT = 128
"""Grey levels that share a unit of the axis once images are dequantised; 256 share [-1, 1)."""


def uniform_level(u: Tensor, t_min: float, t_max: float) -> Tensor:
    """t = t_min + u (t_max - t_min), uniform in [t_min, t_max], from u uniform in [0, 1) (iTARFlow, section 3.1)."""
    return u * (t_max - t_min) + t_min


def quadratic_level(u: Tensor, t_min: float, t_max: float) -> Tensor:
    """t = sqrt(t_min^2 + u (t_max^2 - t_min^2)), so that t^2 is uniform, from u uniform in [0, 1).

    An option of the official iTARFlow code.
    """
    return (u * (t_max**2 - t_min**2) + t_min**2).sqrt()


def lognormal_level(n: Tensor) -> Tensor:
    """t = exp(n - 1.2) from n standard normal, after EDM (Karras et al. 2022), where it is exp(1.2 n - 1.2).

    An option of the official iTARFlow code.
    """
    return (n - 1.2).exp()


def _drawn(law: Callable[..., Tensor], batch_size: int, generator: torch.Generator) -> Tensor:
    # A type is named, since the numbers of a seed depend on it.
    return law(batch_size, generator=generator, device=generator.device, dtype=torch.float32)


DistributionFunction = Callable[["NoiseConfig", int, torch.Generator], Tensor]
"""(config, batch_size, generator) -> noise levels (B,) in float32 on the generator's device."""
WeightFunction = Callable[["NoiseConfig", Tensor], Tensor]
"""(config, noise_level (B,)) -> loss weights (B,)."""
DISTRIBUTIONS: Table[DistributionFunction] = Table(
    "Noise distribution",
    "uniform",
    {
        "uniform": lambda config, n, g: uniform_level(_drawn(torch.rand, n, g), config.t_min, config.t_max),
        "quadratic": lambda config, n, g: quadratic_level(_drawn(torch.rand, n, g), config.t_min, config.t_max),
        "lognormal": lambda _, n, g: lognormal_level(_drawn(torch.randn, n, g)),
        "constant": lambda config, n, g: torch.full((n,), float(config.t_max), device=g.device),
        "dequantise": lambda _, n, g: torch.zeros(n, device=g.device),
    },
)
WEIGHTS: Table[WeightFunction] = Table(
    "Noise weight",
    "t",
    {
        "one": lambda _, t: torch.ones_like(t),
        "t": lambda _, t: t,
        "t2": lambda _, t: t**2,
        "t_normalised": lambda config, t: t / (config.t_min + config.t_max),
        "t2_normalised": lambda config, t: t**2 / (config.t_min**2 + config.t_max**2),
    },
)
Distribution = Annotated[str, choices(DISTRIBUTIONS)]
Weight = Annotated[str, choices(WEIGHTS)]


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise that training adds, how much, and how it is weighted.

    y = x + t eps,  eps ~ N(0, I),  one t for all               (TARFlow, section 2.4)
    x_t = x + t eps,  t drawn anew for each image               (iTARFlow, section 3.1)
    """

    t_min: float = 0.01
    """Smallest noise level, a standard deviation in the units of the images."""
    t_max: float = 0.3
    """Largest noise level, where sampling starts. Equal to t_min for a single-sigma TARFlow."""
    distribution: Distribution = "uniform"
    """How t is drawn. uniform: t uniform in [t_min, t_max]. quadratic: t^2 uniform. lognormal:
    exp(N(-1.2, 1)), after EDM, which is not limited to [t_min, t_max]. constant: t = t_max, the single sigma of
    TARFlow. dequantise: no Gaussian noise, but uniform noise of one grey level, for likelihoods of 8-bit images."""
    weight: Weight = "t"
    """gamma_t, the loss weight of a sample. one: 1. t: t, the paper's choice. t2: t^2. t_normalised:
    t / (t_min + t_max). t2_normalised: t^2 / (t_min^2 + t_max^2)."""

    def __post_init__(self) -> None:
        DISTRIBUTIONS.check(self.distribution)
        WEIGHTS.check(self.weight)
        check_number("Noise level t_min", self.t_min)
        check_number("Noise level t_max", self.t_max)
        if self.t_min > self.t_max:
            raise ValueError(f"Noise levels t_min={self.t_min}, t_max={self.t_max}; expected t_min <= t_max.")
        if self.distribution in ("uniform", "quadratic") and self.t_min == self.t_max:
            raise ValueError(
                f"Noise distribution {self.distribution!r} needs t_min < t_max, but both are {self.t_max}. "
                "Use distribution='constant' for a single noise level."
            )


def draw_noise_level(config: NoiseConfig, batch_size: int, generator: torch.Generator) -> Tensor:
    """Noise levels (B,) in float32 on the generator's device, by `config.distribution` (iTARFlow, section 3.1).

    For "dequantise" they are zeros: there is no Gaussian noise to name.

    Raises:
        ValueError: the distribution, of a plug-in, gives another number of levels.
    """
    level = DISTRIBUTIONS[config.distribution](config, batch_size, generator)
    return _one_each(level, "levels", config.distribution, batch_size).to(generator.device, torch.float32)


def loss_weight(config: NoiseConfig, noise_level: Tensor) -> Tensor:
    """gamma_t (B,), the weights of the samples' losses, by `config.weight` (iTARFlow, section 3.1).

        gamma_t = 1,  t,  t^2,  t / (t_min + t_max)  or  t^2 / (t_min^2 + t_max^2)

    Args:
        config: names the weight, and t_min and t_max.
        noise_level: t (B,).
    """
    return _one_each(WEIGHTS[config.weight](config, noise_level), "weights", config.weight, len(noise_level))


def _one_each(values: Tensor, what: str, name: str, batch_size: int) -> Tensor:
    if tuple(values.shape) != (batch_size,):
        raise ValueError(
            f"{name!r} gave {what} of shape {tuple(values.shape)}; expected ({batch_size},), one an image."
        )
    return values


def dequantise(images: Tensor, u: Tensor) -> Tensor:
    """Spread 8-bit images evenly over [-1, 1), for likelihoods that can be compared.

        y = (k + u) / 128 - 1,  k in {0 .. 255},  u ~ U[0, 1)       (TARFlow, section 2.4)

    Args:
        images: (B, C, H, W) in [-1, 1], of the 256 levels k / 127.5 - 1.
        u: the same shape, uniform in [0, 1).

    Returns:
        (k + u) / 128 - 1, so that each level owns an interval of length 1/128.
    """
    return ((images + 1) * 127.5 + u) / LEVELS_PER_UNIT - 1


def bits_per_dim(nats_per_dim: float) -> float:
    """Bits/dim of 8-bit images from nats/dim of the dequantised ones, of whose axis a grey level owns 1/128.

    (nats + log 128) / log 2
    """
    return (nats_per_dim + math.log(LEVELS_PER_UNIT)) / math.log(2)
