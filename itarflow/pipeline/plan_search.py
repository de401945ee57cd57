"""Profile the inverse of a flow, and search the fastest solver of each block, on this device.

CRM and IGM are those of arXiv 2505.12849: how hard a block is for the Jacobi iteration, and how good a first guess is.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from itarflow.flow.block import AutoregressiveBlock, Condition
from itarflow.flow.tarflow import TARFlow
from itarflow.inverse.guidance import Affine
from itarflow.inverse.solvers import Conditioner, Guess, Jacobi, Progress, sequential
from itarflow.pipeline.plan import InversePlan, place_of, tokens_of_blocks
from itarflow.runtime.graphed import DeviceConditioner
from itarflow.runtime.recording import release_recordings

TOLERANCES = (1e-2, 5e-3, 2e-3, 1e-3, 1e-4, 1e-5, 0.0)
"""Of the solvers; tried in this order until the images are close enough."""
_WORTHWHILE = 0.95
"""A solver must take less than this part of the sequential one's time to be chosen in its place."""
_ROUNDING = 1e-3
"""Difference of pixels that solvers without tolerance may have: products of other shapes round differently."""


@dataclass(frozen=True)
class BlockMetrics:
    """The published metrics of a block; lower = easier. Norms are spectral, of (N, D) matrices or weights."""

    crm: float
    """Convergence ranking metric: |mean of exp(-log_scale) * x| * |W_s| + |W_u|, where W_s and W_u are the rows of
    the output layer that give log-scale and shift, and the mean is over images."""
    igm: dict[Guess, float]
    """Initial guessing metric of each guess: |mean of x1 - x|, where x1 is one Jacobi iteration from the guess."""


@torch.no_grad()
def block_metrics(
    flow: TARFlow,
    noisy: Tensor,
    labels: Tensor | None,
    noise_level: Tensor | float | None,
    context: Tensor | None = None,
) -> list[BlockMetrics]:
    """CRM and IGM of each block, noise side first, without guidance; arguments as `TARFlow.forward`."""
    found: list[BlockMetrics] = []

    def look(block: torch.nn.Module, given: tuple[Tensor, Condition]) -> None:
        assert isinstance(block, AutoregressiveBlock)
        found.append(_metrics_of(block, *given))

    hooks = [block.register_forward_pre_hook(look) for block in flow.blocks]
    try:
        flow(noisy, labels, noise_level, context)
    finally:
        for hook in hooks:
            hook.remove()
    return found[::-1]


def _metrics_of(block: AutoregressiveBlock, x: Tensor, condition: Condition) -> BlockMetrics:
    x = x.flip(1) if block.reverse else x
    shift, log_scale = _maps(block, x, condition)
    z = (x - shift) * (-log_scale).exp()
    igm: dict[Guess, float] = {}
    for guess in get_args(Guess):
        begin = z if guess == "z" else torch.zeros_like(z)
        begin = torch.cat([x[:, :1], begin[:, 1:]], dim=1)  # the first token is known
        shift_1, log_scale_1 = _maps(block, begin, condition)
        igm[guess] = _norm((z * log_scale_1.exp() + shift_1 - x).mean(dim=0))
    weight = block.proj_out.weight
    of_shift, of_scale = (weight, 0.0) if block.volume_preserving else (weight.chunk(2)[1], _norm(weight.chunk(2)[0]))
    return BlockMetrics(_norm(((-log_scale).exp() * x).mean(dim=0)) * of_scale + _norm(of_shift), igm)


def _maps(block: AutoregressiveBlock, x: Tensor, condition: Condition) -> Affine:
    """(shift, log_scale) of all tokens."""
    maps = [block.first_affine(condition)]
    if x.shape[1] > 1:
        maps.append(block.affine_at(x[:, :-1], condition))
    shifts, log_scales = zip(*maps, strict=True)
    return torch.cat(shifts, dim=1), torch.cat(log_scales, dim=1)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.float(), ord=2))


@dataclass(frozen=True)
class Timing:
    """The measurement of a solver on a block."""

    solver: Jacobi
    """A window of 1 is `sequential`."""
    seconds: float
    """Median; infinite if it was stopped, because `sequential` had been faster by then."""
    evaluations: int
    """Of the conditioner, until it had converged or was stopped."""
    difference: float
    """Largest difference from `sequential`, in the units of the block; not a number if it was stopped."""

    @property
    def finished(self) -> bool:
        """Whether it was not stopped."""
        return math.isfinite(self.seconds)


@dataclass(frozen=True)
class BlockProfile:
    """All measurements of a block."""

    timings: tuple[Timing, ...]
    """`sequential` first, then whole-sequence Jacobi from each guess, then windows with the better of the guesses."""

    @property
    def sequential(self) -> Timing:
        """The exact one."""
        return self.timings[0]

    @property
    def fastest(self) -> Timing:
        """The one to use."""
        best = min(self.timings, key=lambda timing: timing.seconds)
        return best if best.seconds < _WORTHWHILE * self.sequential.seconds else self.sequential

    def whole(self, guess: Guess) -> Timing | None:
        """Whole-sequence Jacobi; None for a block of a single token."""
        found = (t for t in self.timings if t.solver.window is None and t.solver.guess == guess)
        return next(found, None)


class _StoppedError(Exception):
    pass


@dataclass
class _Counted:
    """A conditioner that counts evaluations, and stops at a deadline."""

    conditioner: Conditioner
    deadline: float
    evaluations: list[int]

    def __call__(self, tokens: Tensor, start: int | Tensor, stop: int | None = None) -> Affine:
        self.count()
        return self.conditioner(tokens, start, stop)

    def count(self) -> None:
        if time.perf_counter() > self.deadline:
            raise _StoppedError
        self.evaluations[0] += 1

    def select(self, samples: Tensor) -> _Counted:
        return _counted(self.conditioner.select(samples), self.deadline, self.evaluations)


@dataclass
class _CountedOnDevice(_Counted):
    """The same of a conditioner that runs loops itself."""

    conditioner: DeviceConditioner

    def sequential(self, z: Tensor, first: Affine, progress: Progress | None) -> Tensor:
        self.evaluations[0] += z.shape[1] - 1
        return self.conditioner.sequential(z, first, progress)

    def iterate(
        self, step: Callable[..., tuple[Tensor, ...]], key: Hashable, count: int, stop: int, *state: Tensor
    ) -> tuple[Tensor, ...]:
        self.count()
        return self.conditioner.iterate(step, key, count, stop, *state)


def _counted(conditioner: Conditioner, deadline: float, evaluations: list[int]) -> _Counted:
    if isinstance(conditioner, DeviceConditioner):
        return _CountedOnDevice(conditioner, deadline, evaluations)
    return _Counted(conditioner, deadline, evaluations)


@dataclass(frozen=True)
class _Trial:
    """A solver that solves a block by `sequential`, and times all others on it."""

    tolerance: float
    windows: Sequence[int]
    repeats: int
    report: Callable[[BlockProfile], None]

    def __call__(
        self,
        conditioner: Conditioner,
        z: Tensor,
        first: Affine,
        progress: Progress | None = None,
        guess: Tensor | None = None,  # noqa: ARG002, which profiles do not use
    ) -> Tensor:
        exact = sequential(conditioner, z, first)  # a warm-up: the first use of a block is slow

        def timed(solver: Jacobi, limit: float) -> Timing:
            return _timed(solver, conditioner, z, first, exact, limit, self.repeats)

        timings = [timed(Jacobi(window=1), math.inf)]
        limit = timings[0].seconds
        if z.shape[1] > 1:
            whole = [timed(Jacobi(tolerance=self.tolerance, guess=guess), limit) for guess in get_args(Guess)]
            timings += whole
            better = min(whole, key=lambda timing: (not timing.finished, timing.evaluations)).solver
            windows = [window for window in self.windows if 1 < window < z.shape[1]]
            timings += [timed(replace(better, window=window), limit) for window in windows]
        self.report(BlockProfile(tuple(timings)))
        if progress is not None:
            progress(z.shape[1])
        return exact


def _timed(
    solver: Jacobi, conditioner: Conditioner, z: Tensor, first: Affine, exact: Tensor, limit: float, repeats: int
) -> Timing:
    solve = sequential if solver.window == 1 else solver
    seconds, evaluations, difference = [], [0], math.nan
    warm_up = int(z.device.type == "cuda")  # when graphs are recorded; not timed
    for turn in range(warm_up + repeats):
        _wait(z.device)
        began, evaluations = time.perf_counter(), [0]
        deadline = began + (limit if turn >= warm_up else 3 * limit)
        try:
            x = solve(_counted(conditioner, deadline, evaluations), z, first)
            _wait(z.device)
        except _StoppedError:
            return Timing(solver, math.inf, evaluations[0], math.nan)
        seconds.append(time.perf_counter() - began)
        difference = float((x - exact).abs().max())
    return Timing(solver, statistics.median(seconds[warm_up:]), evaluations[0], difference)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class FoundPlan:
    """The result of `find_plan`."""

    blocks: tuple[BlockProfile, ...]
    """Noise side first."""
    plan: InversePlan
    """The fastest whose images are close enough to the exact ones; `sequential` for all blocks if none is."""


def check_search(largest_difference: float, windows: Sequence[int], repeats: int) -> None:
    """Refuse settings of `find_plan`.

    Raises:
        ValueError: naming the one that is out of its range.
    """
    if not (math.isfinite(largest_difference) and largest_difference >= 0):
        raise ValueError(f"largest_difference is {largest_difference}; expected a finite number >= 0.")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; expected a number >= 1.")
    if any(window < 2 for window in windows):
        raise ValueError(f"windows are {list(windows)}; expected numbers of tokens >= 2.")


def find_plan(
    flow: TARFlow,
    invert: Callable[..., Tensor],
    images: Callable[..., Iterable[Tensor]],
    *,
    batch_size: int,
    dtype: torch.dtype | None = None,
    largest_difference: float,
    windows: Sequence[int] = (4, 8, 16, 32, 64, 128, 256),
    repeats: int = 3,
    progress: Callable[[str, int], None] = lambda *_: None,
) -> FoundPlan:
    """The fastest solver of each block with which the images stay the same up to `largest_difference`.

    Args:
        flow: the flow.
        invert: invert(solver=..., progress=...), which is timed: `flow.inverse` on a batch, other arguments bound.
        images: images(solver=..., progress=...), an iterator of images (n, C, H, W) in [0, 1] to compare: the more
            there are, the surer the result. It is consumed no further than needed.
        batch_size: images that `invert` inverts.
        dtype: of the transformers' products in `invert` and `images`; None = the weights'.
        largest_difference: of a pixel of an image, >= 0, such as 1 / 255. Half of it is left as a margin for
            images that are not compared.
        windows: to try, besides the whole sequence; those longer than a block are left out.
        repeats: timed runs of each solver on each block, of which the median counts; >= 1.
        progress: called with the name of the stage, and the number of tokens solved since the last call.

    Raises:
        ValueError: a number out of its range, or exact images that are not finite.
    """
    check_search(largest_difference, windows, repeats)
    num_tokens, where = tokens_of_blocks(flow), place_of(flow.device, dtype or flow.dtype)
    expected = list(images(solver=sequential, progress=partial(progress, "exact images")))
    limit = largest_difference / 2
    if not all(part.isfinite().all() for part in expected):
        raise ValueError("the exact images are not finite, so no other solver can be compared; try less guidance.")
    for tolerance in TOLERANCES:
        usual = [Jacobi(window=min(16, count), tolerance=tolerance) for count in num_tokens]
        found = images(solver=usual, progress=partial(progress, f"images of tolerance {tolerance:g}"))
        if tolerance > 0 and not _difference(found, expected, limit) <= limit:
            continue
        blocks = list[BlockProfile]()
        trial = _Trial(tolerance, windows, repeats, blocks.append)
        invert(solver=trial, progress=partial(progress, f"solvers of tolerance {tolerance:g}"))
        release_recordings()  # of all that was tried
        plan = InversePlan(
            solvers=tuple(block.fastest.solver for block in blocks),
            num_tokens=num_tokens,
            batch_size=batch_size,
            **where,
        )
        in_turns = {"exact": sequential, "planned": plan.solvers_of(flow)}
        seconds: dict[str, list[float]] = {name: [] for name in in_turns}
        for _, (name, solver) in itertools.product(range(repeats), in_turns.items()):
            _wait(flow.device)
            began = time.perf_counter()
            invert(solver=solver, progress=partial(progress, f"exact and planned, tolerance {tolerance:g}"))
            _wait(flow.device)
            seconds[name].append(time.perf_counter() - began)
        found = images(solver=plan.solvers_of(flow), progress=partial(progress, "planned images"))
        # At tolerance 0 there is no further try, so all images are compared.
        difference = _difference(found, expected, limit if tolerance > 0 else math.inf)
        if tolerance == 0 or difference <= limit:
            break
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    near = difference <= limit or (largest_difference == 0 and difference <= _ROUNDING)
    if not near or medians["planned"] >= medians["exact"]:
        plan = replace(plan, solvers=(Jacobi(window=1),) * len(num_tokens))
        medians, difference = {**medians, "planned": medians["exact"]}, 0.0
    facts = {
        "threads": torch.get_num_threads(),
        "tolerance": tolerance,
        "largest difference of a pixel": difference,
        "pictures compared": sum(map(len, expected)),
        **{f"seconds, {name}": median for name, median in medians.items()},
    }
    return FoundPlan(tuple(blocks), replace(plan, facts=facts))


def _difference(images: Iterable[Tensor], expected: Iterable[Tensor], limit: float) -> float:
    """The largest difference, up to the first one above the limit."""
    largest = 0.0
    for found, exact in zip(images, expected, strict=False):
        largest = max(largest, float((found - exact).abs().nan_to_num(nan=math.inf).max()))
        if largest > limit:
            break
    return largest
