"""The likelihood of held-out images, by noise level."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from itarflow.data.dataset import ImageDataset
from itarflow.data.loader import in_order
from itarflow.flow import noise as noises
from itarflow.flow.tarflow import TARFlow
from itarflow.runtime.seeds import mixed_seed
from itarflow.training import captions
from itarflow.training.objective import clean_images
from itarflow.training.recipe import Recipe

EVALUATION_BATCH = 50
"""Held-out images at a time; fixed, since the noise is drawn by batch."""


class Evaluation(NamedTuple):
    """A held-out evaluation."""

    nll: dict[str, float]
    """Noise level -> nats a dim of the noisy images; empty in likelihood training or without held-out images."""
    bpd: float | None
    """Bits a dim of the 8-bit images, in likelihood training."""
    broken: tuple[str, ...] = ()
    """Names of images that could not be read, and were replaced by their neighbours."""


@torch.no_grad()
def evaluate_held_out(flow: TARFlow, dataset: ImageDataset, recipe: Recipe, accelerator: Accelerator) -> Evaluation:
    """Held-out negative log-likelihood with fixed noise, the same at each call.

    Returns:
        Means over the images of all processes, and this process's unreadable images.
    """
    if len(dataset) == 0:
        return Evaluation({}, None, ())
    levels = evaluation_levels(recipe)
    dequantised = recipe.noise.distribution == "dequantise"
    sums = torch.zeros(max(1, len(levels)), dtype=torch.float64)
    count = 0
    flow.eval()
    share = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    broken: list[str] = []
    for number, batch in enumerate(in_order(dataset, EVALUATION_BATCH, recipe.data.num_workers, **share)):
        index = number * accelerator.num_processes + accelerator.process_index
        broken += batch.broken
        images = _held_out_images(recipe, batch.images.to(flow.device), index)
        labels = batch.labels if recipe.model.num_classes else None
        context = captions.vectors(recipe, batch, flow.device)
        count += len(images)
        for column, level in enumerate(levels or [0.0]):
            generator = torch.Generator(flow.device).manual_seed(mixed_seed(recipe.train.seed, index, column, 1))
            if dequantised:
                u = torch.rand(images.shape, generator=generator, device=flow.device)
                log_prob = flow.log_prob(noises.dequantise(images, u), labels, context=context)
            else:
                eps = torch.randn(images.shape, generator=generator, device=flow.device)
                log_prob = flow.log_prob(images + level * eps, labels, level, context=context)
            sums[column] -= log_prob.cpu().double().sum()
    everywhere = gather_object([(sums.tolist(), count)])  # as objects: not every device has float64
    total = sum(images for _, images in everywhere)
    dims = math.prod(flow.image_shape)
    means = [sum(column) / total / dims for column in zip(*(values for values, _ in everywhere), strict=True)]
    if dequantised:
        return Evaluation({}, noises.bits_per_dim(means[0]), tuple(broken))
    return Evaluation({f"{level:g}": mean for level, mean in zip(levels, means, strict=True)}, None, tuple(broken))


def _held_out_images(recipe: Recipe, stored: Tensor, batch: int) -> Tensor:
    """The flow's inputs of batch number `batch`: codes are drawn from their posteriors with fixed noise."""
    posterior = None
    if recipe.codec.vae is not None and recipe.codec.sample_posterior:
        generator = torch.Generator(stored.device).manual_seed(mixed_seed(recipe.train.seed, batch, 0, 2))
        shape = (len(stored), *stored.shape[-3:])
        posterior = torch.randn(shape, generator=generator, device=stored.device)
    return clean_images(recipe, stored, torch.zeros(len(stored), dtype=torch.bool, device=stored.device), posterior)


def evaluation_levels(recipe: Recipe) -> list[float]:
    """Four noise levels from t_min to t_max; the only one, if there is one; none in likelihood training."""
    if recipe.noise_range is None:
        return []
    low, high = recipe.noise_range
    return [low] if low == high else [low, *np.linspace(low, high, 4)[1:-1].round(6).tolist(), high]


def describe(held_out: Evaluation) -> str:
    """A line such as "nll -1.52 at t=0.02, ..."."""
    if held_out.bpd is not None:
        return f"{held_out.bpd:.3f} bits/dim"
    if not held_out.nll:
        return "not measured: no held-out images"
    return "nll " + ", ".join(f"{value:.3f} at t={level}" for level, value in held_out.nll.items()) + " (nats/dim)"
