"""Functions of tensors, recorded as CUDA graphs and kept for later calls.

To launch a kernel takes the host about as long as a small kernel takes the device; a graph launches hundreds at once.
It has fixed shapes and addresses: inputs are copied to where it reads them, and what it returns is overwritten by its
next run.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from itarflow.runtime.devices import is_out_of_memory

T = TypeVar("T")
Entry = TypeVar("Entry")
_RECORDING = threading.Lock()
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
"""One a device: libraries keep a workspace for each stream that they have met, for good."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has memory, and an address: none of torch's modes and compilers is at work."""
    return type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and not torch.compiler.is_compiling()


def record(
    function: Callable[..., T],
    *inputs: Tensor,
    device: torch.device | None = None,
    warm_up: Callable[..., object] | None = None,
    pool: Any = None,
) -> Callable[..., T]:
    """The same function of tensors of the same shapes, as a CUDA graph.

    The function must not read tensors' values on the host. If it can't be recorded, it is returned as it is, with a
    warning.

    Args:
        function: of tensors; what it returns is overwritten by the next call.
        inputs: an example of what it will be given.
        device: of the function; None = of the inputs.
        warm_up: called twice before, with the inputs: it does all that libraries do once, such as to allocate, which
            can't be recorded. None = the function.
        pool: `torch.cuda.graph_pool_handle()`, memory that graphs share which never run at the same time; None = its
            own.

    Raises:
        RuntimeError: the device's memory has run out.
    """
    given = [tensor.clone() for tensor in inputs]
    device = given[0].device if device is None else device
    # Streams and graphs belong to the current device, and only one graph of a process may be recorded at a time. What
    # the garbage collector frees, such as other graphs, would end the recording.
    with torch.cuda.device(device), _RECORDING, _no_collection():
        if device not in _STREAMS:
            _STREAMS[device] = torch.cuda.Stream(device)
        stream = _STREAMS[device]
        before = torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(2):
                (warm_up or function)(*given)
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = function(*given)
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # which a recording that fails at its end does not
            if is_out_of_memory(error) or (error.__context__ and is_out_of_memory(error.__context__)):
                raise
            warnings.warn(
                f"kernels are launched one by one, which is slower: a CUDA graph could not be recorded ({error}).",
                stacklevel=2,
            )
            return function

    def replay(*inputs: Tensor) -> T:
        with torch.cuda.device(device):
            for own, tensor in zip(given, inputs, strict=True):
                own.copy_(tensor)
            graph.replay()
        return result

    return replay


class Recordings(Generic[Entry]):
    """What one owner has recorded, by key, until it is released, or the owner is gone. Copies begin empty.

    All of it shares memory, so it is used in `turn`s, also by several threads and streams.

    Args:
        room: how many entries are kept; the one that was used longest ago is dropped.
    """

    def __init__(self, room: int = 64) -> None:
        self._room, self._lock = room, threading.RLock()
        self._entries: dict[Hashable, Entry] = {}
        self._pool: Any = None
        self._ended: torch.cuda.Event | None = None
        _ALIVE.add(self)

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Within, no other thread or stream uses the recordings."""
        on_gpu = device.type == "cuda" and torch.cuda.is_initialized()
        with self._lock:
            if on_gpu and self._ended is not None:
                torch.cuda.current_stream(device).wait_event(self._ended)
            try:
                yield
            finally:
                if on_gpu:
                    self._ended = torch.cuda.current_stream(device).record_event()

    def record(
        self,
        function: Callable[..., T],
        *inputs: Tensor,
        device: torch.device | None = None,
        warm_up: Callable[..., object] | None = None,
    ) -> Callable[..., T]:
        """`record` into the shared memory. Where nothing can be recorded, as under a mode, the function itself."""
        place = inputs[0].device if device is None else device
        if place.type != "cuda" or not torch.cuda.is_initialized() or not all(map(is_plain, inputs)):
            return function
        with torch.cuda.device(place):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
        return record(function, *inputs, device=device, warm_up=warm_up, pool=self._pool)

    def get(self, key: Hashable, make: Callable[[], Entry]) -> Entry:
        """What is kept under a key, and in the present precision, made if it is not there. Within `turn`."""
        key = key, _products()
        entry = self._entries.pop(key) if key in self._entries else make()
        self._entries[key] = entry  # the newest is the last
        while len(self._entries) > self._room:
            del self._entries[next(iter(self._entries))]
        return entry

    def __len__(self) -> int:
        return len(self._entries)

    def release(self) -> bool:
        """Drop all recordings and their memory, unless another thread uses them; returns whether there were any."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            there_were = bool(self._entries)
            self._entries.clear()
            self._pool = None
            return there_were
        finally:
            self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings[Entry]:
        return Recordings(self._room)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recordings, (self._room,)


_ALIVE: WeakSet[Recordings[Any]] = WeakSet()


def release_recordings() -> bool:
    """Drop the recordings of all owners, to give their memory back; returns whether there were any."""
    released = [recordings.release() for recordings in list(_ALIVE)]
    return any(released)


def _products() -> Any:
    """The precision of products in float32, which a recording keeps."""
    matmul: Any = torch.backends.cuda.matmul
    return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


@contextmanager
def _no_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
