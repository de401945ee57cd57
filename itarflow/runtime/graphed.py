"""The inverse of a flow by CUDA graphs, which are recorded once and kept for later calls.

Launching each kernel would bound the speed of a token. So the loop over tokens is itself recorded, several tokens a
graph: the position is a tensor on the device. What a graph reads has a fixed address, to which each inversion copies
the present weights and conditions. Attention that does not look up its position reads the cache up to a length that
is the same for many tokens: the next power of two.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from itarflow.runtime.recording import Lane, Recordings, is_plain

Affine = tuple[Tensor, Tensor]

_TOGETHER = 16
"""Tokens that one graph solves: enough for the host to be ahead of the device."""
_WIDEST = 64
"""Larger windows keep the device busy for longer than the host takes to launch their kernels."""
_SHORTEST = 64
"""The least length of cache that is read; a multiple of `_TOGETHER`."""
DEVICES = {"cuda"}
"""Where graphs are recorded."""
CALLS = 2
"""Batch sizes that are kept for a flow: the usual one, and that of the last batch."""


@runtime_checkable
class DeviceConditioner(Protocol):
    """A `solvers.Conditioner` that runs loops itself, on a device that need not wait for the host at each token."""

    def __call__(self, tokens: Tensor, start: int | Tensor, stop: int | None = None) -> Affine: ...  # noqa: D102
    def select(self, samples: Tensor) -> DeviceConditioner: ...  # noqa: D102

    def sequential(self, z: Tensor, first: Affine, progress: Callable[[int], None] | None) -> Tensor:
        """The result of `solvers.sequential`, whose arguments these are."""

    def iterate(
        self, step: Callable[..., tuple[Tensor, ...]], key: Hashable, count: int, stop: int, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """The tensors step(evaluation, *state), which the next iteration may overwrite.

        Args:
            step: of the block's evaluation, (tokens (B, n, D), start (B,)) -> (shift, scale), and of tensors, without
                a look at their values.
            key: names all that is fixed in the step.
            count: n.
            stop: the largest start + n.
            state: its tensors, each (B, ...).
        """


class Cache(Protocol):
    """What this module knows of `inverse.decoding.Cache`."""

    tensor: Tensor


class CachedConditioner(Protocol):
    """What this module knows of `inverse.decoding.CachedConditioner`."""

    @property
    def cache(self) -> Cache: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def num_tokens(self) -> int: ...  # noqa: D102
    @property
    def reads_exactly(self) -> bool: ...  # noqa: D102
    def __call__(self, tokens: Tensor, start: int | Tensor, stop: int | None = None) -> Affine: ...  # noqa: D102
    def at(self, tokens: Tensor, window: Any) -> Affine: ...  # noqa: D102
    def begin(self) -> Affine | None: ...  # noqa: D102
    def scattered(self, start: Tensor, count: int, length: int) -> Any: ...  # noqa: D102
    def solve(self, x: Tensor, z: Tensor, start: Tensor, count: int, length: int) -> None: ...  # noqa: D102
    def select(self, samples: Tensor) -> Self: ...  # noqa: D102
    def over(self, memory: Tensor) -> Self: ...  # noqa: D102
    def tensors(self) -> list[Tensor]: ...  # noqa: D102


class _Loop(NamedTuple):
    """What the loop over tokens reads and writes, see `inverse.decoding.CachedConditioner.solve`."""

    x: Tensor
    z: Tensor
    start: Tensor


@dataclass(frozen=True)
class _Fixed:
    """A block for so many rows, at fixed addresses, and what has been recorded of it."""

    conditioner: CachedConditioner
    addresses: tuple[int, ...] = ()
    """Of the parameters that it reads where they lie."""
    recorded: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)
    loops: dict[torch.dtype, _Loop] = field(default_factory=dict)
    parts: dict[int, _Fixed] = field(default_factory=dict)
    """The same block for fewer samples, by their number."""


class Decoders:
    """The blocks of a flow for one batch size and dtype, kept from call to call.

    Args:
        memory: (values,), for the cache of any of the blocks, one after another.
        batch_size: of the samples.
    """

    def __init__(self, memory: Tensor, batch_size: int) -> None:
        self._memory, self._batch_size = memory, batch_size
        self._blocks: dict[Hashable, _Fixed] = {}
        self._parts: Tensor | None = None
        self.lane = Lane(memory.device)

    def of(self, key: Hashable, conditioner: CachedConditioner, parameters: Sequence[Tensor]) -> GraphedConditioner:
        """The conditioner by graphs, with an empty cache. It is used up before the next one is asked for.

        Args:
            key: names the block, and all that is fixed in what it computes.
            conditioner: with present values, for one inversion.
            parameters: of the block. Where they have moved, all is recorded anew.
        """
        addresses = tuple(tensor.data_ptr() for tensor in parameters if is_plain(tensor))
        fixed = self._blocks.get(key)
        if fixed is not None and fixed.addresses != addresses:
            self._blocks.clear()  # all of them, since graphs of a lane are freed together
            self.lane, fixed = Lane(self._memory.device), None
        if fixed is None:
            fixed = self._blocks[key] = _Fixed(conditioner.over(self._memory), addresses)
        else:
            _copy(conditioner.tensors(), fixed.conditioner.tensors())
        self._memory.zero_()  # what is masked must be finite, too
        return GraphedConditioner(self, fixed, fixed)

    def part(self, whole: _Fixed, conditioner: CachedConditioner) -> _Fixed:
        """A part of the samples of a block, with what is in its cache; the caches of all blocks share their memory."""
        rows = conditioner.batch_size
        fixed = whole.parts.get(rows)
        if fixed is None:
            fixed = whole.parts[rows] = _Fixed(conditioner.over(self._memory_of_part(rows)))
        _copy(conditioner.tensors(), fixed.conditioner.tensors())
        fixed.conditioner.cache.tensor.copy_(conditioner.cache.tensor)
        return fixed

    def _memory_of_part(self, rows: int) -> Tensor:
        """Of a part of so many samples, for the cache of any of the blocks."""
        sizes = list(_halves(self._batch_size))
        each = len(self._memory) // self._batch_size
        if rows not in sizes:  # as a solver may ask for that drops single samples
            return self._memory.new_zeros(each * rows)
        if self._parts is None:
            self._parts = self._memory.new_zeros(each * sum(sizes))
        return self._parts[each * sum(size for size in sizes if size > rows) :]


def _halves(batch_size: int) -> Iterator[int]:
    """A half of the batch, a quarter, ..., rounded up; at least 1."""
    yield (batch_size + 1) // 2
    if batch_size > 2:
        yield from _halves((batch_size + 1) // 2)


def _copy(given: Sequence[Tensor], fixed: Sequence[Tensor]) -> None:
    for new, old in zip(given, fixed, strict=True):
        if not is_plain(new) or new.data_ptr() != old.data_ptr():
            old.copy_(new)


@contextmanager
def decoders(
    recordings: Recordings[Decoders], device: torch.device, batch_size: int, dtype: torch.dtype, values: int
) -> Iterator[Decoders | None]:
    """The decoders of a flow for one inversion, in which no other thread may use them; None = not on this device.

    Args:
        recordings: of the flow.
        device: of the flow.
        batch_size: of the samples.
        dtype: of the caches.
        values: of the largest cache.
    """
    if device.type not in DEVICES:
        yield None
        return
    # What is kept must be no tensors of inference mode, which nothing may write to outside of it.
    with recordings.turn(device), torch.inference_mode(False), torch.no_grad():

        def make() -> Decoders:
            return Decoders(torch.zeros(values, dtype=dtype, device=device), batch_size)

        yield recordings.get((device, batch_size, dtype, values), make)


class GraphedConditioner:
    """A `solvers.DeviceConditioner` by CUDA graphs. Stateful."""

    def __init__(self, decoders: Decoders, whole: _Fixed, fixed: _Fixed) -> None:
        self._decoders, self._whole, self._fixed = decoders, whole, fixed
        self._seen: set[Hashable] = set()

    def sequential(self, z: Tensor, first: Affine, progress: Callable[[int], None] | None) -> Tensor:
        """See `DeviceConditioner`."""
        fixed, total = self._fixed, z.shape[1]
        if z.dtype not in fixed.loops:
            zero = torch.zeros(1, dtype=torch.int64, device=z.device)
            fixed.loops[z.dtype] = _Loop(torch.zeros_like(z), torch.empty_like(z), zero)
        loop = fixed.loops[z.dtype]
        loop.z.copy_(z)
        loop.x[:, :1] = z[:, :1] * first[1] + first[0]
        _report(progress, 1)
        for start in range(0, total - 1, _TOGETHER):
            count = min(_TOGETHER, total - 1 - start)
            loop.start.fill_(start)
            self._tokens(loop, count, self._length(start + count, alone=True))()
            _report(progress, count)
        return loop.x.clone()

    def _tokens(self, loop: _Loop, count: int, length: int) -> Callable[[], None]:
        """What solves so many tokens from the loop's start on, recorded."""
        key, solve = ("tokens", loop.z.dtype, count, length), self._fixed.conditioner.solve
        if key not in self._fixed.recorded:
            self._fixed.recorded[key] = self._decoders.lane.record(
                lambda: solve(*loop, count, length),
                warm_up=lambda: solve(*loop, 1, length),  # a token that is solved again
            )
        return self._fixed.recorded[key]

    def begin(self) -> Affine | None:
        """See `inverse.decoding.CachedConditioner`."""
        return self._fixed.conditioner.begin()

    def __call__(self, tokens: Tensor, start: int | Tensor, stop: int | None = None) -> Affine:
        """See `solvers.Conditioner`."""
        conditioner, samples = self._fixed.conditioner, len(tokens)
        rows = conditioner.batch_size
        start = _padded(start, rows) if isinstance(start, Tensor) else start
        shift, scale = conditioner(_padded(tokens, rows), start, stop)
        return shift[:samples], scale[:samples]

    def iterate(
        self, step: Callable[..., tuple[Tensor, ...]], key: Hashable, count: int, stop: int, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """See `DeviceConditioner`."""
        conditioner, recorded, samples = self._fixed.conditioner, self._fixed.recorded, len(state[0])
        state = tuple(_padded(tensor, conditioner.batch_size) for tensor in state)
        length = self._length(stop) if count <= _WIDEST else stop

        def evaluated(*state: Tensor) -> tuple[Tensor, ...]:
            return step(lambda tokens, at: conditioner.at(tokens, conditioner.scattered(at, count, length)), *state)

        # Recorded at the second use in a call: the last windows of a sequence get shorter, and each occurs only once.
        key = key, count, length, *(tensor.dtype for tensor in state)
        if key not in recorded and key in self._seen and count <= _WIDEST:
            recorded[key] = self._decoders.lane.record(evaluated, *state)
        self._seen.add(key)
        return tuple(tensor[:samples] for tensor in recorded.get(key, evaluated)(*state))

    def select(self, samples: Tensor) -> GraphedConditioner:
        """See `solvers.Conditioner`. Batches of a half, a quarter ... are kept, and filled up."""
        rows = self._fixed.conditioner.batch_size
        size = next((half for half in reversed(list(_halves(rows))) if half >= len(samples)), rows)
        part = self._fixed.conditioner.select(_padded(samples, size))
        return GraphedConditioner(self._decoders, self._whole, self._decoders.part(self._whole, part))

    def _length(self, stop: int, alone: bool = False) -> int:
        """How much of the cache is read by tokens before `stop`; `alone` = by one at a time."""
        if alone and self._fixed.conditioner.reads_exactly:
            return self._fixed.conditioner.num_tokens
        return min(max(_SHORTEST, 1 << (stop - 1).bit_length()), self._fixed.conditioner.num_tokens)


def _padded(values: Tensor, rows: int) -> Tensor:
    """So many rows: those that are missing are as the first."""
    missing = rows - len(values)
    return torch.cat([values, values[:1].expand(missing, *values.shape[1:])]) if missing else values


def _report(progress: Callable[[int], None] | None, solved: int) -> None:
    if progress is not None:
        progress(solved)
