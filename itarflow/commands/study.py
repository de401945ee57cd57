"""How a study in recipes/ becomes a command: its words, its messages and its closing table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from diffusers.utils.logging import disable_progress_bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.commands.console import reporting, say
from itarflow.commands.noise_dilemma import RAW, REAL, SELF, Study, distance_of, run_study
from itarflow.runtime.devices import usable_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """A study, and how to carry it out."""

    scale: str = "cpu"
    """The study's size, by name."""
    data: str | None = None
    """Where the images are, as --data.path of a recipe. None = as the study says."""
    output: Path | None = None
    """Folder of the study; the same command goes on in it. None = runs/study_noise_dilemma-SCALE."""
    extractor: str | None = None
    """Network whose features are compared: inception-v3-compat (its distance is FID), or efficientnet-lite0, which
    needs no download. None = as the study says."""
    features: Path | None = None
    """File with the extractor's weights, for machines that can't download them."""
    num_samples: int | None = None
    """Images of each flow. None = as the study says."""
    device: str | None = None
    """For samples and figures; the training goes by the launcher. None = a GPU if there is one."""


def main(studies: Mapping[str, Study], description: str | None = None, args: list[str] | None = None) -> None:
    """Run a study as a command; exits with 1 and a message where something is wrong.

    Args:
        studies: by the name of their size.
        description: what --help says first; usually the recipe file's docstring.
        args: the command line; None = the process's.
    """
    disable_progress_bar()  # diffusers' own, for the loading of files
    with reporting(Console(), "Try --scale cpu, or a smaller batch_size in the recipe."):
        options = tyro.cli(Options, description=description, args=args)
        study = _chosen(studies, options)
        folder = options.output or Path("runs") / f"study_noise_dilemma-{options.scale}"
        device = usable_device(options.device)
        report = run_study(study, folder, device=device, features=options.features, console=Console(stderr=True))
        Console().print(table_of(report))
        say(f"figures in {folder / 'study.json'}; see {folder / 'distances.png'} and {folder / 'samples.png'}")


def _chosen(studies: Mapping[str, Study], options: Options) -> Study:
    if options.scale not in studies:
        raise ValueError(f"--scale is {options.scale!r}; expected one of {', '.join(studies)}.")
    study = studies[options.scale]
    if options.data is not None:
        study = replace(study, recipe=replace(study.recipe, data=replace(study.recipe.data, path=options.data)))
    if options.num_samples is not None:
        if options.num_samples < 2:
            raise ValueError(f"--num-samples is {options.num_samples}; expected 2 or more.")
        study = replace(study, num_samples=options.num_samples)
    return study if options.extractor is None else replace(study, extractor=options.extractor)


def table_of(report: Mapping[str, Any]) -> Table:
    """A row for each flow, a column for each way of cleaning, and its likelihood."""
    ways = [RAW, SELF, *(f"{steps:02d}" for steps in report["settings"]["num_denoise_steps"])]
    title = distance_of(report[REAL])["title"]
    count = report["settings"]["num_samples"]
    table = Table(
        title=f"{escape(title)} of {count:,} samples, cleaned by steps of the iTARFlow",
        caption=f"self: one step of the flow itself. {count:,} held-out real images have "
        f"{distance_of(report[REAL])['value']:.4g}. nats/dim are of held-out images with noise of level t.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("flow", no_wrap=True)
    for way in ways:
        table.add_column(f"{int(way)}" if way.isdigit() else way, justify="right")
    table.add_column("nats/dim")
    best = min(distance_of(one)["value"] for flow in report["flows"].values() for one in flow["scores"].values())
    for name, flow in report["flows"].items():
        cells = []
        for way in ways:
            value = distance_of(flow["scores"][way])["value"] if way in flow["scores"] else None
            text = "-" if value is None else f"{value:.4g}"
            cells.append(f"[bold]{text}[/]" if value == best else text)
        nats = "\n".join(f"{one['nats/dim']['mean']:.3f} at {one['noise_level']:g}" for one in flow["likelihood"])
        table.add_row(name, *cells, nats)
    return table
