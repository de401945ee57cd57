"""What the shapes in an official checkpoint tell of its architecture, whatever its family."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from itarflow.convert.names import HEAD_DIM, ITARFLOW_LAYERS, TARFLOW_LAYERS
from itarflow.runtime.errors import CheckpointError
from itarflow.runtime.text import listed

_LEAST_TENSORS = 8
"""In a layer; there are 12."""
T = TypeVar("T")


def num_children(state: Iterable[str], prefix: str) -> int:
    """How many modules prefix.0, prefix.1, ... there are.

    Raises:
        CheckpointError: one is missing between them, so that the last number is not what it seems.
    """
    matches = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state)
    found = {match[1] for match in matches if match}
    expected = {str(number) for number in range(len(found))}
    if found != expected:
        odd = min(found - expected, key=len)
        raise CheckpointError(
            f"has {prefix}.{odd[:20]}, but no {prefix}.{min(expected - found, key=len)}; expected numbers without "
            "gaps. It is incomplete, or of another model."
        )
    return len(found)


def tensor_of(state: Mapping[str, Tensor], name: str, shape: str) -> Tensor:
    """The tensor of that name, whose shape must have as many entries as the one written out in `shape`."""
    if name not in state:
        raise CheckpointError(f"has no tensor {name}; expected one of shape {shape}. Is it the whole state_dict()?")
    if state[name].ndim != len(shape.split(",")):
        raise CheckpointError(
            f"has {name} of shape {tuple(state[name].shape)}; expected {shape}. It is of another architecture."
        )
    return state[name]


def check_channels(channels: Sequence[int]) -> None:
    """Refuse widths that are no multiple of the official heads'; raises CheckpointError."""
    for index, width in enumerate(channels):
        if width < 1 or width % HEAD_DIM:
            raise CheckpointError(
                f"has {width} channels in block {index}; expected a multiple of {HEAD_DIM}, the width of an official "
                "attention head. It is of another architecture."
            )


def patch_sides(token_dims: Sequence[int], in_channels: int) -> tuple[int, ...]:
    """The side p of a patch in each block, from the D = in_channels p^2 values of its tokens.

    Raises:
        CheckpointError: naming the in_channels that would fit.
    """

    def fits(count: int) -> bool:
        return all(values and values % count == 0 and is_square(values // count) for values in token_dims)

    if in_channels >= 1 and fits(in_channels):
        return tuple(math.isqrt(values // in_channels) for values in token_dims)
    possible = [count for count in range(1, min(token_dims) + 1) if fits(count)]
    choices = " or ".join(map(str, possible))
    advice = f"pass in_channels = {choices} (--in-channels)" if possible else "it is of another architecture"
    raise CheckpointError(
        f"has tokens of {listed(map(str, sorted(set(token_dims))))} values, which aren't square patches of "
        f"in_channels={in_channels}; expected in_channels * patch_size^2 values: {advice}."
    )


def is_square(number: int) -> bool:
    """Whether a whole number >= 0 is the square of one."""
    return math.isqrt(number) ** 2 == number


def one_or_all(values: Sequence[int]) -> int | tuple[int, ...]:
    """One number if all blocks agree, else a tuple with one a block."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def agreed(name: str, asked: T | None, found: T, source: str) -> T:
    """What a file tells, if nothing else was asked for.

    Args:
        name: of the setting, as an argument of `load_official`.
        asked: its value there; None = as the file.
        found: what the file tells.
        source: which tensor tells it.

    Raises:
        CheckpointError: they differ.
    """
    if asked is not None and asked != found:
        raise CheckpointError(
            f"has {name} {found}, as {source} tells; {name}={asked} was asked for. Leave it out, or choose the file "
            "that it belongs to."
        )
    return found


def layers_name(state: Iterable[str]) -> str:
    """What a checkpoint calls the layers of a block."""
    return TARFLOW_LAYERS if any(f".{TARFLOW_LAYERS}." in name for name in state) else ITARFLOW_LAYERS


def num_layers(state: Mapping[str, Tensor], num_blocks: int, shared_layers: int = 0) -> tuple[int, ...]:
    """Layers of each block, shared ones counted; at least those, as a block with fewer runs them all the same."""
    layers = layers_name(state)
    depths = tuple(shared_layers + num_children(state, f"blocks.{index}.{layers}") for index in range(num_blocks))
    if len(state) < _LEAST_TENSORS * (sum(depths) - shared_layers * (num_blocks - 1)):
        raise CheckpointError(
            f"has only {len(state):,} tensors for all its layers; expected more. It is of another architecture."
        )
    if 0 in depths:
        raise CheckpointError(
            f"has no layers in block {depths.index(0)} (blocks.{depths.index(0)}.{layers}.0. ...); "
            "expected at least one in each block. Is it the whole state_dict()?"
        )
    return depths
