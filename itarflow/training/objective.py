"""The training objective: the random numbers of a step, and the weighted loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from itarflow.codec import stored_codes, to_pixels
from itarflow.flow import noise as noises
from itarflow.flow.density import LOG_2PI, nll_per_dim
from itarflow.flow.embedding import NULL_LABEL
from itarflow.runtime.seeds import mixed_seed
from itarflow.training.recipe import Recipe


class Draws(NamedTuple):
    """The random numbers of an optimiser step, for its global batch."""

    noise_level: Tensor
    """(B,)"""
    noise: Tensor
    """(B, C, H, W), standard normal; uniform in [0, 1) for dequantisation."""
    flip: Tensor
    """(B,) bool, images to mirror."""
    drop: Tensor
    """(B,) bool, images whose label or caption is dropped."""
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
    shape = (size, *model.image_shape)
    sample = torch.rand if recipe.noise.distribution == "dequantise" else torch.randn
    noise = sample(shape, generator=generator, device=device)
    drawn = recipe.codec.vae is not None and recipe.codec.sample_posterior
    posterior = torch.randn(shape, generator=generator, device=device) if drawn else None
    return Draws(noise_level, noise, flip, drop, posterior)


def clean_images(recipe: Recipe, stored: Tensor, flip: Tensor, posterior: Tensor | None) -> Tensor:
    """The flow's clean inputs, from what the data set stores.

    Args:
        recipe: decides between pixels and codes.
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


def training_losses(
    flow: torch.nn.Module,
    recipe: Recipe,
    stored: Tensor,
    labels: Tensor,
    draws: Draws,
    context: Tensor | None = None,
    null_context: Tensor | None = None,
) -> Losses:
    """Loss of b images as the data set stores them, with labels (b,), and their part of the step's draws.

        E_{x, t, eps} gamma_t [-log p(x + t eps, t)] / (N D)                (iTARFlow, section 3.1)

    up to a constant: the mean over the batch of gamma_t times `nll_per_dim` (TARFlow, eq. 6). TARFlow is the case of
    a single t and gamma_t = 1.

    A flow of captions also takes `context` (b, T, E), their condition vectors, and `null_context` (1, T, E), those of
    the empty caption, which stands for the captions that are dropped.
    """
    images = clean_images(recipe, stored, draws.flip, draws.posterior)
    if recipe.noise.distribution == "dequantise":
        noisy = noises.dequantise(images, draws.noise)
    else:
        noisy = images + draws.noise_level[:, None, None, None] * draws.noise
    labels = torch.where(draws.drop, NULL_LABEL, labels)
    if context is not None and null_context is not None:
        context = torch.where(draws.drop[:, None, None], null_context, context)
    output = flow(noisy, labels if recipe.model.num_classes else None, draws.noise_level, context=context)
    nll = nll_per_dim(output)
    weight = noises.loss_weight(recipe.noise, draws.noise_level)
    mean_square = output.z.detach().square().mean(dim=0) if recipe.model.volume_preserving else None
    return Losses((weight * nll).mean(), nll.detach() + 0.5 * LOG_2PI, mean_square)
