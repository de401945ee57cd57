"""What a recipe would cost: parameters, FLOPs, memory and time, without training."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.data.identity import described
from itarflow.presets import SIZES
from itarflow.runtime.devices import PEAK_TFLOPS
from itarflow.runtime.errors import DataError
from itarflow.runtime.text import counted, human_bytes, human_number
from itarflow.training.estimate import (
    USABLE,
    Activations,
    DeviceMemory,
    accumulation_for,
    activations,
    device_memory,
    estimate,
)
from itarflow.training.recipe import Recipe, open_data, open_vae


def dry_run(recipe: Recipe, console: Console, devices: int, memory: float | None) -> None:
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
    table.add_row("sampling", f"{costs.sampling_tokens} sequential token steps, {counted(scores, 'score')}")
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
        how: [activations(recipe, checkpointing=bool(how), sharded="FSDP2" in kind) for kind in kinds]
        for how in ("", ", gradient checkpointing")
    }
    precision = "bf16" if recipe.train.mixed_precision == "bf16" else "float32"
    title = "Memory of a training step" if devices == 1 else f"Memory of a training step on each of {devices} devices"
    table = Table("", *kinds, title=title, title_justify="left")
    for name, title in _PARTS.items():
        if any(getattr(kind, name) for kind in kinds.values()):
            table.add_row(title, *(human_bytes(getattr(kind, name)) for kind in kinds.values()))
    table.add_section()
    for how, needed in passes.items():
        table.add_row(f"one image in {precision}{how}", *(human_bytes(of.at_peak(1)) for of in needed))
        table.add_row(f"each further one{how}", *(human_bytes(of.per_image) for of in needed))
    if memory is not None:
        table.add_section()
        for how, needed in passes.items():
            pairs = zip(kinds.values(), needed, strict=True)
            fits = (_what_fits(recipe, kind, of, devices, memory) for kind, of in pairs)
            table.add_row(f"fits into {USABLE:.0%} of {memory:.4g} GiB{how}", *fits)
    return table


_UTILISATION = 0.4
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "average": "moving average",
    "exchange": "gathered from other devices",
    "draws": "random numbers of a step",
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
    tflops = PEAK_TFLOPS["H200"][recipe.products]
    seconds = (num_images or 10**6) * training_flops / (_UTILISATION * tflops * 1e12)
    unit, name = next((unit, name) for unit, name in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= unit)
    time = f"{seconds / max(unit, 1):.2g} {name}"
    what = "a million images" if num_images is None else f"an epoch of {num_images:,} images"
    peak = f"{tflops} TFLOP/s in {recipe.products}"
    return f"about {time} for {what}, if {_UTILISATION:.0%} of its {peak} are reached"


def _data_row(recipe: Recipe) -> tuple[str, int | None]:
    """A line about the data set, and its training images; one on the Hub that can't be reached is only reported."""
    path = recipe.data.path
    if path is None:
        what = (
            "a folder, parquet files or a Hub name" if recipe.codec.vae is None else "codes of vae/encode_dataset.py"
        )
        return f"[yellow]none yet: give {what} by --data.path", None
    try:
        vae = open_vae(recipe)
    except OSError:
        if not _on_hub(str(recipe.codec.vae)):
            raise
        reason = f"the VAE {recipe.codec.vae} is no folder here, and can't be loaded from the Hub"
        return f"[yellow]not checked: {escape(reason)}", None
    try:
        data = open_data(recipe, vae)
    except DataError as error:
        if path == "digits" or not _on_hub(path):
            raise
        return f"[yellow]not checked: {escape(str(error))}", None
    steps = recipe.num_steps(len(data.train))
    lines = [f"{path}: {steps:,} steps in {recipe.train.epochs:g} epochs", *described(data.identity)]
    return escape("\n".join(lines)), len(data.train)


def _on_hub(name: str) -> bool:
    """Whether a name can only be one on the Hub, which may be unreachable."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _paper_note(recipe: Recipe) -> str:
    for name, size in SIZES.items():
        if (recipe.model.channels, recipe.model.num_layers) == (size.channels, size.num_layers):
            return f"; iTARFlow-{name}, {size.paper_parameters} in the paper. {size.note}".rstrip()
    return ""
