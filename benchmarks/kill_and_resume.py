"""Kills a training by SIGKILL at random instants, resumes it each time, and compares it with one left in peace.

python benchmarks/kill_and_resume.py --kills 30

A tiny model on the digits, a state every other step, so that many of the kills fall into a save. One kill in five
comes while the process is still starting. The table says for each process where it began, when it was killed, and what
was on the disk then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

RECIPE = Path(__file__).parents[1] / "recipes" / "digits.py"
TINY = ("--model.channels", "16", "--model.num-layers", "1", "1", "--model.head-dim", "16", "--model.patch-size", "4",
        "--train.trackers", "--train.log-every", "1", "--train.accumulation", "2", "--data.no-in-memory",
        "--data.num-workers", "1", "--sampling.num-images", "10", "--train.sample-every-epochs", "100",
        "--save-every", "2")  # fmt: skip


@dataclass
class Options:
    """Kill and resume."""

    kills: int = 30
    """How often."""
    steps: int = 300
    """Optimiser steps of the training."""
    seed: int = 0
    """Of the instants."""


def main(options: Options) -> int:
    """Run both trainings, print the table, and exit with 1 if they differ."""
    console = Console()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        peaceful, disturbed = Path(folder, "peaceful"), Path(folder, "disturbed")
        startup, whole = _finish(_start(peaceful, options.steps), peaceful)
        console.print(f"Undisturbed: first step after {startup:.1f} s, all {options.steps} in {whole:.1f} s.")
        table = Table("process", "began at step", "killed after", "newest state then", "being written then")
        window = 1.2 * (whole - startup) / options.kills  # so that the last kill still finds a training
        for kill in range(1, options.kills + 1):
            resumed, began = _newest(disturbed), time.time()
            process = _start(disturbed, options.steps)
            if kill % 5:
                _wait_for_a_step(process, disturbed)
            time.sleep(rng.uniform(0, window if kill % 5 else startup))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            newest, writing = _newest(disturbed), _being_written(disturbed, began)
            table.add_row(str(kill), str(resumed), f"{time.time() - began:.2f} s", str(newest), writing)
        resumed = _newest(disturbed)
        _finish(_start(disturbed, options.steps), disturbed)
        table.add_row(str(options.kills + 1), str(resumed), "never", str(options.steps), "")
        console.print(table)
        same_weights, same_losses = _same_weights(peaceful, disturbed), _losses(peaceful) == _losses(disturbed)
    console.print(f"Weights identical: {same_weights}. All {options.steps} losses identical: {same_losses}.")
    return 0 if same_weights and same_losses else 1


def _start(run_dir: Path, steps: int) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if (run_dir / "recipe.json").exists() else []
    command = [sys.executable, str(RECIPE), "--run-dir", str(run_dir), *TINY, "--max-steps", str(steps), *resume]
    # A group of its own: a kill takes the loader's workers along, as the end of a machine does.
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def _finish(process: subprocess.Popen[bytes], run_dir: Path) -> tuple[float, float]:
    """Seconds until the first step was logged, and until the end."""
    began, first = time.perf_counter(), 0.0
    while process.poll() is None:
        if not first and (run_dir / "metrics.jsonl").exists():
            first = time.perf_counter() - began
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError((process.stderr.read() if process.stderr else b"").decode())
    return first, time.perf_counter() - began


def _wait_for_a_step(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Until the process has logged a step of its own."""
    metrics, began = run_dir / "metrics.jsonl", time.time()
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime > began):
        time.sleep(0.005)


def _newest(run_dir: Path) -> int:
    return max((int(state.name[-8:]) for state in run_dir.glob("state/step-*")), default=0)


def _being_written(run_dir: Path, since: float) -> str:
    found = [*run_dir.glob("state/.partial-*"), *run_dir.glob(".partial-*")]
    found = [path for path in found if path.stat().st_mtime > since]
    return ", ".join("a state" if path.parent.name == "state" else path.name[17:] for path in found)


def _same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(run / "pipeline/flow/diffusion_pytorch_model.safetensors") for run in (one, other))
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def _losses(run_dir: Path) -> dict[int, float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
