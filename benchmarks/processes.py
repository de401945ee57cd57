"""Trains the digits on 1, 2 and 4 processes, replicated and sharded, and compares losses and weights.

python benchmarks/processes.py --steps 30

On a CPU the processes talk by gloo; a small model is enough, since what is compared is arithmetic.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

RECIPE = Path(__file__).parents[1] / "recipes" / "digits.py"
SMALL = ("--model.channels", "32", "--model.num-layers", "1", "1", "--model.head-dim", "16", "--train.trackers",
         "--train.log-every", "1", "--sampling.num-images", "10", "--train.sample-every-epochs", "1000")  # fmt: skip
CASES = {
    "1 process": (1, ()),
    "1 process, 4 micro-batches": (1, ("--train.accumulation", "4")),
    "2 processes": (2, ()),
    "4 processes": (4, ()),
    "2 processes, sharded": (2, ("--train.shard",)),
    "4 processes, sharded, checkpointed": (4, ("--train.shard", "--train.gradient-checkpointing")),
}


@dataclass
class Options:
    """Compare numbers of processes."""

    steps: int = 30
    """Optimiser steps of each training."""


def main(options: Options) -> None:
    """Run each case, and print the largest differences from one process."""
    table = Table(
        "processes", "last loss", "loss", "held-out nll", "weights", title="Largest difference from 1 process"
    )
    reference: tuple[list[float], list[float], Path] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name, (processes, words) in CASES.items():
            run_dir = Path(folder, name.replace(" ", "-"))
            _train(run_dir, processes, ("--max-steps", str(options.steps), *words))
            losses, held_out = _metrics(run_dir)
            reference = reference or (losses, held_out, run_dir)
            weights = _largest_difference(reference[2], run_dir)
            table.add_row(
                name,
                f"{losses[-1]:.6f}",
                f"{max(abs(a - b) for a, b in zip(losses, reference[0], strict=True)):.1e}",
                f"{max(abs(a - b) for a, b in zip(held_out, reference[1], strict=True)):.1e}",
                f"{weights:.1e}",
            )
    Console().print(table)


def _train(run_dir: Path, processes: int, words: tuple[str, ...]) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(RECIPE), "--run-dir", str(run_dir)]
    subprocess.run([*command, *SMALL, *words], check=True, capture_output=True)


def _metrics(run_dir: Path) -> tuple[list[float], list[float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    held_out = [value for line in lines if "held_out" in line for value in line["held_out"]["nll"].values()]
    return [line["loss"] for line in lines if "loss" in line], held_out


def _largest_difference(one: Path, other: Path) -> float:
    ours, theirs = (load_file(run / "pipeline/flow/diffusion_pytorch_model.safetensors") for run in (one, other))
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
