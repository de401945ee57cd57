"""A grid of settings, each scored by the same samples: guidance weight, noise level and number of denoising steps.

OUT/guidance-1.5_t-0.3/   samples.json   steps-01/   steps-10/   raw/

Images are generated once for a guidance weight and a noise level, and cleaned in all numbers of steps. Noise and
labels are the same in all cells, so that what differs between them is due to the settings. Scores lie beside the
samples that they are of.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor

from itarflow.codec import codec_of
from itarflow.denoisers.ode import Method, Spacing
from itarflow.denoisers.score import Denoiser, FlowDenoiser
from itarflow.evaluation.evaluate import scores_of
from itarflow.evaluation.metrics.extractors import Extractor
from itarflow.evaluation.metrics.reference import Reference
from itarflow.evaluation.metrics.scores import Scores
from itarflow.evaluation.samples.denoising import Column
from itarflow.evaluation.samples.generate import Generation
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.files import atomically

HIGHER_IS_BETTER = frozenset({"inception_score", "precision", "recall"})
"""Figures of `scores.Scores` of which the highest is best; of all others the lowest."""


@dataclass(frozen=True, order=True)
class Cell:
    """A point of the grid.

    Attributes:
        t_max: noise level at which is generated.
        guidance_weight: in generating; 0 = unguided.
        num_denoise_steps: score evaluations; 0 = the noisy images as they are.
    """

    t_max: float
    guidance_weight: float
    num_denoise_steps: int

    @property
    def generation(self) -> str:
        """Name of the folder with all cells whose images are generated alike."""
        return f"guidance-{plain(self.guidance_weight)}_t-{plain(self.t_max)}"

    @property
    def way(self) -> str:
        """Name of the folder in it with the samples of this cell."""
        return f"steps-{self.num_denoise_steps:02d}" if self.num_denoise_steps else "raw"


def plain(value: float) -> str:
    """All digits that tell a number from others, and no more."""
    return repr(float(value)).removesuffix(".0")


def cells_of(
    pipe: ITARFlowPipeline,
    *,
    guidance_weights: Sequence[float] | None = None,
    t_max: Sequence[float] | None = None,
    num_denoise_steps: Sequence[int] | None = None,
    raw: bool = False,
    method: Method | None = None,
    other_denoiser: bool = False,
    labelled: bool = True,
) -> list[Cell]:
    """All combinations of some values, level by level, weight by weight, ascending; None = that of the checkpoint.

    Args:
        pipe: the checkpoint.
        guidance_weights: each >= 0.
        t_max: noise levels of generating.
        num_denoise_steps: each >= 1.
        raw: the noisy images too.
        method: solver; None = the checkpoint's. Of "skip" there are noisy images alone.
        other_denoiser: another denoiser than the checkpoint's own flow is asked.
        labelled: whether images have labels. Without, the checkpoint's own guidance weight plays no part.

    Raises:
        ValueError: no values, steps < 1, or more steps than the checkpoint knows.
    """
    stored = pipe.scheduler.config
    several = other_denoiser or pipe.flow.config.noise_conditioned
    if num_denoise_steps is not None and min(num_denoise_steps, default=1) < 1:
        raise ValueError(f"num_denoise_steps is {min(num_denoise_steps)}; expected numbers of score evaluations >= 1.")
    if (method or stored.method) == "skip":
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
    for name, values in (("guidance_weights", weights), ("t_max", levels), ("num_denoise_steps", steps)):
        if not values:
            raise ValueError(f"{name} has no values; expected one or more, or leave it out.")
    return sorted({Cell(level, weight, number) for level in levels for weight in weights for number in steps})


def generations_of(
    pipe: ITARFlowPipeline,
    cells: Sequence[Cell],
    labels: Tensor,
    *,
    seed: int = 0,
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
        cells: of the grid.
        labels: (N,) int64, -1 = none; the same of all cells.
        seed: of the noise, which is the same in all cells.
        method: solver of denoising; None = the checkpoint's.
        spacing: of the noise levels; None = the checkpoint's.
        denoiser: what denoises instead of the checkpoint's own flow.
        dtype: of the flow's layers while it denoises, see `FlowDenoiser`.
        slice_size: images that the flow denoises at a time; None = all that are given.
        decode_size: images that a VAE decodes at a time; None = all that are given.
        **options: of `Generation`: solver, inverse_dtype, file_size.

    Raises:
        ValueError: a cell can't be made; of the first such one. Nothing has been computed then.
    """
    codec = codec_of(pipe.vae, slice_size=decode_size)
    cleaner = denoiser or FlowDenoiser(pipe.flow, slice_size, dtype=dtype)
    guidance = pipe.default_guidance
    columns: dict[str, dict[str, Column]] = {}
    settings: dict[str, Cell] = {}
    for cell in cells:
        settings[cell.generation] = cell
        if cell.num_denoise_steps:
            steps = cell.num_denoise_steps
            schedule = pipe.schedule(cell.t_max, None, steps, method, spacing, denoiser=denoiser)
            column = Column(f"{steps} steps", codec, cleaner, schedule)
        else:
            column = Column("noisy", codec)
        columns.setdefault(cell.generation, {})[cell.way] = column
    generations = {
        name: Generation(
            pipe=pipe,
            columns=columns[name],
            labels=labels,
            seed=seed,
            guidance=replace(guidance, weight=cell.guidance_weight),
            t_max=cell.t_max,
            **options,
        )
        for name, cell in settings.items()
    }
    for generation in generations.values():
        generation.check()
    return generations


# -- scores -----------------------------------------------------------------------------------------------------


def score_cells(
    cells: Sequence[Cell],
    folder: Path,
    reference: Reference,
    extractor: Extractor,
    state: PartialState,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> dict[Cell, Scores]:
    """The figures of all cells, whose samples are there; those that are kept are not computed again.

    Args:
        cells: of the grid.
        folder: with the folders of all generations.
        reference: statistics of real images.
        extractor: that made the reference, on the device of this process.
        state: of the launch; all processes call this, and get the same.
        device: where distances between features are computed.
        console: where the main process draws a bar; None = nowhere.
    """
    folders = [folder / cell.generation / cell.way for cell in cells]
    scores, _ = scores_of(folders, reference, extractor, state, device=device, console=console)
    return dict(zip(cells, scores, strict=True))


def best_cells(scores: Mapping[Cell, Scores]) -> dict[str, Cell]:
    """The best cell by each figure's short name; of equal ones the first. Figures that are not finite have no part."""
    best: dict[str, Cell] = {}
    for name in figure_names(scores):
        sign = -1 if name in HIGHER_IS_BETTER else 1
        values = {cell: one.figures[name].value for cell, one in scores.items() if name in one.figures}
        finite = [cell for cell, value in values.items() if math.isfinite(value)]
        if finite:
            best[name] = min(finite, key=lambda cell: sign * values[cell])
    return best


def figure_names(scores: Mapping[Cell, Scores]) -> list[str]:
    """Short names of all figures that some cell has, in their order."""
    return list(dict.fromkeys(name for one in scores.values() for name in one.figures))


def write_csv(scores: Mapping[Cell, Scores], path: Path) -> None:
    """Write a line for each cell: its settings, counts, figures, and their spreads (NAME_std) where they have any."""
    lines = []
    for cell, one in scores.items():
        line: dict[str, float | int] = {
            "guidance_weight": cell.guidance_weight,
            "t_max": cell.t_max,
            "num_denoise_steps": cell.num_denoise_steps,
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
