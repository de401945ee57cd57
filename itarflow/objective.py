"""What training minimises: the random numbers of a step, the weighted loss, and the held-out likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from itarflow.codec import stored_codes, to_pixels
from itarflow.data.dataset import ImageDataset
from itarflow.data.loader import in_order
from itarflow.flow import noise as noises
from itarflow.flow.embedding import NULL_LABEL
from itarflow.flow.tarflow import LOG_2PI, TARFlow, nll_per_dim
from itarflow.recipe import Recipe
from itarflow.runtime.seeds import mixed_seed

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
    posterior: Tensor | None
    """(B, C, H, W), standard normal, which draws codes from their posteriors; None in pixel space, or for the mean."""

    def part(self, start: int, stop: int) -> Draws:
        """Those of images start .. stop - 1 of the batch."""
        whole = slice(start, stop)
        posterior = None if self.posterior is None else self.posterior[whole]
        return Draws(self.noise_level[whole], self.noise[whole], self.flip[whole], self.drop[whole], posterior)


def draw(recipe: Recipe, step: int, device: torch.device) -> Draws:
    """The random numbers of optimiser step `step` = 0, 1, ...: they depend on the recipe's seed and the step alone."""
    size, model = recipe.train.batch_size, recipe.model
    generator = torch.Generator(device).manual_seed(mixed_seed(recipe.train.seed, step))
    noise_level = noises.draw_noise_level(recipe.noise, size, generator)
    flip = torch.rand(size, generator=generator, device=device) < (0.5 if recipe.data.horizontal_flip else 0.0)
    drop = torch.rand(size, generator=generator, device=device) < recipe.train.label_drop
    shape = (size, model.in_channels, model.image_size, model.image_size)
    sample = torch.rand if recipe.noise.distribution == "dequantise" else torch.randn
    noise = sample(shape, generator=generator, device=device)
    drawn = recipe.codec.vae is not None and recipe.codec.sample_posterior
    posterior = torch.randn(shape, generator=generator, device=device) if drawn else None
    return Draws(noise_level, noise, flip, drop, posterior)


def clean_images(recipe: Recipe, stored: Tensor, flip: Tensor, posterior: Tensor | None) -> Tensor:
    """What the flow models, from what the data set holds.

    Args:
        recipe: says whether that is pixels or codes.
        stored: uint8 images (b, C, H, W), or codes as `codec.stored_codes` takes them.
        flip: (b,) bool, images to mirror.
        posterior: as in `Draws`.

    Returns:
        (b, C, H, W) in float32: pixels in [-1, 1], or codes.
    """
    if recipe.codec.vae is not None:
        return stored_codes(stored, flip, posterior)
    images = to_pixels(stored)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


class Evaluation(NamedTuple):
    """A held-out evaluation."""

    nll: dict[str, float]
    """Noise level -> nats a dim of the noisy images; empty in likelihood training or without held-out images."""
    bpd: float | None
    """Bits a dim of the 8-bit images, in likelihood training."""
    broken: tuple[str, ...] = ()
    """Names of images that could not be read, and were replaced by their neighbours."""


class Losses(NamedTuple):
    """Of one micro-batch, or of several together."""

    loss: Tensor
    """(), weighted mean: what is minimised."""
    nll: Tensor
    """(b,), negative log-likelihood of each image under a unit Gaussian prior, in nats a dim."""
    mean_square: Tensor | None
    """(N, D), mean of z^2 over the images; None unless the flow is volume preserving, which learns it."""

    @staticmethod
    def together(parts: Sequence[Losses]) -> Losses:
        """Those of micro-batches of one size, as of one batch, without their graphs."""
        squares = [part.mean_square for part in parts if part.mean_square is not None]
        return Losses(
            torch.stack([part.loss.detach() for part in parts]).mean(),
            torch.cat([part.nll for part in parts]),
            torch.stack(squares).mean(dim=0) if squares else None,
        )


def training_losses(flow: torch.nn.Module, recipe: Recipe, stored: Tensor, labels: Tensor, draws: Draws) -> Losses:
    """Loss of b images as the data set holds them, with labels (b,), and their part of the step's draws."""
    images = clean_images(recipe, stored, draws.flip, draws.posterior)
    if recipe.noise.distribution == "dequantise":
        noisy = noises.dequantise(images, draws.noise)
    else:
        noisy = images + draws.noise_level[:, None, None, None] * draws.noise
    labels = torch.where(draws.drop, NULL_LABEL, labels)
    output = flow(noisy, labels if recipe.model.num_classes else None, draws.noise_level)
    nll = nll_per_dim(output)
    weight = noises.loss_weight(recipe.noise, draws.noise_level)
    mean_square = output.z.detach().square().mean(dim=0) if recipe.model.volume_preserving else None
    return Losses((weight * nll).mean(), nll.detach() + 0.5 * LOG_2PI, mean_square)


@torch.no_grad()
def evaluate(flow: TARFlow, dataset: ImageDataset, recipe: Recipe, accelerator: Accelerator) -> Evaluation:
    """Held-out negative log-likelihood with fixed noise, the same at each call.

    Returns:
        Means over the images of all processes, and the unreadable ones that this process met.
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
        count += len(images)
        for column, level in enumerate(levels or [0.0]):
            generator = torch.Generator(flow.device).manual_seed(mixed_seed(recipe.train.seed, index, column, 1))
            if dequantised:
                u = torch.rand(images.shape, generator=generator, device=flow.device)
                log_prob = flow.log_prob(noises.dequantise(images, u), labels)
            else:
                eps = torch.randn(images.shape, generator=generator, device=flow.device)
                log_prob = flow.log_prob(images + level * eps, labels, level)
            sums[column] -= log_prob.cpu().double().sum()
    everywhere = gather_object([(sums.tolist(), count)])  # as objects: not every device has float64
    total = sum(images for _, images in everywhere)
    dims = math.prod(flow.image_shape)
    means = [sum(column) / total / dims for column in zip(*(values for values, _ in everywhere), strict=True)]
    if dequantised:
        return Evaluation({}, noises.bits_per_dim(means[0]), tuple(broken))
    return Evaluation({f"{level:g}": mean for level, mean in zip(levels, means, strict=True)}, None, tuple(broken))


def _held_out_images(recipe: Recipe, stored: Tensor, batch: int) -> Tensor:
    """What the flow models, of batch number `batch`: codes are drawn from their posteriors with fixed noise."""
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
