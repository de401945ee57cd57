"""The arguments of a flow and of its inverse: sizes that fit together, solvers for the blocks there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
