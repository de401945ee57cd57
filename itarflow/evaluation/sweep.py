"""A grid of settings, each scored by the same samples: guidance weight, noise level and number of denoising steps.

OUT/guidance-1.5_t-0.3/   samples.json   steps-01/   steps-10/   raw/

Images are generated once for a guidance weight and a noise level, and denoised in all numbers of steps. Noise and
labels are the same in all settings, so that what differs between them is due to the settings. Scores lie beside the
samples that they are of.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itarflow.codec import codec_of
from itarflow.denoisers.ode import Method, Spacing
from itarflow.denoisers.score import Denoiser
from itarflow.evaluation.metrics.scores import Scores
from itarflow.evaluation.samples.denoising import Denoising
from itarflow.evaluation.samples.generate import Generation
from itarflow.inverse.guidance import Guidance
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.files import atomically

HIGHER_IS_BETTER = frozenset({"inception_score", "precision", "recall"})
"""Figures of `scores.Scores` of which the highest is best; of all others the lowest."""


@dataclass(frozen=True)
class Setting:
    """A point of the grid.

    Attributes:
        t_max: noise level of the flow's samples.
        guidance_weight: of generation; 0 = unguided.
        num_denoise_steps: score evaluations; 0 = the noisy images as they are.
        temperature: of the guiding pass; None = not swept over, but the same in all settings.
        method: solver of denoising; None = likewise.
    """

    t_max: float
    guidance_weight: float
    num_denoise_steps: int
    temperature: float | None = None
    method: Method | None = None

    @property
    def generation(self) -> str:
        """Name of the folder with all settings whose images are generated alike."""
        of = "" if self.temperature is None else f"_tau-{plain(self.temperature)}"
        return f"guidance-{plain(self.guidance_weight)}{of}_t-{plain(self.t_max)}"

    @property
    def variant(self) -> str:
        """Name of the folder in it with this setting's samples: its denoising variant."""
        by = "" if self.method is None else f"-{self.method}"
        return f"steps-{self.num_denoise_steps:02d}{by}" if self.num_denoise_steps else "raw"


def plain(value: float) -> str:
    """The shortest text that stands for this number only."""
    return repr(float(value)).removesuffix(".0")


def text(axis: str, value: float | str | None) -> str:
    """A value of a setting, for tables and figures."""
    if value is None:
        return "-"
    return "noisy" if axis == "num_denoise_steps" and value == 0 else value if isinstance(value, str) else plain(value)


def grid_of(
    pipe: ITARFlowPipeline,
    *,
    guidance_weights: Sequence[float] | None = None,
    t_max: Sequence[float] | None = None,
    num_denoise_steps: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
    methods: Sequence[Method] | None = None,
    raw: bool = False,
    other_denoiser: bool = False,
    labelled: bool = True,
) -> list[Setting]:
    """All combinations of some values, level by level, weight by weight, ascending; None = that of the checkpoint.

    Args:
        pipe: the checkpoint.
        guidance_weights: each >= 0.
        t_max: noise levels of generating.
        num_denoise_steps: each >= 1.
        temperatures: of the guiding pass.
        methods: solvers; of "skip" there are noisy images alone.
        raw: the noisy images too.
        other_denoiser: whether another denoiser than the checkpoint's own flow is used.
        labelled: whether images have labels. Without, the checkpoint's own guidance weight is ignored.

    Raises:
        ValueError: no values, steps < 1, or more steps than the checkpoint knows.
    """
    stored = pipe.scheduler.config
    several = other_denoiser or pipe.flow.config.noise_conditioned
    if num_denoise_steps is not None and min(num_denoise_steps, default=1) < 1:
        raise ValueError(f"num_denoise_steps is {min(num_denoise_steps)}; expected numbers of score evaluations >= 1.")
    solvers = methods or [stored.method]
    if methods is not None and len(methods) > 1 and "skip" in methods:
        raise ValueError("the method 'skip' does not denoise; leave it out, and ask for the noisy images by raw.")
    if solvers[0] == "skip":
        if num_denoise_steps:
            raise ValueError(
                f"num_denoise_steps is {list(num_denoise_steps)}, but by the method 'skip' images are not denoised; "
                "name another method, or leave the steps out."
            )
        steps = [0]
    else:
        steps = list([stored.num_denoise_steps if several else 1] if num_denoise_steps is None else num_denoise_steps)
        if not several and max(steps, default=1) > 1:
            raise ValueError(
                f"num_denoise_steps is {max(steps)}, but the checkpoint has one noise level alone, and so knows one "
                "step only; ask for 1, or name a denoiser that knows a range of levels."
            )
        steps += [0] if raw else []
    guidance = pipe.default_guidance
    weight = guidance.weight if labelled or guidance.temperature != 1 else 0.0
    weights = (weight,) if guidance_weights is None else guidance_weights
    levels = (float(stored.t_max),) if t_max is None else t_max
    given = {"guidance_weights": weights, "t_max": levels, "num_denoise_steps": steps, "temperatures": temperatures,
             "methods": methods}  # fmt: skip
    for name, values in given.items():
        if values is not None and not values:
            raise ValueError(f"{name} has no values; expected one or more, or leave it out.")
    several_methods: Sequence[Method | None] = methods if methods is not None and len(methods) > 1 else [None]
    taus: Sequence[float | None] = sorted({*temperatures}) if temperatures else [None]
    grid = [
        Setting(level, weight, number, temperature, None if number == 0 else solver)
        for level in sorted({*levels})
        for weight in sorted({*weights})
        for temperature in (taus if weight else taus[:1])  # at weight 0 all of them give the same
        for number in sorted({*steps})
        for solver in dict.fromkeys(several_methods)
    ]
    return list(dict.fromkeys(grid))


def generations_of(
    pipe: ITARFlowPipeline,
    grid: Sequence[Setting],
    labels: Tensor,
    *,
    seed: int = 0,
    guidance: Guidance | None = None,
    method: Method | None = None,
    spacing: Spacing | None = None,
    denoiser: Denoiser | None = None,
    dtype: torch.dtype | None = None,
    slice_size: int | None = None,
    decode_size: int | None = None,
    **options: Any,
) -> dict[str, Generation]:
    """What is made for a grid, by the names of the folders; all of it is checked.

    Args:
        pipe: the checkpoint, on its device.
        grid: in order.
        labels: (N,) int64, -1 = none; the same of all settings.
        seed: of the noise, which is the same in all settings.
        guidance: its weight, and its temperature where a setting has one, are the settings'; None = the checkpoint's.
        method: solver of denoising of settings that name none; None = the checkpoint's.
        spacing: of the noise levels; None = the checkpoint's.
        denoiser: what denoises instead of the checkpoint's own flow.
        dtype: of the flow's layers while it denoises; None = as in a call of the pipeline.
        slice_size: images that the flow denoises at a time; None = all that are given.
        decode_size: images that a VAE decodes at a time; None = all that are given.
        **options: of `Generation`: solver, inverse_dtype, batch_size.

    Raises:
        ValueError: a setting can't be made; of the first such one. Nothing has been computed then.
    """
    codec = codec_of(pipe.vae, slice_size=decode_size)
    denoises = denoiser or pipe.flow_denoiser(slice_size, dtype)
    generations: dict[str, Generation] = {}
    for name, group in groupby(grid, key=lambda setting: setting.generation):
        variants = {}
        for setting in group:
            if steps := setting.num_denoise_steps:
                solver = setting.method or method
                schedule = pipe.schedule(setting.t_max, None, steps, solver, spacing, denoiser=denoiser)
                variants[setting.variant] = Denoising(f"{steps} steps", codec, denoises, schedule)
            else:
                variants[setting.variant] = Denoising("noisy", codec)
        chosen = replace(guidance or pipe.default_guidance, weight=setting.guidance_weight)
        if setting.temperature is not None:
            chosen = replace(chosen, temperature=setting.temperature)
        generations[name] = Generation(
            pipe=pipe, variants=variants, labels=labels, seed=seed, guidance=chosen, t_max=setting.t_max, **options
        )
        generations[name].check()
    return generations


# -- scores -----------------------------------------------------------------------------------------------------


def best_settings(scores: Mapping[Setting, Scores]) -> dict[str, Setting]:
    """The best setting by each figure's short name; the first of equal ones. Only finite figures count."""
    best: dict[str, Setting] = {}
    for name in figure_names(scores):
        sign = -1 if name in HIGHER_IS_BETTER else 1
        values = {setting: one.figures[name].value for setting, one in scores.items() if name in one.figures}
        finite = [setting for setting, value in values.items() if math.isfinite(value)]
        if finite:
            best[name] = min(finite, key=lambda setting: sign * values[setting])
    return best


def figure_names(scores: Mapping[Setting, Scores]) -> list[str]:
    """Short names of all figures that some setting has, in their order."""
    return list(dict.fromkeys(name for one in scores.values() for name in one.figures))


def write_csv(scores: Mapping[Setting, Scores], path: Path) -> None:
    """Write a line for each setting: its values, counts, figures, and their spreads (NAME_std) where they have any."""
    lines = []
    for setting, one in scores.items():
        line: dict[str, float | int | str | None] = {
            "guidance_weight": setting.guidance_weight,
            "t_max": setting.t_max,
            "num_denoise_steps": setting.num_denoise_steps,
            **({} if setting.temperature is None else {"temperature": setting.temperature}),
            **({} if setting.method is None else {"method": setting.method}),
            "samples": one.samples,
            "not_finite": one.broken,
        }
        for name, figure in one.figures.items():
            line[name] = figure.value
            if figure.std is not None:
                line[f"{name}_std"] = figure.std
        lines.append(line)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with atomically(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
