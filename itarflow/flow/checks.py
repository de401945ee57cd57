"""What a flow is given: sizes that fit together, labels, noise levels and solvers in their ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itarflow.flow.embedding import NULL_LABEL
from itarflow.inverse.solvers import Jacobi, Solver
from itarflow.runtime.ranges import check_flag, check_integer, check_number, shown

_MOST_LAYERS, _MOST_PARAMETERS = 10_000, 10**12
_RANGES = {
    "in_channels": (1, 2**16),
    "head_dim": (1, 2**20),
    "shared_layers": (0, _MOST_LAYERS),
    "num_classes": (0, 2**20),
    "mlp_ratio": (1, 2**16),
    "rotary_side": (0, 2**16),
    "context_dim": (0, 2**20),
    "context_tokens": (0, 2**16),
}


_FLAGS = (
    "noise_conditioned",
    "volume_preserving",
    "learned_first_token",
    "start_token",
    "final_norm",
    "softplus_scale",
    "first_block_reversed",
)


class BlockSize(NamedTuple):
    """What may differ between blocks."""

    patch_size: int
    channels: int
    num_layers: int


def block_sizes(config: Any) -> list[BlockSize]:
    """The sizes of each block, once all arguments of a flow are checked, before anything is built.

    Args:
        config: the arguments of `TARFlow`, as attributes; of any type, since they may be from a file of others.

    Raises:
        ValueError: arguments of another type, out of range, or that do not fit together, saying what would fit.
    """
    for name, (least, most) in _RANGES.items():
        check_integer(name, getattr(config, name), least, most)
    for name in _FLAGS:
        check_flag(name, getattr(config, name))
    check_number("input_scale", config.input_scale)
    check_number("soft_clip", config.soft_clip, 0)
    known = config.noise_range
    is_pair = isinstance(known, list | tuple) and len(known) == 2
    for level in known if is_pair else ():
        check_number("a level of noise_range", level)
    if known is not None and not (is_pair and known[0] <= known[1]):
        raise ValueError(f"noise_range is {shown(known)}; expected (t_min, t_max) with t_min <= t_max, or None.")
    if not isinstance(config.num_layers, list | tuple) or not config.num_layers:
        raise ValueError(f"num_layers is {shown(config.num_layers)}; expected one number a block, such as (8, 8, 8).")
    blocks = len(config.num_layers)
    patches = _per_block("patch_size", config.patch_size, blocks, 2**16)
    widths = _per_block("channels", config.channels, blocks, 2**20)
    layers = _per_block("num_layers", config.num_layers, blocks, _MOST_LAYERS)
    sizes = [BlockSize(*size) for size in zip(patches, widths, layers, strict=True)]
    image_height, image_width = height_and_width(config.image_size)
    for patch, width in dict.fromkeys(zip(patches, widths, strict=True)):
        if image_height % patch or image_width % patch:
            divisors = [
                p for p in range(1, min(image_height, image_width) + 1) if image_height % p == image_width % p == 0
            ]
            raise ValueError(
                f"patch_size {patch} does not divide image_size {config.image_size}; choose one of {divisors}, "
                "or crop the images to another size."
            )
        if width % config.head_dim:
            raise ValueError(
                f"channels {width} is not a multiple of head_dim {config.head_dim}; change one of the two."
            )
    if config.shared_layers and len(set(widths)) > 1:
        raise ValueError(
            f"shared_layers={config.shared_layers} needs the same channels in all blocks, but they are {widths}."
        )
    _check_context(config, blocks)
    if config.learned_first_token and config.start_token:
        raise ValueError("learned_first_token and start_token both transform the first token; choose one of them.")
    if config.rotary_side and config.head_dim % 16:
        raise ValueError(f"head_dim is {config.head_dim}; expected a multiple of 16, for rotary positions.")
    by_first = config.learned_first_token or config.start_token
    if min(patches) == image_height == image_width and not by_first:
        raise ValueError(
            f"patch_size {config.patch_size} is image_size {config.image_size}: the only token of each block has none "
            "before it, so that nothing can be learnt; choose a smaller patch_size, or set start_token."
        )
    if sum(layers) > _MOST_LAYERS or num_parameters(config, sizes) > _MOST_PARAMETERS:
        raise ValueError(
            f"the flow has {sum(layers):,} layers, {num_parameters(config, sizes):.1e} parameters; expected at most "
            f"{_MOST_LAYERS:,} and {_MOST_PARAMETERS:.0e}: lower the largest of num_layers={shown(layers)}, channels="
            f"{shown(widths)}, mlp_ratio={config.mlp_ratio}, num_classes={config.num_classes}."
        )
    return sizes


def _check_context(config: Any, blocks: int) -> None:
    """Refuse condition vectors that are half there, or that are no labels where there are classes."""
    if bool(config.context_dim) != bool(config.context_tokens):
        raise ValueError(
            f"context_dim is {config.context_dim} and context_tokens {config.context_tokens}; expected both, or 0 and "
            "0 for a flow without condition vectors."
        )
    if config.context_tokens and config.num_classes:
        expected = config.num_classes + 1
        if (config.context_tokens, config.context_dim) != (1, expected):
            raise ValueError(
                f"context_tokens is {config.context_tokens} and context_dim {config.context_dim} for num_classes="
                f"{config.num_classes}; expected 1 and {expected}, the label as one vector, or num_classes=0."
            )
    if config.context_blocks is not None:
        check_integer("context_blocks", config.context_blocks, 1, blocks)


def height_and_width(image_size: Any) -> tuple[int, int]:
    """(H, W) from the side of a square, or from both.

    Raises:
        ValueError: it is neither one whole number >= 1 nor two.
    """
    pair = tuple(image_size) if isinstance(image_size, list | tuple) else (image_size, image_size)
    if len(pair) != 2:
        raise ValueError(f"image_size is {shown(image_size)}; expected one number, or (height, width).")
    for side in pair:
        check_integer("image_size", side, 1, 2**16)
    return pair


def num_parameters(config: Any, sizes: Sequence[BlockSize]) -> int:
    """The parameters of a flow of that config, up to biases and norms, without building it."""
    layer, depth = 4 + 2 * config.mlp_ratio, config.shared_layers
    total = layer * depth * sizes[0].channels ** 2
    image_height, image_width = height_and_width(config.image_size)
    context_from = 0 if config.context_blocks is None else len(sizes) - config.context_blocks
    for index, (patch, width, layers) in enumerate(sizes):
        tokens = 0 if config.rotary_side else (image_height // patch) * (image_width // patch)
        values = config.in_channels * patch**2
        outputs = values * (1 if config.volume_preserving else 2) * (2 if config.learned_first_token else 1)
        conditions = config.num_classes * (not config.context_tokens) + config.context_dim * (index >= context_from)
        vectors = tokens + conditions + values + outputs
        squares = layer * max(layers - depth, 0) + 8 * config.noise_conditioned + config.learned_first_token
        total += width * (vectors + squares * width)
    return total


def _per_block(name: str, value: Any, num_blocks: int, most: int) -> tuple[int, ...]:
    """One number for each block, from one for all or one a block."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * num_blocks
    if len(values) != num_blocks:
        raise ValueError(
            f"{name} has {len(values)} entries ({shown(values)}) for {num_blocks} blocks (the length of num_layers); "
            "expected one number, or one a block."
        )
    for one in values:
        check_integer(name, one, 1, most)
    return values


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
    context: Tensor | None, labels: Tensor | None, batch_size: int, config: Any, device: torch.device
) -> Tensor | None:
    """The condition vectors (batch_size, T, E) of a flow that has them, made of labels where it has classes.

    Args:
        context: as it was given.
        labels: (batch_size,), checked; None = all unlabelled.
        batch_size: B.
        config: of the flow.
        device: of the result.

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
        return torch.nn.functional.one_hot(index, config.context_dim).float()[:, None]
    if not config.context_tokens:
        raise ValueError("context was given, but this flow has no condition vectors (context_tokens=0); leave it out.")
    if labels is not None:
        raise ValueError("labels and context were given, but both are the label of an image; pass one of them.")
    if tuple(context.shape) != shape or not context.is_floating_point():
        raise ValueError(
            f"context has shape {tuple(context.shape)} and type {context.dtype}; expected {shape} floats."
        )
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
