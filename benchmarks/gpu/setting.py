"""What a step is given: the device, the time that it has, models of random weights; and how it measures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from costs import Peak
from peaks import Peaks, measured_peaks, synchronize
from subject import randomised
from timing import release
from torch import Tensor

from gpu.figures import Figure, missing_package, reason
from itarflow.flow import TARFlow
from itarflow.inverse import Guidance
from itarflow.presets import ModelConfig, itarflow_model

NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float64: "float64"}
GUIDANCE = Guidance(weight=1.5, blocks=1)
LEVELS = (0.01, 0.3)
"""Noise levels of the flows."""

TINY = ModelConfig(image_size=8, channels=64, num_layers=(1, 2), num_classes=10, patch_size=2)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Of one step; plain values, which travel to another process."""

    dry: bool
    """On a CPU, with tiny sizes."""
    out: Path
    peer: Path | None
    data: Path | None
    features: Path | None
    minutes: float
    until: float
    """The end of the step, of `time.monotonic()`."""

    def __post_init__(self) -> None:
        if not self.dry and (missing := no_gpu()) is not None:
            raise ValueError(missing)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device("cpu") if self.dry else torch.device("cuda", 0)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.until - time.monotonic()

    @cached_property
    def peaks(self) -> Peaks:
        """Of the device; takes two seconds."""
        if self.dry:
            return {dtype: Peak("no device", dtype, 1e11, 1e10) for dtype in (torch.float32, torch.bfloat16)}
        return measured_peaks(self.device)

    @property
    def model(self) -> ModelConfig:
        """ITARFlow S for 64 pixels."""
        if not self.dry:
            return itarflow_model("S", 64)
        return TINY

    def flow(self, model: ModelConfig | None = None) -> TARFlow:
        """A model with random weights that are no identity, for use without gradients; None = `model`."""
        torch.manual_seed(0)
        with self.device:
            flow = (model or self.model).build(LEVELS)
        return randomised(flow).eval().requires_grad_(False)

    def noise(self, flow: TARFlow, images: int) -> Tensor:
        """z (B, N, D), as a prior gives it."""
        drawn = torch.randn(images, *flow.z_shape, generator=torch.Generator().manual_seed(images))
        return drawn.to(self.device)

    def images(self, flow: TARFlow, images: int) -> Tensor:
        """(B, C, H, W), noisy."""
        drawn = torch.randn(images, *flow.image_shape, generator=torch.Generator().manual_seed(images))
        return drawn.to(self.device)

    def labels(self, flow: TARFlow, images: int) -> Tensor | None:
        """(B,), one class after another; None without classes."""
        classes = flow.config.num_classes
        return torch.arange(images, device=self.device) % classes if classes else None

    def timed(self, blank: Figure, function: Callable[[], object], repeats: int = 3) -> Figure:
        """The figure with seconds and memory of a function: its first call, then as many as there is time for."""
        release(self.device)
        before = self._allocated(forget=True)
        first = self.seconds(function)
        peak = self._allocated() - before if before is not None else None  # type: ignore[operator]
        others: list[float] = []
        repeats = 1 if self.dry else repeats
        while len(others) < repeats and self.left > (others[-1] if others else first):
            others.append(self.seconds(function))
        more = dict(blank.more) if others else {**blank.more, "its first call": "is its only one"}
        steady = statistics.median(others or [first])
        return replace(blank, seconds=steady, first_seconds=first, peak_bytes=peak, more=more)

    def seconds(self, function: Callable[[], object]) -> float:
        """Of one call."""
        synchronize(self.device)
        began = time.perf_counter()
        function()
        synchronize(self.device)
        return time.perf_counter() - began

    def _allocated(self, forget: bool = False) -> int | None:
        """Bytes: those now, from which the peak begins anew; or those at the peak. None = not known here."""
        if self.device.type != "cuda":
            return None
        if forget:
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def no_gpu() -> str | None:
    """What is said where there is none; None = there is one."""
    if torch.cuda.is_available():
        return None
    return f"PyTorch {torch.__version__} sees no GPU here; --dry runs on the CPU, with tiny sizes."


def tried(blank: Figure, measure: Callable[[Figure], Figure]) -> Figure:
    """What `measure` makes of a figure, or the figure with the reason why it could not."""
    try:
        return measure(blank)
    except Exception as error:  # of the libraries, of memory, of us: the next case is measured all the same
        missing = missing_package(error)
        return replace(blank, failed=reason(error)) if missing is None else replace(blank, left_out=missing)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, of all values together."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
