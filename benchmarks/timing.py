"""Ways of doing the same, timed in turns within one run, so that what else the machine does meets all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from peaks import Peaks, synchronize
from resident import STATUS, forget_peak, one_step_of_a_tiny_model, peak_resident
from torch import Tensor

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Variant:
    """A way of doing something."""

    name: str
    dtype: str
    """Precision of the transformers, as people call it."""
    prepare: Callable[[], Run]
    """Sets up what is not timed, and returns what is: a function whose results are comparable between variants."""
    floor: Callable[[Peaks], float]
    """The least seconds, by the peaks of a device."""


@dataclass(frozen=True)
class Case:
    """What several variants do."""

    name: str
    variants: Sequence[Variant]


@dataclass(frozen=True)
class Timing:
    """Of one variant."""

    seconds: tuple[float, ...]
    """Of each repetition."""
    result: Tensor
    """Of the very first call: a training step changes what comes after it."""


def timed_in_turns(variants: Sequence[Variant], repeats: int, warm_up: int, device: torch.device) -> list[Timing]:
    """First a, b, ..., warm_up times and not timed; then a, b, a, b, ..., so that each has `repeats` times >= 1."""
    runs = [variant.prepare() for variant in variants]
    seconds: list[list[float]] = [[] for _ in runs]
    results: list[Tensor] = []
    for turn in range(warm_up + repeats):
        for run, times in zip(runs, seconds, strict=True):
            synchronize(device)
            began = time.perf_counter()
            result = run()
            synchronize(device)
            if turn >= warm_up:
                times.append(time.perf_counter() - began)
            if len(results) < len(runs):
                results.append(result.detach().float().cpu())
    return [Timing(tuple(times), result) for times, result in zip(seconds, results, strict=True)]


def working_memory(variant: Variant, device: torch.device) -> int | None:
    """Bytes at the peak of two calls, beyond what lay there before: weights and inputs do not count.

    On a GPU it is what PyTorch has allocated; on a CPU the growth of the resident memory, which only means something
    in a fresh process. None where neither can be read.
    """
    if device.type != "cuda" and not STATUS.exists():
        return None
    one_step_of_a_tiny_model(device)
    run = variant.prepare()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        forget_peak()
        before = psutil.Process().memory_info().rss
    for _ in range(2):  # what an optimiser keeps is there from the second on
        run()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()) - before
