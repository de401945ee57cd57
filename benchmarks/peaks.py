"""What the device at hand does at most: a product of large matrices, and a sum over a large tensor."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from costs import Peak

from itarflow.runtime.kernels import linear

Peaks = Mapping[torch.dtype, Peak]
"""That of each type of numbers."""
LONG_ENOUGH = 0.03
"""Seconds; matrices grow until their product takes so long."""
ATTEMPTS = 10
"""Of which the fastest counts, since a peak is looked for."""
_PAUSE = 5_000_000
"""Cycles of a GPU, some milliseconds, in which the host can launch some calls."""


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; None = the accelerator, or without one the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.ones(1, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {name} can't be used here: {str(error).splitlines()[0]}") from error


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200" or "AMD EPYC"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine()) if device.type == "cpu" else device.type


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measured_peaks(device: torch.device) -> Peaks:
    """In float32 and bfloat16; takes about two seconds."""
    bandwidth = _bytes_per_second(device)
    name = device_name(device)
    return {
        dtype: Peak(name, dtype, _flops_per_second(device, dtype), bandwidth)
        for dtype in (torch.float32, torch.bfloat16)
    }


def device_seconds(function: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """The least seconds of one call, among some; on a GPU as it counts them itself, while `calls` follow one another.

    The host launches them while the device is kept waiting, as if they were in a CUDA graph.
    """
    return min(_seconds(function, device, calls) for _ in range(ATTEMPTS)) / calls


def _seconds(function: Callable[[], object], device: torch.device, calls: int) -> float:
    synchronize(device)
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            if hasattr(torch.cuda, "_sleep"):  # PyTorch's own, for its tests
                torch.cuda._sleep(_PAUSE)
            began.record()
            for _ in range(calls):
                function()
            ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return time.perf_counter() - start


def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    size, seconds = 512, 0.0
    while seconds < LONG_ENOUGH:
        size *= 2
        # Random numbers: a GPU multiplies ones faster, since fewer bits change, and so takes less power.
        x = torch.randn(size, size, device=device, dtype=dtype)
        seconds = device_seconds(lambda x=x: linear(x, x), device)
    return 2 * size**3 / seconds


def _bytes_per_second(device: torch.device) -> float:
    """Of reading, on a GPU 8 GiB at a time."""
    x = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    return x.numel() * x.element_size() / device_seconds(x.sum, device, calls=8 if device.type == "cuda" else 1)
