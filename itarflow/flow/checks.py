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
    "image_size": (1, 2**16),
    "in_channels": (1, 2**16),
    "head_dim": (1, 2**20),
    "shared_layers": (0, _MOST_LAYERS),
    "num_classes": (0, 2**20),
    "mlp_ratio": (1, 2**16),
}


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
    for name in ("noise_conditioned", "volume_preserving", "learned_first_token"):
        check_flag(name, getattr(config, name))
    check_number("input_scale", config.input_scale)
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
    for patch, width in dict.fromkeys(zip(patches, widths, strict=True)):
        if config.image_size % patch:
            divisors = [p for p in range(1, config.image_size + 1) if config.image_size % p == 0]
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
    if min(patches) == config.image_size and not config.learned_first_token:
        raise ValueError(
            f"patch_size {config.patch_size} is image_size {config.image_size}: the only token of each block has none "
            "before it, so that nothing can be learnt; choose a smaller patch_size, or set learned_first_token."
        )
    if sum(layers) > _MOST_LAYERS or num_parameters(config, sizes) > _MOST_PARAMETERS:
        raise ValueError(
            f"the flow has {sum(layers):,} layers, {num_parameters(config, sizes):.1e} parameters; expected at most "
            f"{_MOST_LAYERS:,} and {_MOST_PARAMETERS:.0e}: lower the largest of num_layers={shown(layers)}, channels="
            f"{shown(widths)}, mlp_ratio={config.mlp_ratio}, num_classes={config.num_classes}."
        )
    return sizes


def num_parameters(config: Any, sizes: Sequence[BlockSize]) -> int:
    """The parameters of a flow of that config, up to biases and norms, without building it."""
    layer, depth = 4 + 2 * config.mlp_ratio, config.shared_layers
    total = layer * depth * sizes[0].channels ** 2
    for patch, width, layers in sizes:
        tokens, values = (config.image_size // patch) ** 2, config.in_channels * patch**2
        outputs = values * (1 if config.volume_preserving else 2) * (2 if config.learned_first_token else 1)
        vectors = tokens + config.num_classes + values + outputs
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
