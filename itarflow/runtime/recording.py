"""Functions of tensors, recorded as CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_RECORDING = threading.Lock()


def record(function: Callable[..., T], *inputs: Tensor) -> Callable[..., T]:
    """The same function of tensors of the same shapes, as a CUDA graph.

    The tensors that a call returns are overwritten by the next call.
    """
    given = [tensor.clone() for tensor in inputs]
    # Streams and graphs belong to the current device, and only one graph of a process may be recorded at a time.
    with torch.cuda.device(given[0].device), _RECORDING:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries allocate at their first use, which can't be recorded
                function(*given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = function(*given)

    def replay(*inputs: Tensor) -> T:
        with torch.cuda.device(given[0].device):
            for own, tensor in zip(given, inputs, strict=True):
                own.copy_(tensor)
            graph.replay()
        return result

    return replay
