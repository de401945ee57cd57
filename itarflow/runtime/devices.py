"""The device: which one is used, its peak and memory, and batches that are halved if its memory runs out."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import psutil
import torch
from accelerate.utils import parse_flag_from_env
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


def usable_device(name: str | None) -> str:
    """The device of that name, or the best there is.

    Raises:
        ValueError: PyTorch can't compute on it.
    """
    if not name:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(f"--device {name} can't be used: {reason}. Try cpu, or leave --device out.") from error
    return name


def on_cpu() -> bool:
    """Whether to train on the CPU, which Accelerate must be passed: else it joins no processes there."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


@contextmanager
def tf32_products(allowed: bool = True) -> Iterator[None]:
    """Inside, products of float32 matrices may be TF32 on a GPU, or may not. Afterwards the setting is restored."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:  # later work of the process, such as evaluations, is float32 as before
        torch.set_float32_matmul_precision(precision)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Products = Literal["bf16", "TF32", "float32"]
"""Precision in which a GPU multiplies matrices."""

# Dense peaks in TFLOP/s, as NVIDIA's data sheets give them without sparsity: of the tensor cores, and in float32.
PEAK_TFLOPS: dict[str, dict[Products, float]] = {
    "B200": {"bf16": 2250, "TF32": 1125, "float32": 75},
    "H200": {"bf16": 989, "TF32": 494, "float32": 67},
    "H100 PCIe": {"bf16": 756, "TF32": 378, "float32": 51},
    "H100 NVL": {"bf16": 835, "TF32": 417, "float32": 60},
    "H100": {"bf16": 989, "TF32": 494, "float32": 67},
    "A100": {"bf16": 312, "TF32": 156, "float32": 19.5},
    "L40S": {"bf16": 362, "TF32": 183, "float32": 91.6},
    "L4": {"bf16": 121, "TF32": 60, "float32": 30.3},
    "A10": {"bf16": 125, "TF32": 62, "float32": 31.2},
    "RTX 4090": {"bf16": 165, "TF32": 83, "float32": 82.6},
    "RTX 3090": {"bf16": 71, "TF32": 36, "float32": 35.6},
}


def peak_tflops(device: torch.device, products: Products) -> float | None:
    """The device's peak for matrix products in the precision of the training; None = not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = (peaks for key, peaks in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name))
    peaks = next(found, None)
    return None if peaks is None else peaks[products]


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Inside, cuDNN tries which of its algorithms is fastest for each shape of a convolution that it meets."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def usable_memory(device: torch.device) -> int | None:
    """Bytes that tensors may take on a device at most: all of a GPU, what is free on a CPU; None = not known.

    On a CPU with the free swap space, and not beyond the limit of the container.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such limit
        return free
    return min(free, limit)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory ran out, of a GPU or of the system."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def memory_gib(device: torch.device) -> float:
    """Peak memory of PyTorch on a GPU; elsewhere the resident memory of the process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


Part = TypeVar("Part")


def in_batches(make: Callable[[slice], Part], count: int, size: int, what: str, option: str) -> tuple[list[Part], int]:
    """make(part) for parts of 0 .. count - 1 in order, of at most `size` each, or fewer if memory runs out.

    Args:
        make: makes a part; called again for a smaller one if it runs out of memory.
        count: how many there are; with 0 it is called once, with an empty part.
        size: >= 1.
        what: is made, for the warning: "the score of".
        option: that sets the size, for the warning.

    Returns:
        What was made, and the size that fitted.

    Raises:
        RuntimeError: of `make`, if it is of another kind, or not even one fits.
    """
    made: list[Part] = []
    start, size = 0, min(size, max(count, 1))
    while start < count or not made:
        tried = min(size, count - start)
        try:
            made.append(make(slice(start, start + tried)))
            start += tried
            continue
        except RuntimeError as error:
            if tried <= 1 or not should_reduce_batch_size(error):
                raise
        # Outside the handler, which keeps the tensors of the failed attempt alive.
        clear_device_cache(garbage_collection=True)
        warnings.warn(
            f"{what} {tried} images at a time does not fit the memory; going on with {tried // 2}. To choose it "
            f"yourself: {option}.",
            stacklevel=3,
        )
        size = tried // 2
    return made, size
