"""Functions of tensors, recorded as CUDA graphs and kept for later calls.

To launch a kernel takes the host about as long as a small kernel takes the device; a graph launches hundreds at once.
It has fixed shapes and addresses: inputs are copied to where it reads them, and what it returns is overwritten by its
next run.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from itarflow.runtime.devices import is_out_of_memory

T = TypeVar("T")
Entry = TypeVar("Entry")
_RECORDING = threading.Lock()
_FREE: dict[torch.device, list[torch.cuda.Stream]] = {}
"""Streams that no lane has: libraries keep a workspace for each stream that they have met."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has memory, and an address: none of torch's modes and compilers is at work."""
    return type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and not torch.compiler.is_compiling()


class Lane:
    """What CUDA graphs share that never run at the same time, and live as long as one another: memory and a stream.

    When a graph is freed, PyTorch frees the workspaces of cuBLAS of the stream on which it was recorded, to which
    other graphs of that stream may still write. So each group of graphs has a stream, and is freed together.

    Args:
        device: of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._graphs: list[torch.cuda.CUDAGraph] = []  # also those that could not be recorded
        self._broken = False

    def record(
        self, function: Callable[..., T], *inputs: Tensor, warm_up: Callable[..., object] | None = None
    ) -> Callable[..., T]:
        """The same function of tensors of the same shapes, as a CUDA graph.

        Where nothing can be recorded, as under one of torch's modes, it is the function itself; after a recording that
        has failed, too, which is said in a warning.

        Args:
            function: of tensors, whose values it must not read on the host; what it returns is overwritten by the next
                call.
            inputs: an example of what it will be given.
            warm_up: called twice before, with the inputs: it does all that libraries do once, such as to allocate,
                which can't be recorded. None = the function.

        Raises:
            RuntimeError: the device's memory has run out.
        """
        possible = self.device.type == "cuda" and torch.cuda.is_initialized() and all(map(is_plain, inputs))
        if not possible or self._broken:
            return function
        given = [tensor.clone() for tensor in inputs]
        # Streams and graphs belong to the current device, and only one graph of a process may be recorded at a time.
        # What the garbage collector frees, such as other graphs, would end the recording.
        with torch.cuda.device(self.device), _RECORDING, _no_collection():
            stream, before = self._open(), torch.cuda.current_stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(2):
                    (warm_up or function)(*given)
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            self._graphs.append(graph)
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    result = function(*given)
            except RuntimeError as error:
                self._close_after_failure(before)
                if is_out_of_memory(error) or (error.__context__ and is_out_of_memory(error.__context__)):
                    raise
                warnings.warn(
                    f"kernels are launched one by one, which is slower: a CUDA graph could not be recorded ({error}).",
                    stacklevel=2,
                )
                return function

        def replay(*inputs: Tensor) -> T:
            with torch.cuda.device(self.device):
                for own, tensor in zip(given, inputs, strict=True):
                    own.copy_(tensor)
                graph.replay()
            return result

        return replay

    def _open(self) -> torch.cuda.Stream:
        if self._stream is None:
            free = _FREE.setdefault(self.device, [])
            self._stream, self._pool = free.pop() if free else torch.cuda.Stream(self.device), _new_pool()
            weakref.finalize(self, free.append, self._stream).atexit = False
        return self._stream

    def _close_after_failure(self, before: torch.cuda.Stream) -> None:
        """Do what a recording that fails at its end leaves undone in some versions of PyTorch."""
        self._broken = True
        torch.cuda.set_stream(before)
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(before.device_index, self._pool)


def _new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


class Recordings(Generic[Entry]):
    """What one owner has recorded, by key, until it is released, or the owner is gone. Copies begin empty.

    It is used in `turn`s, also by several threads and streams.

    Args:
        room: how many entries are kept; the one that was used longest ago is dropped.
    """

    def __init__(self, room: int = 64) -> None:
        self._room, self._lock = room, threading.RLock()
        self._entries: dict[Hashable, Entry] = {}
        self._ended: torch.cuda.Event | None = None
        with _ALIVE_LOCK:
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

    def get(self, key: Hashable, make: Callable[[], Entry]) -> Entry:
        """What is kept under a key, and in the present precision, made if it is not there. Within `turn`."""
        key = key, _products()
        if key in self._entries:
            self._entries[key] = self._entries.pop(key)  # the newest is the last
        else:
            while len(self._entries) >= self._room:  # before, since there may be no memory for one more
                del self._entries[next(iter(self._entries))]
            self._entries[key] = make()
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def release(self) -> bool:
        """Drop all recordings and their memory, unless another thread uses them; returns whether there were any."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            there_were = bool(self._entries)
            if there_were and self._ended is not None:
                self._ended.wait()  # before the current stream may have the memory
            self._entries.clear()
            return there_were
        finally:
            self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings[Entry]:
        return Recordings(self._room)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recordings, (self._room,)


_ALIVE: WeakSet[Recordings[Any]] = WeakSet()
_ALIVE_LOCK = threading.Lock()


def release_recordings() -> bool:
    """Drop the recordings of all owners, to give their memory back; returns whether there were any."""
    with _ALIVE_LOCK:
        alive = list(_ALIVE)
    released = [recordings.release() for recordings in alive]
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
