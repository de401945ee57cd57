"""What a flow is given: sizes that fit together, labels, noise levels and solvers in their ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from itarflow.flow.embedding import NULL_LABEL
from itarflow.inverse.solvers import Jacobi, Solver


def per_block(name: str, value: int | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """One value for each block, from one for all or one a block; raises ValueError if the numbers differ."""
    values = (value,) * num_blocks if isinstance(value, int) else tuple(value)
    if len(values) != num_blocks:
        raise ValueError(
            f"{name} has {len(values)} entries ({values}) for {num_blocks} blocks (the length of num_layers); "
            "expected one number, or one a block."
        )
    return values


def check_architecture(
    image_size: int,
    in_channels: int,
    patch_sizes: tuple[int, ...],
    channels: tuple[int, ...],
    num_layers: tuple[int, ...],
    shared_layers: int,
    head_dim: int,
) -> None:
    """Raise ValueError, naming the values and what would fit, unless the sizes of a flow fit together."""
    if not num_layers or min(num_layers) < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least one block, and at least one layer in each.")
    if min(image_size, in_channels, *patch_sizes, *channels, head_dim) < 1 or shared_layers < 0:
        raise ValueError(
            f"Sizes must be positive: image_size={image_size}, in_channels={in_channels}, patch_size={patch_sizes}, "
            f"channels={channels}, head_dim={head_dim}, shared_layers={shared_layers}."
        )
    for patch in patch_sizes:
        if image_size % patch:
            divisors = [p for p in range(1, image_size + 1) if image_size % p == 0]
            raise ValueError(
                f"patch_size {patch} does not divide image_size {image_size}; choose one of {divisors}, "
                "or crop the images to another size."
            )
    for width in channels:
        if width % head_dim:
            raise ValueError(f"channels {width} is not a multiple of head_dim {head_dim}; change one of the two.")
    if shared_layers and len(set(channels)) > 1:
        raise ValueError(
            f"shared_layers={shared_layers} needs the same channels in all blocks, but they are {channels}."
        )


def check_scalars(num_classes: int, input_scale: float, mlp_ratio: int, noise_range: Sequence[float] | None) -> None:
    """Raise ValueError unless the other arguments of a flow are in their ranges."""
    if num_classes < 0 or mlp_ratio < 1:
        raise ValueError(
            f"num_classes={num_classes}, mlp_ratio={mlp_ratio}; expected num_classes >= 0, mlp_ratio >= 1."
        )
    if not (math.isfinite(input_scale) and input_scale > 0):
        raise ValueError(f"input_scale is {input_scale}; expected a finite number > 0.")
    if noise_range is not None and not (len(noise_range) == 2 and 0 < noise_range[0] <= noise_range[1] < math.inf):
        raise ValueError(f"noise_range is {noise_range}; expected (t_min, t_max) with 0 < t_min <= t_max, or None.")


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


def solver_of_each_block(solver: Solver | Sequence[Solver], num_tokens: Sequence[int]) -> Sequence[Solver]:
    """One solver a block, from one for all or one each.

    Args:
        solver: one, or one a block in the order of inversion.
        num_tokens: of each block, in that order.

    Raises:
        ValueError: they are no solvers, not as many as blocks, or not for blocks of so many tokens.
    """
    by_block = [solver] * len(num_tokens) if callable(solver) else solver
    if not isinstance(by_block, Sequence) or isinstance(by_block, str) or not all(map(callable, by_block)):
        raise ValueError(f"solver is {solver!r}; expected one of itarflow.inverse, or a list of them, one a block.")
    if len(by_block) != len(num_tokens):
        raise ValueError(f"{len(by_block)} solvers were given for {len(num_tokens)} blocks; expected one each.")
    for one, tokens in zip(by_block, num_tokens, strict=True):
        if isinstance(one, Jacobi):
            one.check(tokens)
    return by_block


def _readable(values: Tensor) -> bool:
    """Whether looking at values is free: not while compiling, nor where it would wait for a device."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
