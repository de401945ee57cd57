"""Ways of doing the same, timed in turns within one run, so that what else the machine does meets all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from peaks import Peaks, synchronize
from resident import STATUS, forget_peak, one_step_of_a_tiny_model, peak_resident
from torch import Tensor

from itarflow.runtime.devices import is_out_of_memory

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


@dataclass(frozen=True)
class Failure:
    """In place of a timing, or of memory: why there is none."""

    reason: str

    @staticmethod
    def of(error: Exception) -> Failure:
        """Type and first line."""
        return Failure(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


class _Turns:
    """One variant's calls, so far."""

    def __init__(self, variant: Variant) -> None:
        self.run = variant.prepare()
        self.seconds: list[float] = []
        self.result: Tensor | None = None

    def take(self, device: torch.device, timed: bool) -> None:
        """One more call."""
        synchronize(device)
        began = time.perf_counter()
        result = self.run()
        synchronize(device)
        if timed:
            self.seconds.append(time.perf_counter() - began)
        if self.result is None:
            self.result = result.detach().float().cpu()

    def timing(self) -> Timing:
        """What came of it."""
        assert self.result is not None
        return Timing(tuple(self.seconds), self.result)


def timed_in_turns(
    variants: Sequence[Variant], repeats: int, warm_up: int, device: torch.device, until: float = math.inf
) -> list[Timing | Failure]:
    """First a, b, ..., warm_up times and not timed; then a, b, a, b, ..., so that each has `repeats` times >= 1.

    Where they don't fit into memory together, each has its turns alone. One that fails takes no other's figures.

    Args:
        variants: a, b, ...
        repeats: see above.
        warm_up: see above.
        device: where they run.
        until: of `time.monotonic()`, after which each has one time more at most: the one it must have.
    """
    try:
        return _in_turns(variants, repeats, warm_up, device, until)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release(device)  # outside the handler, which keeps what the models took
    return [one for variant in variants for one in _in_turns([variant], repeats, warm_up, device, until)]


def _in_turns(
    variants: Sequence[Variant], repeats: int, warm_up: int, device: torch.device, until: float
) -> list[Timing | Failure]:
    """As above; raises if memory runs out while there are several."""
    begun: dict[int, _Turns] = {}
    failed: dict[int, Failure] = {}

    @contextmanager
    def alone(index: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if len(variants) > 1 and is_out_of_memory(error):
                raise
            failed[index] = Failure.of(error)
            begun.pop(index, None)

    for index, variant in enumerate(variants):
        with alone(index):
            begun[index] = _Turns(variant)
    for turn in range(warm_up + repeats):
        if turn > warm_up and time.monotonic() > until:
            break
        for index, turns in list(begun.items()):
            with alone(index):
                turns.take(device, timed=turn >= warm_up)
    return [failed[index] if index in failed else begun[index].timing() for index in range(len(variants))]


def release(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
