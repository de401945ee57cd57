"""`itarflow sweep`: the figures of a checkpoint over its settings, as tables and curves."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.commands.console import joined, resumable, say
from itarflow.commands.options import Judged, Making, device_name, versions
from itarflow.evaluation.evaluate import make_all
from itarflow.evaluation.metrics.reference import Origin
from itarflow.evaluation.metrics.scores import Scores
from itarflow.evaluation.samples.generate import CONVERSION, MANIFEST, Generation, manifest_of
from itarflow.evaluation.sweep import (
    Cell,
    best_cells,
    cells_of,
    figure_names,
    generations_of,
    plain,
    score_cells,
    write_csv,
)
from itarflow.evaluation.sweep_plots import draw_curves, draw_images
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.files import check_writable, write_json
from itarflow.runtime.pictures import blank_figure
from itarflow.runtime.processes import on_main
from itarflow.runtime.text import display_name


@dataclass(frozen=True, kw_only=True)
class _Values(Judged):
    """What is swept over."""

    num_samples: int = 5_000
    """Images of each setting. With fewer, Fréchet distances are higher, and comparable only at equal numbers."""
    output: Path = Path("sweep")
    """Folder for sweep.json, sweep.csv, sweep.png, sweep_samples.png, and for the samples of all settings."""
    guidance_weights: tuple[float, ...] | None = None
    """w in (1 + w) * conditional - w * unconditional; 0 = off. None = the checkpoint's."""
    t_max: tuple[float, ...] | None = None
    """Noise levels at which is generated, within the range that the flow was trained on. None = the checkpoint's."""
    num_denoise_steps: tuple[int, ...] | None = None
    """Score evaluations in denoising; 1 = one step, as TARFlow does. None = the checkpoint's."""
    raw: bool = False
    """Score the noisy images too, as the flow has made them; called 0 steps in the files."""
    picture_rows: int = 4
    """How many images of each setting sweep_samples.png shows."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Making, _Values):
    """Score samples of a checkpoint over guidance weights, noise levels and numbers of denoising steps.

    Example: itarflow sweep runs/cifar10/pipeline --data uoft-cs/cifar10 --guidance-weights 0 1 2 3 --t-max 0.1 0.2 0.3
    --num-denoise-steps 1 2 5 10 20 --num-samples 5000

    All combinations are scored. Noise and labels are the same in all of them, and images are generated once for a
    guidance weight and a t_max, however many numbers of steps they are cleaned in. The same command goes on after an
    interruption; with further values it adds to what is there. Several GPUs share the work:
    accelerate launch -m itarflow sweep ...
    """

    def run(self) -> None:
        """Carry the command out."""
        with resumable(self.output):
            self._run(joined())

    def _run(self, state: PartialState) -> None:
        self.check_judged()
        self.check_making()
        if self.picture_rows < 1:
            raise ValueError(f"--picture-rows is {self.picture_rows}; expected 1 or more.")
        check_writable(self.output)
        blank_figure(1, 1)  # refuses where matplotlib is missing
        pipe, device = self.open_pipe(self.checkpoint, state)
        cells, generations = self._cells(pipe, device)
        console = Console(stderr=True)
        if state.is_main_process:
            say(_plan(cells, generations, self.num_samples))
        folders = {self.output / name: one for name, one in generations.items()}
        # Refused now, not after the reference.
        on_main(state, lambda: [manifest_of(one, folder) for folder, one in folders.items()])
        extractor = self.open_extractor(state, device)
        reference = self.open_reference(pipe, extractor, state, self.num_workers, console)
        start = time.monotonic()
        made = make_all(folders, state, console)
        seconds = time.monotonic() - start
        scores = score_cells(cells, self.output, reference, extractor, state, device, console)
        if state.is_main_process:
            self._report(pipe, scores, reference.origin, made / seconds if made else None)

    def _cells(self, pipe: ITARFlowPipeline, device: str) -> tuple[list[Cell], dict[str, Generation]]:
        """The grid, and what is made for it, all of it checked."""
        labels = self.sample_labels(pipe)
        cells = cells_of(
            pipe,
            guidance_weights=self.guidance_weights,
            t_max=self.t_max,
            num_denoise_steps=self.num_denoise_steps,
            raw=self.raw,
            method=self.method,
            other_denoiser=self.denoiser is not None,
            labelled=bool((labels >= 0).any()),
        )
        generations = generations_of(
            pipe,
            cells,
            labels,
            seed=self.seed,
            method=self.method,
            spacing=self.spacing,
            denoiser=self.open_denoiser(pipe, device),
            dtype=self.cleaning_dtype,
            slice_size=self.denoise_batch_size,
            decode_size=self.decode_batch_size,
            **self.inverting(),
        )
        return cells, generations

    def _report(
        self, pipe: ITARFlowPipeline, scores: Mapping[Cell, Scores], origin: Origin, speed: float | None
    ) -> None:
        best = best_cells(scores)
        names = dict.fromkeys(cell.generation for cell in scores)
        report: dict[str, Any] = {
            "checkpoint": display_name(self.checkpoint),
            "denoiser": None if self.denoiser is None else display_name(self.denoiser),
            "samples": {name: json.loads((self.output / name / MANIFEST).read_text()) for name in names},
            "labels": self.labels,
            "reference": asdict(origin),
            "conversion": CONVERSION,
            "cells": [{**asdict(cell), **one.to_json()} for cell, one in scores.items()],
            "best": {name: asdict(cell) for name, cell in best.items()},
            "speed": {"making, images/s": speed},
            "made": {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                **versions(),
                "device": device_name(pipe),
            },
        }
        write_json(self.output / "sweep.json", report)
        write_csv(scores, self.output / "sweep.csv")
        draw_curves(scores, self.output / "sweep.png")
        draw_images(list(scores), self.output, self.output / "sweep_samples.png", self.picture_rows)
        console = Console()
        console.print(table_of(scores))
        for warning in dict.fromkeys(warning for one in scores.values() for warning in one.warnings):
            console.print(f"[yellow]Note:[/] {escape(warning)}.", soft_wrap=True, highlight=False)
        files = ("sweep.json", "sweep.csv", "sweep.png", "sweep_samples.png")
        say("see " + ", ".join(str(self.output / name) for name in files))


def _plan(cells: Sequence[Cell], generations: Mapping[str, Generation], count: int) -> str:
    """What will be done in all."""
    steps = sum(cell.num_denoise_steps for cell in cells)
    return (
        f"{len(cells)} settings of {count:,} images: {count * len(generations):,} images are generated, "
        f"{count * len(cells):,} cleaned and scored, by {count * steps:,} evaluations of the denoiser in all"
    )


def table_of(scores: Mapping[Cell, Scores]) -> Table:
    """A row for each cell, a column for each figure; the best cell by each figure has a star."""
    first, names, best = next(iter(scores.values())), figure_names(scores), best_cells(scores)
    table = Table(
        title=f"{first.samples:,} samples each against {first.reference}, by {first.extractor}; * = best",
        title_justify="left",
    )
    for title in ("t_max", "guidance", "steps"):
        table.add_column(title, justify="right")
    for name in names:
        title = next(one.figures[name].title for one in scores.values() if name in one.figures)
        table.add_column(escape(title.removesuffix(f" ({first.extractor})")), justify="right")
    broken = any(one.broken for one in scores.values())
    if broken:
        table.add_column("not finite", justify="right")
    before: Cell | None = None
    for cell, one in scores.items():
        if before is not None and cell.generation != before.generation:
            table.add_section()
        figures = []
        for name in names:
            text = f"{one.figures[name].value:.4g}" if name in one.figures else "-"
            figures.append(f"[bold green]{text} *[/]" if best.get(name) == cell else f"{text}  ")
        table.add_row(
            plain(cell.t_max),
            plain(cell.guidance_weight),
            str(cell.num_denoise_steps or "noisy"),
            *figures,
            *([f"{one.broken:,}"] if broken else []),
        )
        before = cell
    return table
