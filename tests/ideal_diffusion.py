"""A diffusion model that makes no mistakes, because its data are Gaussian."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from itarflow.denoisers import DiffusionDenoiser

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def sigmas(scheduler: DDPMScheduler) -> Tensor:
    """Noise-to-signal ratio of each step (K,), float64."""
    signal = scheduler.alphas_cumprod.double()
    return ((1 - signal) / signal).sqrt()


class IdealModel(nn.Module):
    """Predicts for data of independent values N(mean, std^2), given y = a * x_0 + s * eps at a step k, also between.

    Between two steps it takes log(s / a) to be linear in k.
    """

    def __init__(self, scheduler: DDPMScheduler, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.log_sigmas, self.prediction = sigmas(scheduler).log(), scheduler.config.prediction_type
        self.mean, self.std = mean, std
        self.steps: list[Tensor] = []

    def forward(self, y: Tensor, k: Tensor) -> SimpleNamespace:
        self.steps.append(k)
        below = k.double().floor().long().clamp(0, len(self.log_sigmas) - 2)
        log_sigma = torch.lerp(self.log_sigmas[below], self.log_sigmas[below + 1], k.double() - below)
        ratio = log_sigma.exp().to(y)[:, None, None, None]
        a = (1 + ratio**2).rsqrt()
        s, variance = ratio * a, self.std.to(y) ** 2
        clean = self.mean.to(y) + a * variance / (a**2 * variance + s**2) * (y - a * self.mean.to(y))
        eps = (y - a * clean) / s
        return SimpleNamespace(
            sample={"epsilon": eps, "v_prediction": a * eps - s * clean, "sample": clean}[self.prediction]
        )


def posterior_mean(noisy: Tensor, level: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[x_0 | x_t] of x_t = x_0 + t * eps for such data, in float64."""
    t = level.double()[:, None, None, None]
    return mean + std**2 / (std**2 + t**2) * (noisy.double() - mean)


def mapping_error(schedule: str, prediction: str, levels: Tensor, dtype: torch.dtype) -> float:
    """The largest error of a `DiffusionDenoiser` around the ideal model, in units of the data's standard deviation."""
    scheduler = DDPMScheduler(1000, beta_schedule=schedule, prediction_type=prediction)
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.randn(2, 3, 3, generator=generator).double() * 0.5, torch.tensor(0.5).double())
    images = mean + std * torch.randn(len(levels), 2, 3, 3, generator=generator)
    level = levels.to(dtype)
    noisy = (images + level.double()[:, None, None, None] * torch.randn(images.shape, generator=generator)).to(dtype)
    estimate = DiffusionDenoiser(IdealModel(scheduler, mean, std), scheduler)(noisy, None, level)
    return float((estimate.double() - posterior_mean(noisy, level, mean, std)).abs().max() / std)
