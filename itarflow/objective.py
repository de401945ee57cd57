"""What training minimises: the random numbers of a step, the weighted loss, and the held-out likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from itarflow import noise as noises
from itarflow.batches import in_order
from itarflow.codec import to_pixels
from itarflow.data import ImageDataset
from itarflow.embedding import NULL_LABEL
from itarflow.flow import TARFlow, nll_per_dim
from itarflow.recipe import Recipe

EVALUATION_BATCH = 50
"""Held-out images at a time; fixed, since the noise is drawn by batch."""


class Draws(NamedTuple):
    """All that is random in an optimiser step, for its global batch."""

    noise_level: Tensor
    """(B,)"""
    noise: Tensor
    """(B, C, H, W), standard normal; uniform in [0, 1) for dequantisation."""
    flip: Tensor
    """(B,) bool, images to mirror."""
    drop: Tensor
    """(B,) bool, images that lose their label."""


def draw(recipe: Recipe, step: int, device: torch.device) -> Draws:
    """The random numbers of optimiser step `step` = 0, 1, ...: they depend on the recipe's seed and the step alone."""
    size, model = recipe.train.batch_size, recipe.model
    generator = torch.Generator(device).manual_seed(mixed_seed(recipe.train.seed, step))
    noise_level = noises.draw_noise_level(recipe.noise, size, generator)
    flip = torch.rand(size, generator=generator, device=device) < (0.5 if recipe.data.horizontal_flip else 0.0)
    drop = torch.rand(size, generator=generator, device=device) < recipe.train.label_drop
    shape = (size, model.in_channels, model.image_size, model.image_size)
    sample = torch.rand if recipe.noise.distribution == "dequantise" else torch.randn
    return Draws(noise_level, sample(shape, generator=generator, device=device), flip, drop)


def mixed_seed(*numbers: int) -> int:
    """A seed that differs for every tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Losses(NamedTuple):
    """Of one micro-batch."""

    loss: Tensor
    """(), weighted mean: what is minimised."""
    nll: Tensor
    """(), unweighted mean of `nll_per_dim`, nats a dim."""
    mean_square: Tensor
    """(N, D), mean of z^2 over the micro-batch."""


def training_losses(flow: torch.nn.Module, recipe: Recipe, images: Tensor, labels: Tensor, draws: Draws) -> Losses:
    """Loss of clean images (b, C, H, W) in [-1, 1] with labels (b,), and their part of the step's draws."""
    images = torch.where(draws.flip[:, None, None, None], images.flip(3), images)
    if recipe.noise.distribution == "dequantise":
        noisy = noises.dequantise(images, draws.noise)
    else:
        noisy = images + draws.noise_level[:, None, None, None] * draws.noise
    labels = torch.where(draws.drop, NULL_LABEL, labels)
    output = flow(noisy, labels if recipe.model.num_classes else None, draws.noise_level)
    nll = nll_per_dim(output)
    weight = noises.loss_weight(recipe.noise, draws.noise_level)
    return Losses((weight * nll).mean(), nll.detach().mean(), output.z.detach().square().mean(dim=0))


@torch.no_grad()
def evaluate(flow: TARFlow, dataset: ImageDataset, recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """Held-out negative log-likelihood with fixed noise, the same at each call.

    Returns:
        {"nll": {noise level: nats a dim of the noisy images}, "bpd": bits a dim of the 8-bit images}; the first is
        empty and the second a number only in likelihood training. Both are empty without held-out images.
    """
    if len(dataset) == 0:
        return {"nll": {}, "bpd": None}
    levels = evaluation_levels(recipe)
    dequantised = recipe.noise.distribution == "dequantise"
    sums = torch.zeros(max(1, len(levels)), dtype=torch.float64)
    count = 0
    flow.eval()
    for index, batch in enumerate(in_order(dataset, EVALUATION_BATCH)):
        if index % accelerator.num_processes != accelerator.process_index:
            continue
        images = to_pixels(batch.images.to(flow.device))
        labels = batch.labels if recipe.model.num_classes else None
        count += len(images)
        for column, level in enumerate(levels or [0.0]):
            generator = torch.Generator(flow.device).manual_seed(mixed_seed(recipe.train.seed, index, column, 1))
            if dequantised:
                u = torch.rand(images.shape, generator=generator, device=flow.device)
                log_prob = flow.log_prob(noises.dequantise(images, u), labels)
            else:
                eps = torch.randn(images.shape, generator=generator, device=flow.device)
                log_prob = flow.log_prob(images + level * eps, labels, level)
            sums[column] -= log_prob.double().sum().cpu()
    totals = accelerator.reduce(torch.cat([sums, torch.tensor([float(count)], dtype=torch.float64)]).to(flow.device))
    dims = math.prod(flow.image_shape)
    means = (totals[:-1] / totals[-1] / dims).tolist()
    if dequantised:
        # From a density over [-1, 1], of which a grey level owns 1/128, to a probability of the level, in bits.
        return {"nll": {}, "bpd": (means[0] + math.log(128)) / math.log(2)}
    return {"nll": {f"{level:g}": mean for level, mean in zip(levels, means, strict=True)}, "bpd": None}


def evaluation_levels(recipe: Recipe) -> list[float]:
    """Four noise levels from t_min to t_max; the only one, if there is one; none in likelihood training."""
    if recipe.noise_range is None:
        return []
    low, high = recipe.noise_range
    return [low] if low == high else [low, *np.linspace(low, high, 4)[1:-1].round(6).tolist(), high]


def describe(held_out: Mapping[str, Any]) -> str:
    """A line such as "nll -1.52 at t=0.02, ..."."""
    if held_out["bpd"] is not None:
        return f"{held_out['bpd']:.3f} bits/dim"
    if not held_out["nll"]:
        return "not measured: no held-out images"
    return "nll " + ", ".join(f"{value:.3f} at t={level}" for level, value in held_out["nll"].items()) + " (nats/dim)"
