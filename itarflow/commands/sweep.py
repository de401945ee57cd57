"""`itarflow sweep`: the figures of a checkpoint over its settings, as tables and curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from itarflow.commands.console import say
from itarflow.commands.options import Scoring
from itarflow.commands.score_table import print_scores, score_table
from itarflow.denoisers.ode import Method
from itarflow.denoisers.score import Denoiser
from itarflow.evaluation.metrics.scores import Scores
from itarflow.evaluation.samples.generate import Generation
from itarflow.evaluation.samples.manifest import read_manifest
from itarflow.evaluation.samples.prompts import SamplePrompts
from itarflow.evaluation.sweep import Setting, best_settings, generations_of, grid_of, text, write_csv
from itarflow.evaluation.sweep_plots import draw_curves, draw_images
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.files import write_json
from itarflow.runtime.pictures import blank_figure


@dataclass(frozen=True, kw_only=True)
class Sweep(Scoring):
    """Score samples of a checkpoint over guidance weights, noise levels, denoising steps and more.

    Example: itarflow sweep runs/cifar10/pipeline --data uoft-cs/cifar10 --guidance-weights 0 1 2 3 --t-max 0.1 0.2 0.3
    --num-denoise-steps 1 2 5 10 20 --num-samples 5000

    All combinations are scored. Noise and labels are the same in all of them, and images are generated once for a
    guidance weight and a t_max, however many numbers of steps they are denoised in. The same command goes on after an
    interruption; with further values it adds to what is there. Several GPUs share the work:
    accelerate launch -m itarflow sweep ...
    """

    num_samples: int = 5_000
    """Images of each setting. With fewer, Fréchet distances are higher, and comparable only at equal numbers."""
    output: Path | None = None
    """Folder for sweep.json, sweep.csv, sweep.png, sweep_samples.png, and for the samples of all settings. None =
    runs/NAME/sweep of a run's pipeline, runs/NAME/pipeline; NAME-sweep of other checkpoints."""
    guidance_weights: tuple[float, ...] | None = None
    """w in (1 + w) * conditional - w * unconditional; 0 = off. None = the checkpoint's."""
    t_max: tuple[float, ...] | None = None
    """Noise levels of the flow's samples, within the range that it was trained on. None = the checkpoint's."""
    num_denoise_steps: tuple[int, ...] | None = None
    """Score evaluations in denoising; 1 = one step, as TARFlow does. None = the checkpoint's."""
    guidance_temperatures: tuple[float, ...] | None = None
    """tau, by which the attention logits of the guiding pass are divided; away from 1 they guide models without
    labels (TARFlow, equation 11). None = the checkpoint's."""
    method: tuple[Method, ...] | None = None
    """Solvers of denoising. None = the checkpoint's."""
    raw: bool = False
    """Score the noisy images too, as the flow has made them; called 0 steps in the files."""
    picture_rows: int = 4
    """How many images of each setting sweep_samples.png shows."""

    @property
    def kind(self) -> str:
        """See `Scoring`."""
        return "sweep"

    def check(self) -> None:
        """See `Scoring`."""
        super().check()
        if self.picture_rows < 1:
            raise ValueError(f"--picture-rows is {self.picture_rows}; expected 1 or more.")
        blank_figure(1, 1)  # refuses where matplotlib is missing

    def generations(
        self, pipe: ITARFlowPipeline, denoiser: Denoiser | None, prompts: SamplePrompts
    ) -> dict[str, Generation]:
        """See `Scoring`."""
        return generations_of(
            pipe,
            self._grid(pipe),
            self.sample_labels(pipe),
            seed=self.seed,
            guidance=replace(pipe.default_guidance, **self.guidance_fields()),
            method=None if self.method is None else self.method[0],
            spacing=self.spacing,
            denoiser=denoiser,
            **self.denoising(),
            prompts=prompts,
            **self.inverting(),
        )

    def _grid(self, pipe: ITARFlowPipeline) -> list[Setting]:
        return grid_of(
            pipe,
            guidance_weights=self.guidance_weights,
            t_max=self.t_max,
            num_denoise_steps=self.num_denoise_steps,
            temperatures=self.guidance_temperatures,
            methods=self.method,
            raw=self.raw,
            other_denoiser=self.denoiser is not None,
            labelled=self.guided_by(pipe),
        )

    def finish(self, made: Mapping[str, Generation], scores: Mapping[Path, Scores], report: dict[str, Any]) -> None:
        """See `Scoring`."""
        found = {
            one: scores[self.folder / one.generation / one.variant]
            for one in self._grid(next(iter(made.values())).pipe)
        }
        report |= {
            "samples": {name: read_manifest(self.folder / name) for name in made},
            "cells": [{**asdict(setting), **one.to_json()} for setting, one in found.items()],
            "best": {name: asdict(setting) for name, setting in best_settings(found).items()},
        }
        write_json(self.folder / "sweep.json", report)
        write_csv(found, self.folder / "sweep.csv")
        print_scores(table_of(found), found)
        draw_curves(found, self.folder / "sweep.png")
        draw_images(list(found), self.folder, self.folder / "sweep_samples.png", self.picture_rows)
        files = ("sweep.json", "sweep.csv", "sweep.png", "sweep_samples.png")
        say("see " + ", ".join(str(self.folder / name) for name in files))


def table_of(scores: Mapping[Setting, Scores]) -> Table:
    """A row for each setting, a column for each figure; the best setting by each figure has a star."""
    heads = {"t_max": "t_max", "guidance_weight": "guidance", "temperature": "tau", "method": "method"}
    shown = [name for name in heads if any(getattr(one, name) is not None for one in scores)]
    rows = {
        one: (*(text(name, getattr(one, name)) for name in shown), str(one.num_denoise_steps or "noisy"))
        for one in scores
    }
    best = {name: rows[setting] for name, setting in best_settings(scores).items()}
    titles = (*(heads[name] for name in shown), "steps")
    return score_table(titles, {rows[setting]: one for setting, one in scores.items()}, best)
