"""The command vae/finetune_decoder.py: its words and its closing report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.commands.console import reporting
from itarflow.data.load import DataConfig
from itarflow.training.decoder.config import DecoderConfig
from itarflow.training.decoder.finetune import Tuned, fine_tune
from itarflow.training.run_folder import Start


@dataclass(frozen=True, kw_only=True)
class _Data(DataConfig):
    """The images; where they are is the first word of the command."""

    path: tyro.conf.Suppress[tyro.conf.Fixed[str | None]] = None


@dataclass(frozen=True, kw_only=True)
class _Config(DecoderConfig):
    data: _Data = field(default_factory=_Data)
    """The images."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to fine-tune, and how to run it."""

    images: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Where the images are: a folder, parquet files, or a data set on the Hugging Face Hub, as in training."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write."""
    config: Annotated[_Config, tyro.conf.arg(name="")]
    max_steps: int | None = None
    """Stop after so many optimiser steps. The learning-rate schedule stays that of train.steps, so that --resume can
    go on."""
    resume: bool = False
    """Go on from the newest saved state in OUT."""
    allow_changes: bool = False
    """With --resume: go on although settings differ from the stored ones."""
    restart: bool = False
    """Begin anew although OUT holds a run; the old folder is kept beside the new one."""

    def run(self) -> Tuned:
        """Carry the command out."""
        if self.resume and self.restart:
            raise ValueError("--resume and --restart exclude each other: go on with the run, or begin anew.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"--max-steps is {self.max_steps}; expected a number >= 1.")
        start: Start = "resume" if self.resume else "restart" if self.restart else "fresh"
        config = replace(self.config, data=replace(self.config.data, path=self.images))
        return fine_tune(config, self.out, start=start, max_steps=self.max_steps, allow_changes=self.allow_changes)


def main(description: str | None = None, args: list[str] | None = None) -> None:
    """Fine-tune as a command; exits with 1 and a message where something is wrong.

    Args:
        description: what --help says first; the script's docstring.
        args: the command line; None = the process's.
    """
    console = Console()
    advice = (
        "Try a higher --train.accumulation, --train.gradient-checkpointing, --train.mixed-precision bf16, or a "
        "--crop-size."
    )
    with reporting(console, advice):
        tuned = tyro.cli(Options, description=description, args=args).run()
        if PartialState().is_main_process:
            _report(tuned, console)


def _report(tuned: Tuned, console: Console) -> None:
    title = f"PSNR in dB of {tuned.held_out_images:,} held-out images"
    table = Table("noise of the codes", "before", "after", "gain", title=title, title_justify="left")
    for level, after in tuned.after.items():
        before = tuned.before.get(level)
        earlier = ("", "") if before is None else (f"{before:.2f}", f"{after - before:+.2f}")
        table.add_row(level, earlier[0], f"{after:.2f}", earlier[1])
    console.print(table)
    steps = f"{tuned.steps:,} step{'' if tuned.steps == 1 else 's'}"
    if tuned.steps < tuned.total_steps:
        steps += f" of {tuned.total_steps:,} (--resume goes on)"
    speed = f", {tuned.images_per_second:.0f} images/s" if tuned.images_per_second else ""
    lines = [f"{steps} in {tuned.seconds:.0f} s{speed}"]
    if tuned.bad_steps:
        lines.append(f"[yellow]{tuned.bad_steps} steps skipped, whose gradient was not finite[/]")
    if tuned.unreadable_images:
        lines.append(f"[yellow]{tuned.unreadable_images} unreadable images, each replaced by the next one[/]")
    lines += [escape(str(tuned.run.path / name)) for name in ("vae", "psnr.json", "comparison.png")]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
