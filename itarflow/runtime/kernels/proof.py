"""Whether a Triton kernel may be used on a device: there it is compared with PyTorch's functions first, and timed.

A kernel that deviates, that can't be built or launched, or that is clearly slower than PyTorch's functions is left out
for the rest of the process. So no kernel is trusted that has not been seen to be right on that very device.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from itarflow.runtime.kernels import cpu

DEVICES = {"cuda"}
"""Kinds of devices that have kernels; tests add CPUs, by Triton's interpreter."""
_OLDEST = (8, 0)
"""Compute capability from which on there are products and asynchronous copies of the kinds that the kernels use."""
_LIMITS = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-4}
"""How far a number may be from the exact one, as a part of the root mean square of its row."""
_SLOWEST = 1.25
"""Of the time of PyTorch's functions. A choice between equals would fall by chance, and they round differently: the
same seed is to give the same image in each process."""
_CALLS, _REPEATS = 20, 5
_PAUSE, _LONGEST_PAUSE = 5_000_000, 200_000_000
"""Cycles of a GPU, 2 to 4 ms at first, in which the host can launch all calls of a timing."""
_VERDICTS: dict[Hashable, bool] = {}
_WARNED: set[str] = set()
_LOCK = threading.RLock()
_OFF = threading.local()
_LIBRARY = torch.library.Library("itarflow", "FRAGMENT")


class Trial(NamedTuple):
    """A kernel and PyTorch's functions, on the same inputs."""

    cases: Iterable[tuple[str, Tensor, Tensor]]
    """What was asked, what the kernel found, and the exact result in float64; rows lie along the last dimension."""
    kernel: Callable[[int], object]
    """One call of many that are timed; the number may choose among inputs, which then don't lie in caches."""
    plain: Callable[[int], object]


def is_proven(name: str, device: torch.device, key: tuple[Hashable, ...], prepare: Callable[[], Trial]) -> bool:
    """Whether a kernel is right and fast on a device; tried at the first question, if it can be tried then.

    Args:
        name: of the kernel, for warnings.
        device: where it would run.
        key: the variant: the dtype first, and sizes.
        prepare: makes the trial.
    """
    if cpu.PLAIN or getattr(_OFF, "here", False):
        return False
    verdict = _VERDICTS.get((name, device, key))
    if verdict is not None:
        return verdict
    if not _can_try(device):
        return False
    with _LOCK:
        if (name, device, key) not in _VERDICTS:
            _VERDICTS[name, device, key] = _try(name, device, key, prepare)
        return _VERDICTS[name, device, key]


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within, this thread takes PyTorch's functions, and tries no kernel."""
    before = getattr(_OFF, "here", False)
    _OFF.here = True
    try:
        yield
    finally:
        _OFF.here = before


@cache
def triton_kernels() -> Any:
    """The module of the kernels, which imports Triton."""
    return importlib.import_module("itarflow.runtime.kernels.triton_kernels")


def register(schema: str, fake: Callable[..., Tensor]) -> None:
    """Make a function of `triton_kernels` an operator of PyTorch, so that modes and compilers see it.

    Args:
        schema: of the operator; it has no gradient.
        fake: gives an empty result of the right shape and dtype.
    """
    name = schema.split("(")[0]

    def launch(*given: Any) -> Tensor:
        with torch.cuda.device_of(given[0]):  # Triton launches on the current device
            return getattr(triton_kernels(), name)(*given)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"itarflow::{name}", fake, lib=_LIBRARY)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere those of a large one."""
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 132


def uncached_copies(device: torch.device, size: int) -> int:
    """How many inputs of so many bytes a timing takes in turns, so that each is read from memory as in use."""
    cached = 2**26
    if device.type == "cuda" and torch.cuda.is_available():
        cached = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", cached)
    return max(1, min(_CALLS, 2 * cached // size))


def _can_try(device: torch.device) -> bool:
    if device.type not in DEVICES or torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return False
    return _has_triton() and (device.type != "cuda" or _can_try_cuda(device))


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _can_try_cuda(device: torch.device) -> bool:
    if not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.is_current_stream_capturing():
        return False
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < _OLDEST:
        _warn(
            f"{properties.name} is older than this package's kernels (compute capability "
            f"{properties.major}.{properties.minor}, not 8.0 or newer): PyTorch's own functions are used."
        )
        return False
    return True


def _try(name: str, device: torch.device, key: tuple[Hashable, ...], prepare: Callable[[], Trial]) -> bool:
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with on_device, torch.no_grad(), torch.autocast(device.type, enabled=False):
            trial = prepare()
            for asked, found, exact in trial.cases:
                deviation = _deviation(found, exact)
                if not deviation <= _LIMITS[key[0]]:  # type: ignore[index]  # the dtype; not so for NaN
                    _give_up(name, device, f"with {asked} a number is off by {deviation:.2g} of the rms")
                    return False
            own, plain = _milliseconds(trial.kernel), _milliseconds(trial.plain)
    except Exception as error:  # of Triton, of the compiler that it calls, of the driver
        from itarflow.runtime.devices import is_out_of_memory  # which takes long to import

        if is_out_of_memory(error):  # who asked may have some to give back, and ask again
            raise
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        _give_up(name, device, f"it can't be built or run ({type(error).__name__}: {reason})")
        return False
    logging.getLogger(__name__).info("%s %s: %.4f ms, PyTorch's functions %.4f ms", name, key, own, plain)
    return own <= _SLOWEST * plain


def _deviation(found: Tensor, exact: Tensor) -> float:
    scale = exact.square().mean(dim=-1, keepdim=True).sqrt()  # of a row
    return float(((found.double() - exact).abs() / scale).max())


def _milliseconds(call: Callable[[int], object]) -> float:
    """What the device needs for a call, when launches wait for nothing, as in a CUDA graph."""
    times: list[float] = []
    pause = _PAUSE
    while len(times) <= _REPEATS:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(pause)
        began.record()
        for turn in range(_CALLS):
            call(turn)
        too_short = began.query() and pause < _LONGEST_PAUSE  # the device has begun before the host was done
        ended.record()
        ended.synchronize()
        pause *= 2 if too_short else 1
        times += [] if too_short else [began.elapsed_time(ended) / _CALLS]
    return sorted(times[1:])[_REPEATS // 2]


def _give_up(name: str, device: torch.device, reason: str) -> None:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    triton = importlib.import_module("triton").__version__
    _warn(
        f"the kernel of {name} is not used: {reason}. PyTorch's own functions are: results are right, and slower. "
        f"Please report this line to itarflow's authors ({gpu}, torch {torch.__version__}, triton {triton}). "
        "ITARFLOW_PLAIN_KERNELS=1 in the environment turns all such kernels off.",
        once=reason,
    )


def _warn(message: str, once: str | None = None) -> None:
    if (once or message) not in _WARNED:
        _WARNED.add(once or message)
        warnings.warn(message, stacklevel=2)
