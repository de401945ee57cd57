"""What the steps need to see or to turn off inside of the package and of PyTorch; nothing else reaches in there."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from itarflow.inverse.solvers import Affine, Conditioner, Progress, Solver
from itarflow.runtime.recording import release_recordings


@contextmanager
def told() -> Iterator[list[str]]:
    """Within, the list grows by all warnings, and by what the kernels have found out about themselves."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("itarflow.runtime.kernels"), Kept(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = lambda message, *_, **__: lines.append(str(message))
            yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


KERNEL_LEFT_OUT = "the kernel of "
"""So begin warnings of a kernel that deviates, or that can't be built."""


@contextmanager
def recordings_counted() -> Iterator[list[float]]:
    """Within, the list grows by the seconds of each CUDA graph that is recorded, of its last pass."""
    seconds: list[float] = []
    enter, leave = torch.cuda.graph.__enter__, torch.cuda.graph.__exit__
    began = [0.0]

    def entered(self: Any) -> Any:
        began[0] = time.perf_counter()
        return enter(self)

    def left(self: Any, *exception: Any) -> Any:
        try:
            return leave(self, *exception)
        finally:
            seconds.append(time.perf_counter() - began[0])

    with _patched(entered, left):
        yield seconds


@contextmanager
def without_recordings() -> Iterator[None]:
    """Within, nothing can be recorded, so that kernels are launched one by one."""

    def refused(self: Any) -> Any:  # noqa: ARG001
        raise RuntimeError("recording is off, to compare")

    release_recordings()
    try:
        with _patched(refused, torch.cuda.graph.__exit__):
            yield
    finally:
        release_recordings()  # of what was not recorded, too


@contextmanager
def _patched(enter: Callable[..., Any], leave: Callable[..., Any]) -> Iterator[None]:
    before = torch.cuda.graph.__enter__, torch.cuda.graph.__exit__
    torch.cuda.graph.__enter__, torch.cuda.graph.__exit__ = enter, leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.cuda.graph.__enter__, torch.cuda.graph.__exit__ = before  # type: ignore[method-assign]


class Counting:
    """A solver that counts its evaluations of the blocks."""

    def __init__(self, solver: Solver) -> None:
        self._solver, self.evaluations = solver, 0

    def __call__(
        self,
        conditioner: Conditioner,
        z: Tensor,
        first: Affine,
        progress: Progress | None = None,
        guess: Tensor | None = None,
    ) -> Tensor:
        """See `Solver`."""
        return self._solver(_Counted(conditioner, self), z, first, progress, guess)


class _Counted:
    def __init__(self, conditioner: Conditioner, counter: Counting) -> None:
        self._conditioner, self._counter = conditioner, counter

    def __call__(self, tokens: Tensor, *where: Any, **more: Any) -> Affine:
        self._counter.evaluations += 1
        return self._conditioner(tokens, *where, **more)

    def select(self, samples: Tensor) -> _Counted:
        return _Counted(self._conditioner.select(samples), self._counter)


class Operators(TorchDispatchMode):
    """Collects the names of PyTorch's operators for attention, and of the package's own kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "attention" in name or name.startswith("itarflow"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
