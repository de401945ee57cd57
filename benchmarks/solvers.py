"""How many score evaluations each denoising solver needs to come near the exact solution, on a trained checkpoint.

    python benchmarks/solvers.py runs/digits/pipeline --output solvers.png

Noisy images are made by the checkpoint's flow with its default guidance, then denoised by each solver and spacing with
more and more evaluations. The reference is the same ODE from t_max to t_min and the same last step from t_min to 0, by
the predictor-corrector with 200 evaluations; that Euler tends to it, too, is shown. An error is the difference of
a pixel, not clamped, in 1/255 of the range of pixels; codes are decoded first. It needs no GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itarflow.codec import codec_of
from itarflow.denoisers import DenoiseScheduler, FlowDenoiser, denoise
from itarflow.denoisers.ode import Method, Spacing
from itarflow.pipeline import ITARFlowPipeline
from itarflow.runtime.pictures import blank_figure
from itarflow.runtime.seeds import image_generators

Solver = tuple[Method, Spacing]
Errors = dict[int, tuple[float, float]]
"""Largest and mean error in 1/255, by the number of evaluations."""

SOLVERS: tuple[Solver, ...] = (
    ("euler", "even"),
    ("euler", "quadratic"),
    ("heun", "even"),
    ("heun", "quadratic"),
    ("multistep", "even"),
    ("multistep", "quadratic"),
    ("predictor-corrector", "even"),
    ("predictor-corrector", "quadratic"),
)
REFERENCE: Solver = ("predictor-corrector", "quadratic")
REFERENCE_STEPS = 200
COUNTS = (*range(2, 13), 14, 16, 18, 20, 24, 28, 32, 40, 50, 60, 70, 80, 100, 150, 200, 300, 400, 500, 600, 700, 800)
CHECKS = (200, 400, 800)
SHOWN = (5, 8, 10, 12, 20)
ENOUGH = 3
"""A solver's curve ends after so many counts in a row whose largest error is below 1/255, but not before 20."""


@dataclass(frozen=True)
class Options:
    """Which checkpoint, and what to write."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, or a Hub id."""
    num_images: int = 8
    """How many images; labels are repeated in turn."""
    seed: int = 0
    """Image number i depends on the seed, on i and on its label."""
    output: Path | None = None
    """A picture file for the curves."""
    json: Path | None = None
    """A file for all errors."""


class Study:
    """Noisy images of a checkpoint, and how far a solver's clean ones are from the reference."""

    def __init__(self, options: Options) -> None:
        pipe = ITARFlowPipeline.from_pretrained(options.checkpoint)
        classes, self.scheduler = pipe.flow.config.num_classes, pipe.scheduler.config
        self.labels = torch.arange(options.num_images) % classes if classes else None
        generators = image_generators(torch.Generator().manual_seed(options.seed), options.num_images)
        with torch.no_grad():
            self.noisy = pipe.flow.inverse(
                pipe.flow.sample_prior(options.num_images, generators),
                self.labels,
                self.scheduler.t_max,
                guidance=pipe.default_guidance,
            )
        self.denoiser, self.codec = FlowDenoiser(pipe.flow), codec_of(pipe.vae, slice_size=8)
        self.reference = self.pixels(REFERENCE, REFERENCE_STEPS)

    @torch.no_grad()
    def pixels(self, solver: Solver, num_steps: int) -> Tensor:
        """(B, C, H, W) in about [-1, 1]."""
        method, spacing = solver
        clean = denoise(
            self.denoiser,
            self.noisy,
            self.labels,
            DenoiseScheduler(
                t_max=self.scheduler.t_max,
                t_min=self.scheduler.t_min,
                num_denoise_steps=num_steps,
                method=method,
                spacing=spacing,
            ),
        )
        return self.codec.decode(clean)

    def error(self, solver: Solver, num_steps: int) -> tuple[float, float]:
        """Largest and mean, in 1/255 of the range of pixels."""
        difference = (self.pixels(solver, num_steps) - self.reference).abs() * 127.5
        return difference.max().item(), difference.mean().item()

    def curve(self, solver: Solver) -> Errors:
        """The errors over the number of evaluations, until they stay small."""
        errors: Errors = {}
        for count in COUNTS:
            errors[count] = self.error(solver, count)
            if count >= SHOWN[-1] and all(largest <= 1 for largest, _ in list(errors.values())[-ENOUGH:]):
                break
        return errors


def fewest(errors: Errors) -> int | None:
    """The smallest number of evaluations from which on every tried one is within 1/255; None = none is."""
    found = None
    for count in sorted(errors, reverse=True):
        if errors[count][0] > 1:
            break
        found = count
    return found


def table_of(curves: dict[Solver, Errors], checks: Errors) -> Table:
    """A row a solver, then Euler's way to the reference."""
    table = Table(title="Largest (mean) difference from the reference, in 1/255")
    table.add_column("solver")
    table.add_column("spacing")
    for heading in ("fewest for 1/255", *(f"with {count}" for count in SHOWN)):
        table.add_column(heading, justify="right")
    for (method, spacing), errors in curves.items():
        figures = (f"{errors[n][0]:.2f} ({errors[n][1]:.3f})" for n in SHOWN)
        table.add_row(method, spacing, str(fewest(errors) or f"> {COUNTS[-1]}"), *figures)
    table.caption = "Euler, even: " + ", ".join(f"{n} steps {a:.3f} ({b:.4f})" for n, (a, b) in checks.items())
    return table


def draw(curves: dict[Solver, Errors], output: Path) -> None:
    """The largest and the mean error over the number of evaluations, both logarithmic."""
    figure = blank_figure(9.0, 3.8)
    axes = figure.subplots(1, 2)
    methods = list(dict.fromkeys(method for method, _ in curves))
    for which, (axis, title) in enumerate(zip(axes, ("largest", "mean"), strict=True)):
        for (method, spacing), errors in curves.items():
            style = "-" if spacing == "quadratic" else "--"
            axis.plot(
                list(errors),
                [error[which] for error in errors.values()],
                style,
                marker=".",
                markersize=4,
                linewidth=1.1,
                color=f"C{methods.index(method)}",
                label=f"{method}, {spacing}",
            )
        axis.set(xscale="log", yscale="log", xlabel="score evaluations")
        axis.set_title(f"{title} pixel difference, in 1/255", fontsize=10)
        axis.set_xticks([2, 5, 10, 20, 50, 100, 200, 500])
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.minorticks_off()
        axis.grid(linewidth=0.3)
    axes[0].axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes[1].legend(fontsize=7)
    figure.savefig(output, dpi=110)


def main(options: Options) -> None:
    """Measure, tell, and draw."""
    study, curves = Study(options), {}
    for solver in SOLVERS:
        curves[solver] = study.curve(solver)
    checks = {count: study.error(("euler", "even"), count) for count in CHECKS}
    Console(width=140).print(table_of(curves, checks))
    if options.output is not None:
        draw(curves, options.output)
    if options.json is not None:
        found = {" ".join(solver): errors for solver, errors in curves.items()}
        options.json.write_text(json.dumps({"errors": found, "euler": checks}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
