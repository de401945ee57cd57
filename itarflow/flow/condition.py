"""What a flow is conditioned on: labels, noise level, condition vectors.

Shapes: B batch, T condition vectors of E values, C channels of a block's transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from itarflow.flow.embedding import NULL_LABEL


class Given(NamedTuple):
    """What all blocks of a flow are conditioned on, checked."""

    batch_size: int
    """B."""
    labels: Tensor | None
    """(B,) int64, NULL_LABEL = none; None = all unlabelled, or they have become the context."""
    noise_level: Tensor | None
    """(B,); None = the flow does not know it."""
    context: Tensor | None
    """(B, T, E); None = the flow has none."""


class Condition(NamedTuple):
    """The inputs of a block besides the tokens."""

    embedding: Tensor
    """(B, 1, C), noise level and class."""
    temperature: Tensor | None
    """(B,), the paper's tau, which divides the attention logits (TARFlow, appendix B); None = 1 for all."""
    context: Tensor | None = None
    """(B, T, C), condition vectors before the tokens, as the block's transformer takes them; None = none."""


def checked_condition(
    config: Any,
    device: torch.device,
    batch_size: int,
    labels: Tensor | None,
    noise_level: Tensor | float | None,
    context: Tensor | None,
) -> Given:
    """What a flow of that config is given, on the device; its labels as condition vectors, where it reads them so.

    Raises:
        ValueError: something is missing, of no use to the flow, of another shape, or out of range.
    """
    labels = checked_labels(labels, batch_size, config.num_classes, device)
    context = checked_context(context, labels, batch_size, config, device)
    level = checked_noise_level(noise_level, batch_size, device) if config.noise_conditioned else None
    return Given(batch_size, labels if context is None else None, level, context)


def without_condition(config: Any, given: Given, null_context: Tensor | None, needed: bool) -> Given:
    """What the other pass of guidance is given: no labels, or the null context (B or 1, T, E).

    Raises:
        ValueError: null_context is of no use to the flow, or of another shape; it is missing though it is `needed`, as
            the flow reads a context other than labels.
    """
    if given.context is None and null_context is None:
        return given._replace(labels=None)
    if needed and null_context is None and not config.num_classes:
        raise ValueError(
            "null_context is missing: guidance by a context needs that of its other pass, such as the empty text. "
            f"Pass (1, {config.context_tokens}, {config.context_dim}) numbers, or no guidance."
        )
    if null_context is None and not config.num_classes:
        return given
    device = None if given.context is None else given.context.device
    if null_context is not None and null_context.ndim == 3 and len(null_context) == 1:
        null_context = null_context.expand(given.batch_size, -1, -1)
    return given._replace(
        context=checked_context(null_context, None, given.batch_size, config, device, "null_context")
    )


def checked_labels(labels: Tensor | None, batch_size: int, num_classes: int, device: torch.device) -> Tensor | None:
    """Labels as int64 (batch_size,) on the device; None = all unlabelled.

    Raises:
        ValueError: they are not (batch_size,) whole numbers from 0 to num_classes - 1 or NULL_LABEL, or the flow has
            no classes.
    """
    if labels is None:
        return None
    labels = torch.as_tensor(labels)  # a list will do
    if num_classes == 0:
        raise ValueError("labels were given, but this flow has no classes (num_classes=0); pass labels=None.")
    if tuple(labels.shape) != (batch_size,) or labels.is_floating_point():
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; expected ({batch_size},) int64."
        )
    if _readable(labels) and not ((labels >= NULL_LABEL) & (labels < num_classes)).all():
        wrong = labels[(labels < NULL_LABEL) | (labels >= num_classes)].tolist()
        raise ValueError(
            f"labels {wrong[:5]} are out of range; expected 0 .. {num_classes - 1}, or {NULL_LABEL} for no label."
        )
    return labels.to(device, torch.int64)


def checked_context(
    context: Tensor | None,
    labels: Tensor | None,
    batch_size: int,
    config: Any,
    device: torch.device | None,
    name: str = "context",
) -> Tensor | None:
    """The condition vectors (batch_size, T, E) of a flow that has them, made of labels where it has classes.

    Args:
        context: as it was given.
        labels: (batch_size,), checked; None = all unlabelled.
        batch_size: B.
        config: of the flow.
        device: of the result.
        name: of the argument, for messages.

    Raises:
        ValueError: it is missing, given beside labels or to a flow without, or of another shape or type.
    """
    shape = batch_size, config.context_tokens, config.context_dim
    if context is None:
        if not config.context_tokens:
            return None
        if not config.num_classes:
            raise ValueError(
                f"context is missing: this flow is conditioned on {shape[1]} vectors an image. Pass a {shape} tensor."
            )
        labels = torch.full((batch_size,), NULL_LABEL, device=device) if labels is None else labels
        index = torch.where(labels < 0, config.num_classes, labels)
        return F.one_hot(index, config.context_dim).float()[:, None]
    if not config.context_tokens:
        raise ValueError(f"{name} was given, but this flow has no condition vectors (context_tokens=0); leave it out.")
    context = torch.as_tensor(context)
    if labels is not None:
        raise ValueError("labels and context were given, but both are the label of an image; pass one of them.")
    if tuple(context.shape) != shape or not context.is_floating_point():
        raise ValueError(f"{name} has shape {tuple(context.shape)} and type {context.dtype}; expected {shape} floats.")
    return context.to(device)


def checked_noise_level(noise_level: Tensor | float | None, batch_size: int, device: torch.device) -> Tensor:
    """The noise level as (batch_size,) on the device, in at least float32.

    Raises:
        ValueError: there is none, neither one nor one an image, or one that is not finite and > 0.
    """
    if noise_level is None:
        raise ValueError("noise_level is missing: this flow is conditioned on it. Pass a number or a (B,) tensor.")
    level = torch.as_tensor(noise_level, device=device)
    level = level.to(torch.promote_types(level.dtype, torch.float32))
    if level.numel() not in (1, batch_size):
        raise ValueError(f"noise_level has shape {tuple(level.shape)}; expected one number or ({batch_size},).")
    if _readable(level) and not ((level > 0) & level.isfinite()).all():
        raise ValueError(f"noise_level is {level.flatten().tolist()[:5]}; expected finite numbers > 0.")
    return level.reshape(-1).expand(batch_size)


def check_noise_range(noise_level: Tensor | float, noise_range: Sequence[float]) -> None:
    """Raise ValueError for a level outside (t_min, t_max). It reads the values, so it is not for training steps."""
    low, high = noise_range
    # On the CPU, since some devices have no float64.
    values = noise_level.detach().cpu().double() if isinstance(noise_level, Tensor) else noise_level
    level = torch.as_tensor(values, dtype=torch.float64)
    tolerance = 1e-5  # float32 rounding of a level at the edge
    if not ((level >= low * (1 - tolerance)) & (level <= high * (1 + tolerance))).all():
        raise ValueError(
            f"noise_level {level.flatten().tolist()[:5]} lies outside [{low}, {high}], the range this flow was "
            "trained on; its density means nothing there."
        )


def _readable(values: Tensor) -> bool:
    """Whether looking at values is free: not while compiling, nor where it would wait for a device."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
