"""`itarflow evaluate`: samples of a checkpoint, and what they are worth by the figures of the field."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import tyro
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.commands.console import joined, resumable, say
from itarflow.commands.options import Judged, Making, device_name, figure_text, versions
from itarflow.evaluation.evaluate import Way, make_samples, scores_of, ways_of
from itarflow.evaluation.metrics.reference import Origin
from itarflow.evaluation.metrics.scores import Scores
from itarflow.evaluation.samples.files import open_samples, write_npz, write_png
from itarflow.evaluation.samples.generate import CONVERSION, MANIFEST, Generation, manifest_of
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.files import check_writable, write_json
from itarflow.runtime.hub import read_index
from itarflow.runtime.processes import on_main
from itarflow.runtime.text import display_name


@dataclass(frozen=True, kw_only=True)
class _Ways(Judged):
    """What is evaluated of a checkpoint."""

    output: Path = Path("evaluation")
    """Folder for evaluation.json, and for the samples of each way of cleaning."""
    ways: Annotated[tuple[Way, ...] | None, tyro.conf.arg(metavar="WAY ...")] = None
    """Ways of cleaning that are scored: raw, self, iterative. None = all that the checkpoint knows."""
    guidance_weight: float | None = None
    """w in (1 + w) * conditional - w * unconditional; 0 = off. None = the checkpoint's."""
    t_max: float | None = None
    """Noise level at which is generated. None = the checkpoint's."""
    num_denoise_steps: int | None = None
    """Score evaluations of the iterative way. None = the checkpoint's."""
    npz: bool = False
    """Write the samples of each way as an .npz file too, which ADM's evaluation suite reads."""
    png: bool = False
    """Write them as folders of PNG files too."""
    record: bool = True
    """Write the figures into the checkpoint's settings and model card, if it is a folder here."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Making, _Ways):
    """Make many samples of a checkpoint and compare them with real images: FID, sFID, IS, KID, precision, recall.

    Example: itarflow evaluate runs/cifar10/pipeline --data uoft-cs/cifar10 --num-samples 50000

    Samples are scored raw (noisy, as the flow has made them), self-denoised (one step, as TARFlow does) and
    iteratively denoised (as iTARFlow does). Image i depends on the checkpoint, the seed, i and its label, and on
    nothing else. The same command goes on after an interruption. Several GPUs share the work:
    accelerate launch -m itarflow evaluate ...
    """

    def run(self) -> None:
        """Carry the command out."""
        with resumable(self.output):
            self._run(joined())

    def _run(self, state: PartialState) -> None:
        self.check_judged()
        self.check_making()
        check_writable(self.output)
        pipe, device = self.open_pipe(self.checkpoint, state)
        generation = self._generation(pipe, device)
        generation.check()
        folder = Path(self.checkpoint)
        on_main(state, lambda: manifest_of(generation, self.output))  # refused now, not after the reference
        if self.record and folder.is_dir():
            check_writable(folder)
        console = Console(stderr=True)
        extractor = self.open_extractor(state, device)
        reference = self.open_reference(pipe, extractor, state, self.num_workers, console)
        start = time.monotonic()
        made = make_samples(generation, self.output, state, console)
        seconds = time.monotonic() - start
        start = time.monotonic()
        folders = [self.output / name for name in generation.columns]
        found, scored = scores_of(folders, reference, extractor, state, device=device, console=console)
        scoring = time.monotonic() - start
        if state.is_main_process:
            speed = {
                "making, images/s": made / seconds if made else None,
                "scoring, images/s": scored / scoring if scored else None,
            }
            self._report(pipe, generation, dict(zip(generation.columns, found, strict=True)), reference.origin, speed)

    def _generation(self, pipe: ITARFlowPipeline, device: str) -> Generation:
        """What is to be made."""
        denoiser = self.open_denoiser(pipe, device)
        schedule = pipe.schedule(
            self.t_max, None, self.num_denoise_steps, self.method, self.spacing, denoiser=denoiser
        )
        guidance = pipe.default_guidance
        if self.guidance_weight is not None:
            guidance = replace(guidance, weight=self.guidance_weight)
        unlabelled = self.labels == "none" or pipe.flow.config.num_classes == 0
        return Generation(
            pipe=pipe,
            columns=ways_of(
                pipe,
                schedule,
                self.ways,
                denoiser=denoiser,
                dtype=self.cleaning_dtype,
                slice_size=self.denoise_batch_size,
                decode_size=self.decode_batch_size,
            ),
            labels=self.sample_labels(pipe),
            seed=self.seed,
            # Without labels the checkpoint's own weight plays no part, and one given here is refused.
            guidance=None if unlabelled and self.guidance_weight is None else guidance,
            t_max=schedule.config.t_max,
            **self.inverting(),
        )

    def _report(
        self,
        pipe: ITARFlowPipeline,
        generation: Generation,
        scores: dict[str, Scores],
        origin: Origin,
        speed: dict[str, float | None],
    ) -> None:
        made = json.loads((self.output / MANIFEST).read_text())
        counts = generation.labels[generation.labels >= 0].bincount(minlength=pipe.flow.config.num_classes)
        report = {
            "checkpoint": display_name(self.checkpoint),
            "samples": made,
            "labels": self.labels,
            "images of a class": sorted({int(count) for count in counts}) if self.labels != "none" else None,
            "denoiser": None if self.denoiser is None else display_name(self.denoiser),
            "reference": asdict(origin),
            "conversion": CONVERSION,
            "ways": {name: one.to_json() for name, one in scores.items()},
            "speed": speed,
            "made": {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                **versions(),
                "device": device_name(pipe),
            },
        }
        write_json(self.output / "evaluation.json", report)
        for name in scores:
            if self.npz:
                write_npz(open_samples(self.output / name), self.output / f"{name}.npz")
            if self.png:
                write_png(open_samples(self.output / name), self.output / f"{name}-png")
        console = Console()
        console.print(_table(scores))
        for warning in dict.fromkeys(warning for one in scores.values() for warning in one.warnings):
            console.print(f"[yellow]Note:[/] {escape(warning)}.", soft_wrap=True, highlight=False)
        if len(counts) and int(counts.min()) != int(counts.max()):
            say(f"Classes have {int(counts.min()):,} to {int(counts.max()):,} samples.")
        say(
            f"figures in {self.output / 'evaluation.json'}; samples in "
            + ", ".join(str(self.output / name) for name in scores)
        )
        folder = Path(self.checkpoint)
        if self.record and folder.is_dir():
            lines = {self._what(name, generation, one): _line(one) for name, one in scores.items()}
            known = read_index(folder).get("evaluations") or {}  # as others may have written it meanwhile
            noted = pipe.record(folder, "evaluations", {**known, **lines})
            card = "and its model card" if noted else "but not in its README.md, which somebody has written"
            say(f"noted in {folder} {card}")

    def _what(self, name: str, generation: Generation, scores: Scores) -> str:
        """What was evaluated, for the model card."""
        schedule, how = generation.columns[name].schedule, ""
        if name == "iterative" and schedule is not None:
            config = schedule.config
            how = f", {config.num_denoise_steps} steps {config.method} {config.spacing}"
            how += "" if self.denoiser is None else f" of {display_name(self.denoiser)}"
        weight = 0.0 if generation.guidance is None else generation.guidance.weight
        return (
            f"{name}{how}, guidance {weight:g}, t_max {generation.level:g}: {scores.samples:,} samples, labels "
            f"{self.labels}, seed {self.seed}, against {scores.reference}, by {scores.extractor}"
        )


def _line(scores: Scores) -> str:
    return ", ".join(f"{figure.title} {figure_text(figure)}" for figure in scores.figures.values())


def _table(scores: dict[str, Scores]) -> Table:
    """A row for each way of cleaning, a column for each figure."""
    first = next(iter(scores.values()))
    table = Table(
        title=f"{first.samples:,} samples against {first.reference}, by {first.extractor}", title_justify="left"
    )
    table.add_column("samples")
    titles = list(dict.fromkeys(figure.title for one in scores.values() for figure in one.figures.values()))
    for title in titles:
        table.add_column(escape(title.removesuffix(f" ({first.extractor})")), justify="right")
    if any(one.broken for one in scores.values()):
        table.add_column("not finite", justify="right")
    for name, one in scores.items():
        figures = {figure.title: figure_text(figure) for figure in one.figures.values()}
        broken = [f"{one.broken:,}"] if any(other.broken for other in scores.values()) else []
        table.add_row(name, *(figures.get(title, "-") for title in titles), *broken)
    return table
