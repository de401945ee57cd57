"""Is the estimate of a training step's memory right? Real steps of a small model, each in a process of its own.

python benchmarks/memory.py

On a GPU the peak is what PyTorch has allocated. On a CPU it is the growth of the resident memory, with the C library
told to give freed tensors back at once: by default it keeps so many that the peak says little about what is in use.
"""

from __future__ import annotations

import gc
import multiprocessing
import runpy
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import tyro
from resident import give_back_freed_tensors, one_step_of_a_tiny_model, peak_resident
from rich.console import Console
from rich.table import Table

from itarflow.runtime.text import human_bytes
from itarflow.training import Recipe
from itarflow.training.estimate import activations, device_memory
from itarflow.training.objective import draw, training_losses


@dataclass
class Options:
    """Compare estimates with real steps."""

    recipe: Path = Path(__file__).resolve().parents[1] / "recipes" / "cifar10.py"
    """The recipe file."""
    channels: int = 256
    """Width of its model instead of its own."""
    micro_batches: tuple[int, ...] = (2, 8, 16)
    """Images at a time."""


def main(options: Options) -> None:
    """Print a table."""
    give_back_freed_tensors()
    recipe: Recipe = runpy.run_path(str(options.recipe))["recipe"]
    recipe = replace(recipe, model=replace(recipe.model, channels=options.channels))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    table = Table(title=f"{recipe.name} with {options.channels} channels, on {where}", title_justify="left")
    for column in ("precision", "checkpointing", "micro-batch", "estimated", "measured", "estimated / measured"):
        table.add_column(column)
    for precision in ("no", "bf16"):
        for checkpointing in (False, True):
            train = replace(recipe.train, mixed_precision=precision, gradient_checkpointing=checkpointing)
            variant = replace(recipe, train=train)
            device, needed = device_memory(variant), activations(variant, checkpointing=checkpointing)
            for size in options.micro_batches:
                expected, real = device.at_peak(needed, size), _alone(variant, size)
                name = "float32" if precision == "no" else precision
                table.add_row(
                    name, "yes" if checkpointing else "no", str(size), human_bytes(expected), human_bytes(real),
                    f"{expected / real:.2f}",
                )  # fmt: skip
    Console(width=110).print(table)


def _alone(recipe: Recipe, micro_batch: int) -> int:
    """`measured` in a fresh process, whose memory nothing has touched."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, recipe, micro_batch).result()


def measured(recipe: Recipe, micro_batch: int) -> int:
    """Bytes at the peak of two optimiser steps of two micro-batches each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = replace(recipe, train=replace(recipe.train, batch_size=micro_batch, accumulation=1))
    one_step_of_a_tiny_model(device)
    gc.collect()
    before = psutil.Process().memory_info().rss
    flow = recipe.model.build(recipe.noise_range).to(device)
    if recipe.train.gradient_checkpointing:
        flow.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(flow.parameters(), fused=device.type == "cuda")
    average = [parameter.detach().clone() for parameter in flow.parameters() if recipe.train.ema_decay is not None]
    images = torch.randint(256, (micro_batch, *flow.image_shape), dtype=torch.uint8, device=device)
    labels = torch.zeros(micro_batch, dtype=torch.int64, device=device)
    for step in range(2):
        for _ in range(2):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.mixed_precision == "bf16"):
                losses = training_losses(flow, recipe, images, labels, draw(recipe, step, device))
            losses.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    del average
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident() - before


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
