"""Functions of tensors that are called again and again: as CUDA graphs from the second call of a kind on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from itarflow.runtime.recording import Lane, Recordings, is_plain

DEVICES = {"cuda"}
"""Where graphs are recorded."""


@dataclass
class Repeated:
    """A function for inputs of one kind."""

    lane: Lane
    calls: int = 0
    replay: Callable[..., Tensor] | None = None


def repeated(
    recordings: Recordings[Repeated],
    function: Callable[..., Tensor],
    *inputs: Tensor | None,
    weights: Sequence[Tensor] = (),
) -> Tensor:
    """function(*inputs), without gradients; recorded if the same shapes and dtypes have come before.

    It is called as it is on other devices, under autocast, and while something else is recorded, compiled or faked.

    Args:
        recordings: of this function alone.
        function: reads no values on the host, and nothing but its inputs that may change, except for the values of
            weights that stay in place.
        inputs: on one device.
        weights: what else it reads, all on that device. If they move, it is recorded anew.

    Raises:
        RuntimeError: the device's memory has run out.
    """
    given = [tensor.detach() for tensor in inputs if tensor is not None]
    if not _can_record([*given, *weights[:1]]):
        return function(*inputs)

    def of_tensors(*given: Tensor) -> Tensor:
        left = iter(given)
        return function(*(None if one is None else next(left) for one in inputs))

    kinds = tuple(None if one is None else (one.shape, one.dtype) for one in inputs)
    key = given[0].device, kinds, tuple(tensor.data_ptr() for tensor in weights)
    with recordings.turn(given[0].device):
        kind = recordings.get(key, lambda: Repeated(Lane(given[0].device)))
        kind.calls += 1
        if kind.calls == 1:  # what comes once is not worth it: to record takes about four calls
            return function(*inputs)
        kind.replay = kind.replay or kind.lane.record(of_tensors, *given)
        return kind.replay(*given).clone()


def _can_record(tensors: Sequence[Tensor]) -> bool:
    device = tensors[0].device
    return (
        device.type in DEVICES
        and all(is_plain(tensor) and tensor.device == device for tensor in tensors)
        and not torch.is_autocast_enabled(device.type)
        and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )
