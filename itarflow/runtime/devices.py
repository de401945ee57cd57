"""The device: which one is used, in which precision, its peak and memory, and batches that fit it."""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


def usable_device(name: str | None) -> str:
    """The device of that name, or the best there is. Where that is the CPU although GPUs were asked for, it is said.

    Raises:
        ValueError: PyTorch can't compute on it.
    """
    if name:
        if (reason := _refusal(name)) is not None:
            raise ValueError(f"--device {name} can't be used: {reason}. Try cpu, or leave --device out.")
        return name
    if torch.cuda.is_available():
        if (reason := _refusal("cuda")) is None:
            return "cuda"
        if "out of memory" in reason:
            raise ValueError(f"the GPU can't be used: {reason}. Other programs may hold its memory; see nvidia-smi.")
        warnings.warn(f"no GPU can be used, so the CPU computes: {reason}.", stacklevel=2)
        return "cpu"
    if torch.backends.mps.is_available():
        return "mps"
    _say_why_no_gpu()
    return "cpu"


def _say_why_no_gpu() -> None:
    """Warn where GPUs were asked for, or the driver is too old, but none is there; not where they are hidden."""
    if not (torch.version.cuda or torch.version.hip):
        return
    reason = _refusal("cuda")
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip() not in ("", "-1")
    if reason is not None and (named or "too old" in reason):
        warnings.warn(f"no GPU can be used, so the CPU computes: {reason}.", stacklevel=3)


def _refusal(name: str) -> str | None:
    """Why PyTorch can't compute on a device, in a sentence without its full stop; None = it can."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", maxsplit=1)[0].rstrip(". ")
    else:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not name.startswith("cuda") or not (torch.version.cuda or torch.version.hip):
        return reason
    count = torch.cuda.device_count()
    there = {0: "there is no GPU", 1: "there is 1 GPU, cuda:0"}
    seen = there.get(count, f"there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    return f"{reason} ({seen}" + (f"; CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ")")


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H100 80GB HBM3", also of a slice of one; of other devices their type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def on_cpu() -> bool:
    """Whether to train on the CPU, which Accelerate must be passed: else it joins no processes there."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return True
    if torch.accelerator.is_available():
        return False
    _say_why_no_gpu()
    return True


def check_own_gpu(state: PartialState) -> None:
    """Refuse a GPU that can't compute, and processes that share one, which NCCL can't. All of a launch call it first.

    Raises:
        ValueError: this process's GPU can't be used, or is another one's.
    """
    if state.device.type != "cuda":
        return
    if (reason := _refusal(str(state.device))) is not None:
        raise ValueError(f"the GPU can't be used: {reason}. With ACCELERATE_USE_CPU=true the CPU computes.")
    if not dist.is_initialized() or dist.get_backend() == "gloo":
        return
    gpu, own = torch.cuda.get_device_properties(state.device).uuid, str(state.process_index)
    store = dist.distributed_c10d._get_default_store()
    owner = store.compare_set(f"itarflow gpu {gpu}", "", own).decode()
    if owner != own:
        raise ValueError(
            f"processes {owner} and {own} would share one GPU, {device_name(state.device)}, but each needs its own: "
            f"start as many processes on a machine as it has GPUs, {torch.cuda.device_count()} here, by `accelerate "
            "launch` or torchrun, and let each see all of them."
        )


Precision = Literal["float32", "bf16"]
"""Names of the dtypes of sampling, on the command line."""


def asked_dtype(precision: Precision | None, *, exact: bool = False) -> torch.dtype | None:
    """The dtype of that name; None = `sampling_dtype` decides, unless the result is to be exact: then float32.

    Raises:
        ValueError: the result is to be exact, and the precision is not float32.
    """
    if exact and precision not in (None, "float32"):
        raise ValueError(f"--exact inverts in float32, but --inverse-dtype is {precision}; leave one of them out.")
    if precision is None:
        return torch.float32 if exact else None
    return {"float32": torch.float32, "bf16": torch.bfloat16}[precision]


def sampling_dtype(device: torch.device, weights: torch.dtype = torch.float32) -> torch.dtype | None:
    """The precision of a flow's layers in sampling where none is asked for; None = that of the weights.

    bfloat16 on GPUs that multiply it at full speed, where it takes half of the time and memory or less.
    """
    if weights != torch.float32 or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else None


@contextmanager
def tf32_products(allowed: bool = True) -> Iterator[None]:
    """Inside, products of float32 matrices and convolutions may be TF32 on a GPU, or may not.

    Afterwards all settings are as before, by whichever of torch's interfaces they were made: the old one, or that of
    torch >= 2.9. Inside both agree, because torch.compile reads the old one, which raises where they don't.
    """
    with _without_advice():
        found = _TF32Settings.read()
    try:
        with _without_advice():
            _set_old("high" if allowed else "highest", allowed)
            for operation, _ in _operations():  # the old interface leaves some to what a user has set for the backend
                operation.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        with _without_advice():
            found.restore()


@dataclass(frozen=True)
class _TF32Settings:
    """Of all that `_set_old` changes."""

    products: str
    convolutions: bool
    by_operation: tuple[str, ...]
    """Of torch >= 2.9, of `_operations`; "none" = that of the backend."""

    @classmethod
    def read(cls) -> _TF32Settings:
        by_operation = tuple(
            "none" if operation.fp32_precision == backend.fp32_precision else operation.fp32_precision
            for operation, backend in _operations()
        )
        # These raise where a user has set the new interface; then nobody can read them, and they have no effect.
        products, convolutions = "highest", True
        with suppress(RuntimeError):
            products = torch.get_float32_matmul_precision()
        with suppress(RuntimeError):
            convolutions = torch.backends.cudnn.allow_tf32
        return cls(products, convolutions, by_operation)

    def restore(self) -> None:
        _set_old(self.products, self.convolutions)
        for (operation, _), precision in zip(_operations(), self.by_operation, strict=True):
            operation.fp32_precision = precision


def _operations() -> tuple[tuple[Any, Any], ...]:
    """Operations with a setting of their own in torch >= 2.9, and the backends whose setting is their default."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return ()
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    return (
        (torch.backends.cuda.matmul, cudnn),  # whose setting is that of all CUDA
        (cudnn.conv, cudnn),
        (cudnn.rnn, cudnn),
        (mkldnn.matmul, mkldnn),
    )


def _set_old(products: str, convolutions: bool) -> None:
    """By the old interface, which sets most of the new one, too."""
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _without_advice() -> Iterator[None]:
    """Inside, torch does not advise against the old interface. It does so once, and so does this.

    To touch the filters of warnings makes those return that are shown once: in a training, at each step.
    """
    if _ADVISED:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Please use the new API", category=UserWarning)
        yield
    _ADVISED.append(True)


_ADVISED: list[bool] = []


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
    """Bytes that further tensors may take: what is free, and what PyTorch holds without need; None = not known.

    Of a GPU, or a slice of one, without what other programs take. On a CPU with the free swap space, and not beyond
    the limit of the container.
    """
    if device.type == "cuda":
        try:
            free, _ = torch.cuda.mem_get_info(device)
        except (RuntimeError, AssertionError):  # some drivers can't say
            return None
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such limit
        return free
    return min(free, limit)


_NO_MEMORY = (
    "out of memory",  # of CUDA, its driver, NCCL, cuDNN, MPS, ROCm
    "alloc_failed",  # of cuBLAS and its relatives
    "allocation_failed",  # of cuDNN 9
    "t allocate memory",  # can't or cannot: of the CPU's allocator, and of the system
    "not enough memory",  # of the CPU's allocator on Windows
    "std::bad_alloc",
)
"""What errors say, in small letters."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory ran out, of a GPU or of the system."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    said = str(error).lower()
    return any(words in said for words in _NO_MEMORY) or should_reduce_batch_size(error)


def memory_gib(device: torch.device) -> float:
    """Peak memory of PyTorch on a GPU; elsewhere the resident memory of the process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


Part = TypeVar("Part")


def in_batches(make: Callable[[slice], Part], count: int, size: int, what: str, option: str) -> tuple[list[Part], int]:
    """make(part) for parts of 0 .. count - 1 in order, of at most `size` each, or fewer if memory runs out.

    What was recorded for speed is given back first, and the same size tried once more.

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
        MemoryError: not even one fits.
    """
    from itarflow.runtime.recording import release_recordings  # which needs this module

    made: list[Part] = []
    start, size = 0, min(size, max(count, 1))
    tried_again = 0
    while start < count or not made:
        tried = min(size, count - start)
        try:
            made.append(make(slice(start, start + tried)))
            start += tried
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            again = release_recordings() and tried != tried_again
            if tried <= 1 and not again:
                raise
        # Outside the handler, which keeps the tensors of the failed attempt alive.
        clear_device_cache(garbage_collection=True)
        if again:
            tried_again = tried
            continue
        warnings.warn(
            f"{what} {tried} images at a time does not fit the memory; going on with {tried // 2}. To choose it "
            f"yourself: {option}.",
            stacklevel=3,
        )
        size = tried // 2
    return made, size
