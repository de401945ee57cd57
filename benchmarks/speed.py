"""Training and sampling speed of a recipe's model on random images, on whatever device there is.

python benchmarks/speed.py recipes/cifar10.py
"""

from __future__ import annotations

import runpy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from itarflow import FlowDenoiser, Guidance, denoise
from itarflow.estimate import estimate
from itarflow.objective import draw, training_losses
from itarflow.recipe import Recipe


@dataclass
class Options:
    """Measure a recipe."""

    recipe: tyro.conf.Positional[Path]
    """The recipe file."""
    train_batch: int = 16
    """Images of a training step."""
    sample_batch: int = 16
    """Images sampled at a time."""
    repeats: int = 3
    """Timed repetitions, of which the median is shown, after one that is not timed."""
    bf16: bool = False
    """Autocast to bfloat16."""


def main(options: Options) -> None:
    """Print a table."""
    recipe: Recipe = runpy.run_path(str(options.recipe))["recipe"]
    recipe = replace(recipe, train=replace(recipe.train, batch_size=options.train_batch))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    flow = recipe.model.build(recipe.noise_range).to(device)
    costs = estimate(recipe)
    labels = torch.arange(max(options.train_batch, options.sample_batch), device=device) % max(
        recipe.model.num_classes, 1
    )
    known = labels[: options.sample_batch] if recipe.model.num_classes else None
    z = torch.randn(options.sample_batch, *flow.z_shape, device=device)
    t_min, t_max = recipe.noise.t_min, recipe.noise.t_max

    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-4, fused=device.type == "cuda")
    images = torch.rand(options.train_batch, *flow.image_shape, device=device) * 2 - 1
    draws = draw(recipe, 0, device)

    def step() -> None:
        losses = training_losses(flow, recipe, images, labels[: options.train_batch], draws)
        losses.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def inverse(guidance: Guidance) -> torch.Tensor:
        return flow.inverse(z, known, t_max, guidance=guidance)

    def scores(num_steps: int) -> torch.Tensor:
        noisy = z.reshape(len(z), *flow.image_shape)
        return denoise(FlowDenoiser(flow), noisy, known, t_max=t_max, t_min=t_min, num_steps=num_steps)

    tasks: dict[str, tuple[Callable[[], object], int]] = {
        "training step": (step, options.train_batch),
        "inverse, unguided": (lambda: inverse(Guidance()), options.sample_batch),
        "inverse, guided": (lambda: inverse(recipe.sampling.guidance), options.sample_batch),
        "one score": (lambda: scores(1), options.sample_batch),
        "ten scores": (lambda: scores(10), options.sample_batch),
    }
    with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
        seconds = {name: (_median(task, options.repeats, device), batch) for name, (task, batch) in tasks.items()}
    total = seconds["inverse, guided"][0] + seconds["ten scores"][0]
    seconds["sampling: guided inverse + ten scores"] = (total, options.sample_batch)

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    precision = "bf16" if options.bf16 else "float32"
    table = Table(title=f"{recipe.name}: {costs.parameters / 1e6:.1f}M parameters, {name}, {precision}")
    for column in ("what", "batch", "seconds", "images/s", "share of sampling"):
        table.add_column(column)
    for what, (time_of, batch) in seconds.items():
        share = "" if what == "training step" else f"{time_of / total:.0%}"
        table.add_row(what, str(batch), f"{time_of:.3f}", f"{batch / time_of:.2f}", share)
    console = Console(width=110)
    console.print(table)
    rate = costs.training_flops * options.train_batch / seconds["training step"][0]
    console.print(f"training: {costs.training_flops / 1e9:.1f} GFLOP an image, {rate / 1e12:.3f} TFLOP/s")


def _median(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
