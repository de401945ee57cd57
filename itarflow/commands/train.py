"""How a recipe becomes a command: overrides from the command line, training, and the closing report."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.commands.console import parsed, reporting
from itarflow.commands.dry_run import dry_run
from itarflow.plugins import HELP, load_named
from itarflow.runtime.devices import usable_memory
from itarflow.runtime.launch import processes_here
from itarflow.runtime.text import flat
from itarflow.training.estimate import check_memory
from itarflow.training.finished import Summary
from itarflow.training.held_out import describe
from itarflow.training.recipe import Recipe
from itarflow.training.run_folder import Start
from itarflow.training.settings import to_json
from itarflow.training.sharding import launcher_asks_for_sharding
from itarflow.training.train import train


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a training begins and ends, of a flow or of a decoder."""

    max_steps: int | None = None
    """Stop after so many optimiser steps. The learning-rate schedule stays that of the whole training, so that
    --resume can go on; to train shorter altogether, lower train.epochs (of a decoder: train.steps)."""
    resume: bool = False
    """Go on from the newest saved state of the run."""
    allow_changes: bool = False
    """With --resume: go on although settings differ from the stored run's, such as a lower learning rate."""
    restart: bool = False
    """Begin anew although the run exists; the old folder is kept beside the new one."""

    def start(self) -> Start:
        """How to start in the run's folder; raises ValueError for options that exclude each other."""
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"--max-steps is {self.max_steps}; expected a number >= 1.")
        if self.resume and self.restart:
            raise ValueError("--resume and --restart exclude each other: go on with the run, or begin anew.")
        return "resume" if self.resume else "restart" if self.restart else "fresh"


@dataclass(frozen=True, kw_only=True)
class Options:
    """A recipe and how to run it."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """Folder of the run; None = runs/NAME."""
    save_every: int | None = None
    """Steps between saved states; None = the recipe's train.save_every."""
    find_micro_batch: bool = False
    """Try which micro-batch fits the memory, and set train.accumulation by it; the global batch stays."""
    check_memory: bool = True
    """Refuse a training of which the estimates of --dry-run say that it can't fit the memory."""
    dry_run: bool = False
    """Check settings and data, print parameters, FLOPs and memory, and stop."""
    devices: int | None = None
    """With --dry-run: estimate for so many devices; None = 1."""
    memory: float | None = None
    """With --dry-run: say what fits into so many GiB a device; None = those of the GPU, if there is one."""
    part: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)


def main(recipe: Recipe, description: str | None = None, args: list[str] | None = None) -> None:
    """Run a recipe as a command; exits with 1 and a message where something is wrong.

    Args:
        recipe: the defaults of all settings.
        description: what --help says first; usually the recipe file's docstring.
        args: the command line; None = the process's.
    """
    console = Console()
    advice = (
        "Try --train.gradient-checkpointing, --train.mixed-precision bf16, a higher --train.accumulation, or a lower "
        "--sampling.batch-size. --dry-run estimates the memory."
    )
    with reporting(console, advice):
        words = load_named(sys.argv[1:] if args is None else args)
        description = f"{description or ''}\n\n{HELP}"
        options = parsed(Options, default=Options(recipe=recipe), description=description, args=words)
        _run(options, recipe, console)


def _run(options: Options, written: Recipe, console: Console) -> None:
    recipe, start = options.recipe, options.part.start()
    if options.save_every is not None:
        recipe = replace(recipe, train=replace(recipe.train, save_every=options.save_every))
    _check_estimates(options)
    recipe.check()
    main_process = PartialState().is_main_process
    if main_process:
        console.print(_settings(recipe, written), soft_wrap=True, highlight=False)
        for what, said in _of_launcher(recipe).items():
            console.print(f"[yellow]The launcher or environment says {what} {said}; the recipe's is used.")
    if options.dry_run:
        if main_process:
            dry_run(recipe, console, options.devices or 1, options.memory)
        return
    # A run that goes on has had the memory.
    if options.check_memory and not options.find_micro_batch and start != "resume":
        _check_memory(recipe)
    run_dir = options.run_dir or Path("runs") / recipe.name
    summary = train(
        recipe,
        run_dir,
        start=start,
        max_steps=options.part.max_steps,
        allow_changes=options.part.allow_changes,
        find_micro_batch=options.find_micro_batch,
    )
    if main_process:
        console.print(_summary_table(summary))
        labels = " ".join(shlex.quote(name) for name in summary.class_names[:3])
        chosen = f" --class-labels {labels}" if labels else ""
        chosen += "" if summary.prompt is None else f" --prompt {shlex.quote(summary.prompt)}"
        command = f"itarflow sample {summary.run.pipeline}{chosen} --num-images 9 --output samples.png"
        console.print(f"Next: [bold]{escape(command)}", soft_wrap=True)


def _check_memory(recipe: Recipe) -> None:
    state = PartialState()
    memory = usable_memory(state.device)
    if memory is not None:
        sharded = recipe.train.shard or launcher_asks_for_sharding()
        here = processes_here() if state.device.type == "cpu" else 1
        check_memory(recipe, memory, state.num_processes, here=here, sharded=sharded)


def _check_estimates(options: Options) -> None:
    for name, value in (("--devices", options.devices), ("--memory", options.memory)):
        if value is not None and not options.dry_run:
            raise ValueError(f"{name} {value} belongs to the estimates of --dry-run; add that, or leave {name} out.")
        if value is not None and not 0 < value <= 10**6:
            raise ValueError(f"{name} is {value}; expected a number > 0, at most 1,000,000.")


def _of_launcher(recipe: Recipe) -> dict[str, str]:
    """What Accelerate's settings ask for, and the recipe decides otherwise."""
    train = recipe.train
    asked = {
        "mixed precision": ("ACCELERATE_MIXED_PRECISION", "no", train.mixed_precision),
        "gradient accumulation": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", str(train.accumulation)),
        "compilation by": ("ACCELERATE_DYNAMO_BACKEND", "no", "inductor" if train.compile else "no"),
    }
    said = {what: (os.environ.get(name, usual).lower(), usual, own) for what, (name, usual, own) in asked.items()}
    return {what: found for what, (found, usual, own) in said.items() if found not in (usual, own)}


def _settings(recipe: Recipe, written: Recipe) -> str:
    """A line: what the command line has changed in the recipe. All settings are in recipe.json."""
    before, now = flat(to_json(written)), flat(to_json(recipe))
    changed = {name: value for name, value in now.items() if name not in before or before[name] != value}
    changed.pop("name", None)
    title = f"Recipe [bold]{recipe.name}[/]"
    if not changed:
        return f"{title}, as it is written."
    return f"{title} with " + "  ".join(f"{name}=[cyan]{escape(_short(value))}[/]" for name, value in changed.items())


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _summary_table(summary: Summary) -> Table:
    table = Table(title="Done", show_header=False, title_justify="left")
    for title, text in summary.described().items():
        table.add_row(title, text)
    table.add_row("held-out", describe(summary.held_out))
    table.add_row("sample grid", escape(str(summary.grid)))
    table.add_row("metrics", escape(str(summary.run.metrics)))
    table.add_row("pipeline", escape(str(summary.run.pipeline)))
    return table
