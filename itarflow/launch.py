"""How a recipe becomes a command: overrides from the command line, the dry run, training, and the closing report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.presets import SIZES
from itarflow.runtime.devices import PEAK_TFLOPS, on_cpu
from itarflow.runtime.errors import DataError, RunError, TrainingError
from itarflow.runtime.processes import crash, refuse
from itarflow.runtime.signals import Interrupted
from itarflow.runtime.text import human_bytes, human_number
from itarflow.training.estimate import (
    USABLE,
    Activations,
    DeviceMemory,
    accumulation_for,
    activations,
    device_memory,
    estimate,
)
from itarflow.training.held_out import describe
from itarflow.training.recipe import Recipe, open_data, open_vae
from itarflow.training.run_folder import Start
from itarflow.training.settings import to_json
from itarflow.training.train import Summary, train


@dataclass(frozen=True, kw_only=True)
class Options:
    """A recipe and how to run it."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """Folder of the run; None = runs/NAME."""
    max_steps: int | None = None
    """Stop after so many optimiser steps. The learning-rate schedule stays that of the whole training, so that
    --resume can go on; to train shorter altogether, lower train.epochs."""
    save_every: int | None = None
    """Steps between saved states; None = the recipe's train.save_every."""
    find_micro_batch: bool = False
    """Try which micro-batch fits the memory, and set train.accumulation by it; the global batch stays."""
    dry_run: bool = False
    """Check settings and data, print parameters, FLOPs and memory, and stop."""
    devices: int | None = None
    """With --dry-run: estimate for so many devices; None = 1."""
    memory: float | None = None
    """With --dry-run: say what fits into so many GiB a device; None = those of the GPU, if there is one."""
    resume: bool = False
    """Go on from the newest saved state of the run."""
    allow_changes: bool = False
    """With --resume: go on although settings differ from the stored run's, such as a lower learning rate."""
    restart: bool = False
    """Begin anew although the run exists; the old folder is kept beside the new one."""


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
        options = tyro.cli(Options, default=Options(recipe=recipe), description=description, args=args)
        _run(options, console)


@contextmanager
def reporting(console: Console, advice: str) -> Iterator[None]:
    """Around a command of one or several processes: what ends it is said once, and becomes its exit status.

    Args:
        console: for what is no error.
        advice: what to try when memory runs out.
    """
    # Until one has downloaded a model, say, or sampled its share of a grid, the others wait.
    # From here on they know of one another, and say once what concerns all.
    PartialState(cpu=on_cpu(), timeout=timedelta(hours=2))
    try:
        yield
    except (DataError, ImportError, OSError, RunError, TrainingError, ValueError) as error:
        refuse(error)
    except torch.OutOfMemoryError as error:
        refuse(RuntimeError(f"{error}\n{advice}"))
    except KeyboardInterrupt:
        Console(stderr=True).print("[yellow]Stopped at once; nothing was saved beyond what the run's folder holds.")
        sys.exit(130)
    except Interrupted as stop:
        if PartialState().is_main_process:
            console.print(f"[yellow]{escape(str(stop))}", soft_wrap=True)
        sys.exit(stop.exit_code)
    except Exception as error:
        crash(error)


def _run(options: Options, console: Console) -> None:
    recipe = options.recipe
    if options.save_every is not None:
        recipe = replace(recipe, train=replace(recipe.train, save_every=options.save_every))
    if options.max_steps is not None and options.max_steps < 1:
        raise ValueError(f"--max-steps is {options.max_steps}; expected a number >= 1.")
    if options.resume and options.restart:
        raise ValueError("--resume and --restart exclude each other: go on with the run, or begin anew.")
    _check_estimates(options)
    recipe.check()
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    main_process = PartialState().is_main_process
    if main_process:
        console.print(_settings(recipe))
        if launched not in ("no", recipe.train.mixed_precision):
            console.print(
                f"[yellow]The launcher says mixed precision {launched}; the recipe's train.mixed_precision "
                f"{recipe.train.mixed_precision} is used."
            )
    if options.dry_run:
        if main_process:
            _dry_run(recipe, console, options.devices or 1, options.memory)
        return
    start: Start = "resume" if options.resume else "restart" if options.restart else "fresh"
    run_dir = options.run_dir or Path("runs") / recipe.name
    summary = train(
        recipe,
        run_dir,
        start=start,
        max_steps=options.max_steps,
        allow_changes=options.allow_changes,
        find_micro_batch=options.find_micro_batch,
    )
    if main_process:
        console.print(_report(summary))
        labels = " ".join(shlex.quote(name) for name in summary.class_names[:3])
        chosen = f" --class-labels {labels}" if labels else ""
        command = f"itarflow sample {summary.run.pipeline}{chosen} --num-images 9 --output samples.png"
        console.print(f"Next: [bold]{escape(command)}", soft_wrap=True)


def _check_estimates(options: Options) -> None:
    for name, value in (("--devices", options.devices), ("--memory", options.memory)):
        if value is not None and not options.dry_run:
            raise ValueError(f"{name} {value} belongs to the estimates of --dry-run; add that, or leave {name} out.")
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; expected a number > 0.")


def _settings(recipe: Recipe) -> Table:
    table = Table(title=f"Recipe {recipe.name}", show_header=False, title_justify="left")
    for section, values in to_json(recipe).items():
        if isinstance(values, dict):
            table.add_row(
                f"[bold]{section}",
                "  ".join(f"{key}=[cyan]{escape(_short(value))}[/]" for key, value in values.items()),
            )
    return table


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + " ".join(f"{key}={_short(item)}" for key, item in value.items()) + ")"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _dry_run(recipe: Recipe, console: Console, devices: int, memory: float | None) -> None:
    """Print what the recipe would cost, and check its data.

    Args:
        recipe: resolved.
        console: where to print.
        devices: how many there would be.
        memory: GiB of each; None = those of the GPU here, if there is one.

    Raises:
        DataError: the data is there, but can't be used.
    """
    costs = estimate(recipe)
    table = Table(title="Estimates", show_header=False, title_justify="left")
    table.add_row("parameters", f"{human_number(costs.parameters)} ({costs.parameters:,}){_paper_note(recipe)}")
    table.add_row("forward pass", f"{human_number(costs.forward_flops)}FLOP an image")
    table.add_row("training step", f"{human_number(costs.training_flops)}FLOP an image")
    scores = 0 if recipe.sampling.method == "skip" else recipe.sampling.num_denoise_steps
    table.add_row("sampling", f"{costs.sampling_tokens} sequential token steps, {scores} scores")
    table.add_row("sampling cache", f"{human_bytes(costs.cache_bytes)} an image in float32")
    data, num_images = _data_row(recipe)
    table.add_row("data", data)
    table.add_row("time on one H200", _time_row(recipe, costs.training_flops, num_images))
    console.print(table)
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    console.print(_memory_table(recipe, devices, memory))
    console.print("Dry run: nothing was trained or written.")


def _memory_table(recipe: Recipe, devices: int, memory: float | None) -> Table:
    """What a training step needs on one device, and how many images fit into its memory in GiB."""
    kinds = {"one device": device_memory(recipe)}
    if devices > 1:
        kinds = {
            "replicated (DDP)": device_memory(recipe, devices),
            "sharded (FSDP2)": device_memory(recipe, devices, sharded=True),
        }
    passes = {
        "": activations(recipe, checkpointing=False),
        ", gradient checkpointing": activations(recipe, checkpointing=True),
    }
    precision = "bf16" if recipe.train.mixed_precision == "bf16" else "float32"
    title = "Memory of a training step" if devices == 1 else f"Memory of a training step on each of {devices} devices"
    table = Table("", *kinds, title=title, title_justify="left")
    for name in ("weights", "gradients", "optimizer", "average", "exchange"):
        if any(getattr(kind, name) for kind in kinds.values()):
            table.add_row(_PARTS[name], *(human_bytes(getattr(kind, name)) for kind in kinds.values()))
    table.add_section()
    for how, needed in passes.items():
        table.add_row(f"one image in {precision}{how}", *[human_bytes(needed.at_peak(1))] * len(kinds))
        table.add_row(f"each further one{how}", *[human_bytes(needed.per_image)] * len(kinds))
    if memory is not None:
        table.add_section()
        for how, needed in passes.items():
            fits = (_what_fits(recipe, kind, needed, devices, memory) for kind in kinds.values())
            table.add_row(f"fits into {USABLE:.0%} of {memory:.4g} GiB{how}", *fits)
    return table


_UTILISATION = 0.4
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "average": "moving average",
    "exchange": "exchange with other devices",
}


def _what_fits(recipe: Recipe, device: DeviceMemory, needed: Activations, devices: int, memory: float) -> str:
    """Images at a time that the memory in GiB allows, and the accumulation that keeps the global batch."""
    largest, batch_size = device.largest_micro_batch(needed, int(memory * 2**30)), recipe.train.batch_size
    if largest == 0:
        return "[yellow]not even one image"
    accumulation = accumulation_for(batch_size, devices, largest)
    if accumulation is None:
        return f"{largest:,} images, [yellow]but {devices} devices can't share a batch of {batch_size} evenly"
    at_a_time = batch_size // (devices * accumulation)
    return f"{largest:,} images; --train.accumulation {accumulation} for {at_a_time} at a time"


def _time_row(recipe: Recipe, training_flops: int, num_images: int | None) -> str:
    """An epoch's time at a utilisation that large models often reach; of a million images, if there are none yet."""
    bf16 = recipe.train.mixed_precision == "bf16"
    tflops = PEAK_TFLOPS["H200"][0 if bf16 else 1]
    seconds = (num_images or 10**6) * training_flops / (_UTILISATION * tflops * 1e12)
    unit, name = next((unit, name) for unit, name in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= unit)
    time = f"{seconds / max(unit, 1):.2g} {name}"
    what = "a million images" if num_images is None else f"an epoch of {num_images:,} images"
    peak = f"{tflops} TFLOP/s in {'bf16' if bf16 else 'TF32'}"
    return f"about {time} for {what}, if {_UTILISATION:.0%} of its {peak} are reached"


def _data_row(recipe: Recipe) -> tuple[str, int | None]:
    """A line about the data set, and its training images; one on the Hub may be out of reach, which is only told."""
    path = recipe.data.path
    if path is None:
        what = (
            "a folder, parquet files or a Hub name" if recipe.codec.vae is None else "codes of vae/encode_dataset.py"
        )
        return f"[yellow]none yet: give {what} by --data.path", None
    try:
        vae = open_vae(recipe)
    except OSError as error:
        if not _on_hub(str(recipe.codec.vae)):
            raise
        return f"[yellow]not checked: {escape(str(error))}", None
    try:
        data = open_data(recipe, vae)
    except DataError as error:
        if path == "digits" or not _on_hub(path):
            raise
        return f"[yellow]not checked: {escape(str(error))}", None
    steps = recipe.num_steps(len(data.train))
    return (
        f"{escape(path)}: {len(data.train):,} training and {len(data.held_out):,} held-out images, "
        f"{len(data.class_names) or 'no'} classes; {steps:,} steps in {recipe.train.epochs:g} epochs"
    ), len(data.train)


def _on_hub(name: str) -> bool:
    """Whether a name can only be one on the Hub, which may be out of reach."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _paper_note(recipe: Recipe) -> str:
    for name, size in SIZES.items():
        if (recipe.model.channels, recipe.model.num_layers) == (size.channels, size.num_layers):
            return f"; iTARFlow-{name}, {size.paper_parameters} in the paper. {size.note}".rstrip()
    return ""


def _report(summary: Summary) -> Table:
    table = Table(title="Done", show_header=False, title_justify="left")
    steps = f"{summary.steps:,} step{'' if summary.steps == 1 else 's'}"
    if summary.steps < summary.total_steps:
        steps += f" of {summary.total_steps:,} (--resume goes on)"
    speed = f", {summary.images_per_second:.0f} images/s" if summary.images_per_second else ""
    table.add_row("trained", f"{steps} in {summary.seconds:.0f} s{speed}")
    table.add_row("held-out", describe(summary.held_out))
    if summary.bad_steps:
        table.add_row("skipped steps", f"[yellow]{summary.bad_steps} whose gradient was not finite")
    if summary.unreadable_images:
        table.add_row("unreadable images", f"[yellow]{summary.unreadable_images}, each replaced by the next one")
    table.add_row("sample grid", escape(str(summary.grid)))
    table.add_row("metrics", escape(str(summary.run.metrics)))
    table.add_row("pipeline", escape(str(summary.run.pipeline)))
    return table
