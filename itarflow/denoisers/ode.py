"""Denoising: solvers of the ODE dx = -t * score dt from a noisy sample to a clean one.

They call a denoiser only for its clean estimates x0(x, t) = x + t^2 score (Tweedie), so that the ODE reads

    dx/dt = -t grad_x log p(x, t) = (x - x0(x, t)) / t = d(x, t)

Below, t is the level of the present x, t' the next one, x' what it becomes there, and h = t' - t < 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from itarflow.denoisers.protocol import CheckedDenoiser, Denoiser
from itarflow.runtime.ranges import LEAST, check_flag, check_integer, check_number
from itarflow.runtime.tables import Table, choices, with_known

Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[int, float, Tensor, Tensor], None]
"""callback(i, t, x, x0): before step i, at noise level t, with the noisy x and the estimate x0."""


def lowest_level(denoiser: Denoiser, t_max: float) -> float:
    """The default t_min of a denoiser for steps from t_max: the smallest level that it was trained on.

    If that is not recorded, the papers' 0.01; if that is not below t_max, half of t_max.
    """
    known = denoiser.noise_range if isinstance(denoiser, CheckedDenoiser) else None
    low = known[0] if known else 0.01
    return low if low < t_max else t_max / 2


def noise_levels(t_max: float, t_min: float, num_steps: int, spacing: Spacing = "even") -> list[float]:
    """The levels that are visited: num_steps of them from t_max down to t_min, both exactly, then 0.

        t_k = t_max + k / (n - 1) (t_min - t_max),  k = 0 .. n - 1, then 0, if even     (iTARFlow, section 3.2)
        sqrt(t_k) = sqrt(t_max) + k / (n - 1) (sqrt(t_min) - sqrt(t_max)), if quadratic: closer at low levels

    With one step t_min plays no part: the path goes from t_max to 0, which is TARFlow's denoising.

    Raises:
        ValueError: num_steps < 1, not 0 < t_min < t_max, or an unknown spacing.
    """
    check_integer("num_denoise_steps", num_steps, 1, _MOST_STEPS)
    check_number("t_max", t_max)
    check_number("t_min", t_min, LEAST if num_steps > 1 else 0.0)
    if num_steps > 1 and not t_min < t_max:
        raise ValueError(f"t_min={t_min}, t_max={t_max}; expected 0 < t_min < t_max for {num_steps} steps.")
    SPACINGS.check(spacing)
    return [t_max, 0.0] if num_steps == 1 else [*SPACINGS[spacing](t_max, t_min, num_steps), 0.0]


def _even(t_max: float, t_min: float, num_steps: int) -> list[float]:
    return [float(level) for level in torch.linspace(t_max, t_min, num_steps, dtype=torch.float64)]


def _quadratic(t_max: float, t_min: float, num_steps: int) -> list[float]:
    roots = torch.linspace(math.sqrt(t_max), math.sqrt(t_min), num_steps, dtype=torch.float64)
    return [t_max, *roots.square()[1:-1].tolist(), t_min]


_MOST_STEPS = 100_000
SPACINGS: Table[Callable[[float, float, int], list[float]]] = Table(
    "spacing", "even", {"even": _even, "quadratic": _quadratic}
)
"""(t_max, t_min, n >= 2) -> n falling levels, of which t_max is the first and t_min the last."""
Spacing = Annotated[str, choices(SPACINGS)]


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    noisy: Tensor,
    labels: Tensor | None,
    schedule: DenoiseScheduler,
    *,
    generator: Generators = None,
    callback: Callback | None = None,
    context: Tensor | None = None,
) -> Tensor:
    """Follow the ODE from t_max to t_min in num_steps - 1 steps, and from there to 0 in one.

        dx = -t grad_x log p(x, t) dt                                       (iTARFlow, section 3.2)

    The last step, and the only one if num_steps is 1, is Tweedie's: x_0 = x_t + t^2 score (TARFlow, eq. 8).

    Args:
        denoiser: gives the clean estimate at a noise level.
        noisy: (B, C, H, W), clean images plus noise of standard deviation `schedule.config.t_max`.
        labels: (B,) or None, handed to the denoiser.
        schedule: noise levels and solver.
        generator: for the method "sde"; a list gives each image its own.
        callback: called before each step.
        context: (B, T, E) condition vectors, handed to the denoiser by that name; None = it is called without.

    Returns:
        (B, C, H, W) in float32, on noisy's device.

    Raises:
        ValueError: as many generators as images were expected; a plug-in's solver takes too many evaluations.
    """
    config = schedule.config
    x = noisy.to(torch.promote_types(noisy.dtype, torch.float32))
    follow, num_levels = SOLVERS[config.method]
    levels = noise_levels(config.t_max, config.t_min, num_levels(config.num_denoise_steps), config.spacing)

    call: Callable[..., Tensor] = denoiser
    if context is not None:
        call = partial(call, context=context)
    asked = 0

    def estimate(x: Tensor, t: float) -> Tensor:
        nonlocal asked
        asked += 1
        if asked > config.num_denoise_steps:
            raise ValueError(f"{config.method!r} takes more evaluations than num_denoise_steps; see num_levels.")
        x0 = call(x, labels, torch.full((len(x),), t, device=x.device, dtype=x.dtype))
        return x0.clamp(-1, 1) if config.clip else x0

    report = callback or (lambda *_: None)
    return follow(Path(estimate, levels, report, config.num_denoise_steps, generator), x)


class Path(NamedTuple):
    """What a solver follows."""

    estimate: Callable[[Tensor, float], Tensor]
    """(x (B, C, H, W), t) -> x0, the denoiser's clean estimate: one score evaluation."""
    levels: list[float]
    """From t_max down to t_min, then 0."""
    report: Callback
    """To be called before each step."""
    evaluations: int
    """How often the estimate may be asked for."""
    generator: Generators
    """For what is random."""

    def steps(self) -> Iterator[tuple[int, float, float]]:
        """(i, t, t') of each step."""
        return ((index, *pair) for index, pair in enumerate(itertools.pairwise(self.levels)))


def _euler(path: Path, x: Tensor) -> Tensor:
    """x' = x0 + (t'/t) (x - x0) = x + h d(x, t): Euler's step (iTARFlow, section 3.2)."""
    for index, t, t_next in path.steps():
        x0 = path.estimate(x, t)
        path.report(index, t, x, x0)
        x = x0 + (t_next / t) * (x - x0)
    return x


def _heun(path: Path, x: Tensor) -> Tensor:
    """x' = x + h/2 (d(x, t) + d(x + h d(x, t), t')): Heun's step (Karras et al. 2022, algorithm 1).

    As many as the evaluations allow, then one Euler step before the last if one evaluation is left over. A single
    Euler step has a local error of the size that all Heun steps have together, so the order stays two.
    """
    spare = (path.evaluations - 1) - 2 * (len(path.levels) - 2)  # < 0: that many intervals must do with one evaluation
    for index, t, t_next in path.steps():
        x0 = path.estimate(x, t)
        path.report(index, t, x, x0)
        slope = (x - x0) / t
        euler = x + (t_next - t) * slope
        last_interval = index == len(path.levels) - 3
        if t_next == 0:
            return x0
        if last_interval and spare < 0:
            x = euler
            continue
        slope_next = (euler - path.estimate(euler, t_next)) / t_next
        x = x + (t_next - t) * 0.5 * (slope + slope_next)
    return x


def _heun_intervals(num_steps: int) -> int:
    """How many levels above 0 Heun visits with num_steps evaluations: the last takes one, each other two."""
    return 1 + num_steps // 2 if num_steps > 1 else num_steps


def _multistep(path: Path, x: Tensor) -> Tensor:
    """x' = x + h (d_n + r/2 (d_n - d_{n-1})),  r = h / (t_n - t_{n-1}): Adams-Bashforth of two steps.

    d_n is the slope at t = t_n, d_{n-1} that of the step before; the first step is Euler's.

    It steps in t, not in log t as DPM-Solver++(2M): on an even grid, whose last steps are long in log t, that
    extrapolates too far and at ten steps is worse than Euler.
    """
    previous: tuple[float, Tensor] | None = None
    for index, t, t_next in path.steps():
        x0 = path.estimate(x, t)
        path.report(index, t, x, x0)
        if t_next == 0:
            return x0
        slope = (x - x0) / t
        mean_slope = slope
        if previous is not None:
            t_before, slope_before = previous
            mean_slope = slope + 0.5 * (t_next - t) / (t - t_before) * (slope - slope_before)
        x = x + (t_next - t) * mean_slope
        previous = t, slope
    return x


def _predictor_corrector(path: Path, x: Tensor) -> Tensor:
    """The clean estimate is taken as linear in t, x0(s) = x0 + c (s - t), for which the ODE is solved exactly.

        predict:  x_{n+1} from x_n, c = (x0_n - x0_{n-1}) / (t_n - t_{n-1})
        correct:  x_{n+1} from x_n, c = (x0_{n+1} - x0_n) / (t_{n+1} - t_n)

    both by `_linear_step`. To reach the next level, the line through the last two estimates is extended (the first
    step is Euler's); once the estimate there is known, the step is done again with the line through its two ends.
    """
    before: tuple[float, Tensor, Tensor] | None = None
    for index, t, t_next in path.steps():
        x0 = path.estimate(x, t)
        path.report(index, t, x, x0)
        if t_next == 0:
            return x0
        change: Tensor | float = 0.0
        if before is not None:
            t_before, x_before, x0_before = before
            change = (x0 - x0_before) / (t - t_before)
            x = _linear_step(x_before, x0_before, change, t_before, t)
        before = t, x, x0
        x = _linear_step(x, x0, change, t, t_next)
    return x


def _linear_step(x: Tensor, x0: Tensor, change: Tensor | float, t: float, t_next: float) -> Tensor:
    """x' = a x + (1 - a) (x0 - t c) - t' c log a,  a = t'/t: exact if the clean estimate at s is x0 + c (s - t)."""
    kept = t_next / t
    return kept * x + (1 - kept) * (x0 - t * change) - t_next * math.log(kept) * change


def _sde(path: Path, x: Tensor) -> Tensor:
    """x' = x0 + t' (a (x - x0)/t + sqrt(1 - a^2) e),  a = t'/t,  e ~ N(0, I).

    Of the noise's variance the share a^2 is kept and the rest drawn anew: "sde_vanilla" of the official code.
    """
    generator = path.generator
    if isinstance(generator, list) and len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators were given for {len(x)} images; expected one each.")
    for index, t, t_next in path.steps():
        x0 = path.estimate(x, t)
        path.report(index, t, x, x0)
        kept = (t_next / t) ** 2
        x_next = x0 + t_next * math.sqrt(kept) * (x - x0) / t
        if t_next > 0:
            fresh = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)  # whatever x has
            x_next = x_next + t_next * math.sqrt(1 - kept) * fresh.to(x.dtype)
        x = x_next
    return x


class Solver(NamedTuple):
    """A method of denoising, as it stands in the table."""

    follow: Callable[[Path, Tensor], Tensor]
    """(path, x at t_max) -> x at 0, each (B, C, H, W)."""
    num_levels: Callable[[int], int] = lambda num_steps: num_steps
    """How many levels above 0 it visits with so many evaluations, from 1 to that many."""


SOLVERS: Table[Solver] = Table(
    "denoising method",
    "euler",
    {
        "euler": Solver(_euler),
        "heun": Solver(_heun, _heun_intervals),
        "multistep": Solver(_multistep),
        "predictor-corrector": Solver(_predictor_corrector),
        "sde": Solver(_sde),
        "skip": Solver(lambda _, x: x),
    },
)
Method = Annotated[str, choices(SOLVERS)]


class DenoiseScheduler(SchedulerMixin, ConfigMixin):
    """How noisy images are denoised: noise levels and solver. A checkpoint holds one, beside the weights.

    Args:
        t_max: noise level of the noisy images, at which the flow is sampled.
        t_min: smallest level at which the denoiser is evaluated; from there one step leads to 0.
        num_denoise_steps: evaluations of the denoiser, >= 1. 1 = TARFlow's single Tweedie step.
        method: "euler": first order. "heun": second order, two evaluations a step (Karras et al. 2022, algorithm 1),
            on fewer and larger steps. "multistep": second order from one evaluation a step and the one before
            (Adams-Bashforth). "predictor-corrector": second order from one evaluation a step, which also corrects
            the step that led to it; with quadratic spacing it needs the fewest evaluations. "sde": Euler that
            replaces a part of the noise by a fresh draw. "skip": the images are left noisy, for flows that were
            trained without Gaussian noise, or to see what denoising does.
        clip: clamp the clean estimates, not x, to [-1, 1].
        spacing: of the levels, see `noise_levels`.

    Raises:
        ValueError: num_denoise_steps < 1, t_min or t_max out of order, an unknown method or spacing, or another type.
    """

    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(
        self,
        t_max: float,
        t_min: float,
        num_denoise_steps: int = 10,
        method: Method = "euler",
        clip: bool = False,
        spacing: Spacing = "even",
    ) -> None:
        SOLVERS.check(method)
        check_flag("clip", clip)
        noise_levels(t_max, t_min, num_denoise_steps, spacing)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, but stored names that are not known here become the defaults, with a warning."""
        if isinstance(config, Mapping):
            config = with_known(config, {"method": SOLVERS, "spacing": SPACINGS})
        return super().from_config(config, return_unused_kwargs, **kwargs)
