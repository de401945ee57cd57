"""The command vae/finetune_decoder.py: its options and its summary."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.commands.console import parsed, reporting
from itarflow.commands.train import RunOptions
from itarflow.data.load import DataConfig
from itarflow.training.decoder.config import DecoderConfig
from itarflow.training.decoder.finetune import Tuned, fine_tune


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
    part: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)

    def run(self) -> Tuned:
        """Carry the command out."""
        config = replace(self.config, data=replace(self.config.data, path=self.images))
        part, start = self.part, self.part.start()
        return fine_tune(config, self.out, start=start, max_steps=part.max_steps, allow_changes=part.allow_changes)


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
        tuned = parsed(Options, description=description, args=args).run()
        if PartialState().is_main_process:
            _print_tuned(tuned, console)


def _print_tuned(tuned: Tuned, console: Console) -> None:
    title = f"PSNR in dB of {tuned.held_out_images:,} held-out images"
    table = Table("noise of the codes", "before", "after", "gain", title=title, title_justify="left")
    for level, after in tuned.after.items():
        before = tuned.before.get(level)
        earlier = ("", "") if before is None else (f"{before:.2f}", f"{after - before:+.2f}")
        table.add_row(level, earlier[0], f"{after:.2f}", earlier[1])
    console.print(table)
    lines = [f"{title}: {text}" for title, text in tuned.described().items()]
    lines += [escape(str(tuned.run.path / name)) for name in ("vae", "psnr.json", "comparison.png")]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
