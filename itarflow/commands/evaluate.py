"""`itarflow evaluate`: samples of a checkpoint, and their FID and other scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from itarflow.commands.console import say
from itarflow.commands.guidance import OneGuidance
from itarflow.commands.options import Scoring, noted_evaluations
from itarflow.commands.score_table import figure_text, print_scores, score_table
from itarflow.denoisers.ode import Method
from itarflow.denoisers.score import Denoiser
from itarflow.evaluation.metrics.scores import Scores
from itarflow.evaluation.samples.denoising import VARIANTS, VariantName, variants_of
from itarflow.evaluation.samples.files import open_samples, write_npz, write_png
from itarflow.evaluation.samples.generate import Generation
from itarflow.evaluation.samples.manifest import read_manifest
from itarflow.evaluation.samples.prompts import SamplePrompts
from itarflow.inverse.guidance import Guidance
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.files import check_no_link, check_writable, write_json
from itarflow.runtime.text import display_name


@dataclass(frozen=True, kw_only=True)
class Evaluate(Scoring, OneGuidance):
    """Make many samples of a checkpoint and compare them with real images: FID, sFID, IS, KID, precision, recall.

    Example: itarflow evaluate runs/cifar10/pipeline --data uoft-cs/cifar10 --num-samples 50000

    Samples are scored raw (noisy, as the flow has made them), self-denoised (one step, as TARFlow does) and
    iteratively denoised (as iTARFlow does). Image i depends on the checkpoint, the seed, i and its label
    only. The same command goes on after an interruption. Several GPUs share the work:
    accelerate launch -m itarflow evaluate ...
    """

    ways: Annotated[tuple[VariantName, ...] | None, tyro.conf.arg(metavar="WAY ...")] = None
    """Denoising variants to score: raw, self, iterative. None = all that the checkpoint has."""
    method: Method | None = None
    """Solver of iterative denoising. None = the checkpoint's."""
    t_max: float | None = None
    """Noise level of the flow's samples. None = the checkpoint's."""
    num_denoise_steps: int | None = None
    """Score evaluations of the iterative variant. None = the checkpoint's."""
    npz: bool = False
    """Write the samples of each variant as an .npz file too, which ADM's evaluation suite reads."""
    png: bool = False
    """Write them as folders of PNG files too."""
    record: bool = True
    """Write the figures into the checkpoint's settings and model card, if it is a folder here."""

    def check(self) -> None:
        """See `Scoring`."""
        super().check()
        for name in VARIANTS if self.png else ():
            check_no_link(self.folder / f"{name}-png")
        if self.record and Path(self.checkpoint).is_dir():
            check_writable(Path(self.checkpoint))

    def generations(
        self, pipe: ITARFlowPipeline, denoiser: Denoiser | None, prompts: SamplePrompts
    ) -> dict[str, Generation]:
        """See `Scoring`."""
        schedule = pipe.schedule(
            self.t_max, None, self.num_denoise_steps, self.method, self.spacing, denoiser=denoiser
        )
        guidance = self.guidance_of(pipe.default_guidance)
        generation = Generation(
            pipe=pipe,
            variants=variants_of(pipe, schedule, self.ways, denoiser=denoiser, **self.denoising()),
            labels=self.sample_labels(pipe),
            seed=self.seed,
            # Without labels the checkpoint's own weight plays no part, and one given here is refused.
            guidance=guidance or (pipe.default_guidance if self.guided_by(pipe) else None),
            t_max=schedule.config.t_max,
            prompts=prompts,
            **self.inverting(),
        )
        return {"": generation}

    def finish(self, made: Mapping[str, Generation], scores: Mapping[Path, Scores], report: dict[str, Any]) -> None:
        """See `Scoring`."""
        (generation,) = made.values()
        pipe = generation.pipe
        found = {folder.name: one for folder, one in scores.items()}
        counts = generation.labels[generation.labels >= 0].bincount(minlength=pipe.flow.config.num_classes)
        report |= {
            "guidance": asdict(generation.guidance or pipe.default_guidance),
            "samples": read_manifest(self.folder),
            "images of a class": sorted({int(count) for count in counts}) if self.labels != "none" else None,
            "ways": {name: one.to_json() for name, one in found.items()},
        }
        print_scores(score_table(("samples",), {(name,): one for name, one in found.items()}), found)
        write_json(self.folder / "evaluation.json", report)
        for folder in scores:
            if self.npz:
                write_npz(open_samples(folder), self.folder / f"{folder.name}.npz")
            if self.png:
                write_png(open_samples(folder), self.folder / f"{folder.name}-png")
        if len(counts) and int(counts.min()) != int(counts.max()):
            say(f"Classes have {int(counts.min()):,} to {int(counts.max()):,} samples.")
        say(f"figures in {self.folder / 'evaluation.json'}; samples in " + ", ".join(map(str, scores)))
        folder = Path(self.checkpoint)
        if self.record and folder.is_dir():
            lines = {self._what(name, generation, one): _line(one) for name, one in found.items()}
            noted = pipe.record(folder, "evaluations", lambda known: {**noted_evaluations(known), **lines})
            card = "and its model card" if noted else "but not in its README.md, which was edited by hand"
            say(f"noted in {folder} {card}")

    def _what(self, name: str, generation: Generation, scores: Scores) -> str:
        """What was evaluated, for the model card."""
        schedule, how = generation.variants[name].schedule, ""
        if name == "iterative" and schedule is not None:
            config = schedule.config
            how = f", {config.num_denoise_steps} steps {config.method} {config.spacing}"
            how += "" if self.denoiser is None else f" of {display_name(self.denoiser)}"
        weight = 0.0 if generation.guidance is None else generation.guidance.weight
        how += "" if generation.guidance is None else _parts(generation.guidance, generation.pipe.default_guidance)
        how += "" if self.protocol == "rounded" else ", protocol official"
        what = " ".join(f"{key} {value}" for key, value in (self.told() or {"labels": self.labels}).items())
        return (
            f"{name}{how}, guidance {weight:g}, t_max {generation.level:g}: {scores.samples:,} samples, {what}, seed "
            f"{self.seed}, against {scores.reference}, by {scores.extractor}"
        )


def _parts(guidance: Guidance, stored: Guidance) -> str:
    """What is not as the checkpoint says, beside the weight."""
    there, now = asdict(stored), asdict(guidance)
    return "".join(f", guidance {name} {now[name]}" for name in now if name != "weight" and now[name] != there[name])


def _line(scores: Scores) -> str:
    return ", ".join(f"{figure.title} {figure_text(figure)}" for figure in scores.figures.values())
