"""Steps: a training's step, its spread over processes, and whole trainings as a user starts them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from costs import floor, training_cost

from gpu.figures import Figure, named_missing
from gpu.setting import LEVELS, Setting, tried
from itarflow.pipeline import ITARFlowPipeline
from itarflow.runtime.devices import tf32_products
from itarflow.training import DataConfig, NoiseConfig, Recipe, TrainConfig
from itarflow.training.estimate import USABLE, activations, device_memory
from itarflow.training.objective import draw, training_losses
from itarflow.training.sharding import clip_grad_norm, compile_layers

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
SHARD = "15MB"
"""Of weights: a file of at most 16 MB may be kept in a repository."""


def train(setting: Setting) -> Iterator[Figure]:
    """A step by the loop's own parts: its time, and its memory beside the estimate of a dry run."""
    many, few = (2, 2) if setting.dry else (64, 8)
    cases = [("", "bf16", many), ("checkpointed", "bf16", many), ("compiled", "bf16", many), ("", "TF32", few)]
    for case, dtype, images in cases:
        if setting.dry and case == "compiled":  # takes a compiler, and a minute
            continue
        yield tried(
            Figure(what="training step", case=case, dtype=dtype, images=images), lambda blank: _step(setting, blank)
        )


def _step(setting: Setting, blank: Figure) -> Figure:
    checkpointing, compiled = blank.case == "checkpointed", blank.case == "compiled"
    recipe = Recipe(
        name="check",
        model=setting.model,
        data=DataConfig(),
        noise=NoiseConfig(t_min=LEVELS[0], t_max=LEVELS[1]),
        train=TrainConfig(
            mixed_precision="bf16" if blank.dtype == "bf16" else "no",
            gradient_checkpointing=checkpointing,
            batch_size=blank.images,
        ),
    )
    held, passes = device_memory(recipe), activations(recipe, checkpointing=checkpointing)
    while setting.device.type == "cuda" and blank.images > 1:
        if held.at_peak(passes, blank.images) < USABLE * torch.cuda.get_device_properties(0).total_memory:
            break
        blank = replace(blank, images=blank.images // 2)
    recipe = replace(recipe, train=replace(recipe.train, batch_size=blank.images))
    flow = setting.flow().train().requires_grad_(True)
    if checkpointing:
        flow.enable_gradient_checkpointing()
    if compiled:
        compile_layers(flow)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-4, fused=True)
    images = torch.randint(256, (blank.images, *flow.image_shape), dtype=torch.uint8, device=setting.device)
    labels = torch.zeros(blank.images, dtype=torch.int64, device=setting.device)
    norms: list[float] = []

    def step() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=blank.dtype == "bf16"):
            losses = training_losses(flow, recipe, images, labels, draw(recipe, len(norms), setting.device))
        losses.loss.backward()
        norms.append(clip_grad_norm(flow, 1.0))
        optimizer.step()
        optimizer.zero_grad()

    with tf32_products(blank.dtype == "TF32"):
        first = setting.seconds(step)  # with all that the optimiser keeps from then on
        measured = setting.timed(blank, step, repeats=4)
    if not all(map(math.isfinite, norms)):
        return replace(measured, failed=f"gradient norms are {norms}")
    whole = None if setting.device.type != "cuda" else torch.cuda.max_memory_allocated(setting.device)
    # Of TF32 there is no measured peak here: its floor is that of bf16, which is half of its own.
    cost = training_cost(flow, blank.images, torch.bfloat16 if blank.dtype == "bf16" else torch.float32)
    return replace(
        measured,
        first_seconds=first,
        floor_seconds=floor([cost], setting.peaks[torch.bfloat16]),
        flops=cost.flops,
        moved_bytes=cost.moved_bytes,
        peak_bytes=whole,
        estimated_bytes=held.at_peak(passes, blank.images),
    )


def spread(setting: Setting) -> Iterator[Figure]:
    """One process under NCCL: collectives, FSDP2 on a mesh of one, and states that are saved and loaded."""
    words = [sys.executable, str(BENCHMARKS / "gpu" / "spread_of_one.py"), *(["--cpu"] if setting.dry else [])]
    yield _ran(Figure(what="one process of a launch"), setting, words, lines=3)


def recipe(setting: Setting) -> Iterator[Figure]:
    """The README's first training, shortened and resumed: grids within a training, workers after CUDA has begun."""
    folder = setting.out / "digits"
    shutil.rmtree(folder, ignore_errors=True)
    words = [sys.executable, str(ROOT / "recipes" / "digits.py"), "--run-dir", str(folder), "--train.trackers"]
    words += ["--data.no-in-memory", "--train.mixed-precision", "bf16", "--train.sample-every-epochs", "5"]
    stops = (4, 6) if setting.dry else (150, 200)
    if setting.dry:
        words += ["--model.channels", "64", "--model.num-layers", "1", "1", "--sampling.num-images", "4"]
    for case, steps, more in (("fresh", stops[0], []), ("resumed", stops[1], ["--resume"])):
        yield _ran(Figure(what="digits", case=case), setting, [*words, "--max-steps", str(steps), *more], lines=1)


def cifar10(setting: Setting) -> Iterator[Figure]:
    """A small model of CIFAR-10, trained for some minutes; the same command goes on where it was stopped."""
    if setting.data is None:
        yield Figure(what="CIFAR-10", left_out="no --data names a folder with its parquet files")
        return
    run, plan = setting.out / "cifar10", setting.out / "cifar10.json"
    words = [sys.executable, str(BENCHMARKS / "gpu" / "cifar10_recipe.py"), "--data.path", str(setting.data)]
    words += ["--train.trackers"]
    if setting.dry:
        words += ["--model.channels", "64", "--model.num-layers", "1", "1", "--train.batch-size", "16"]
        words += ["--data.held-out-images", "16", "--data.split", "train[:64]", "--sampling.num-images", "4"]
        words += ["--data.no-in-memory", "--data.num-workers", "0"]
    if plan.exists():
        epochs = json.loads(plan.read_text())["epochs"]
    else:
        trial = setting.out / "cifar10-trial"
        steps = 3 if setting.dry else 200
        shutil.rmtree(trial, ignore_errors=True)
        tried_out = _ran(
            Figure(what="CIFAR-10", case="trial"), setting,
            [*words, "--run-dir", str(trial), "--max-steps", str(steps), "--train.log-every", "1"],
        )  # fmt: skip
        yield tried_out
        if tried_out.failed is not None:
            return
        speed = statistics.median(line["images_per_second"] for line in _lines(trial) if "images_per_second" in line)
        # The rest is for its start, held-out evaluations, grids and the export.
        epochs = 1.0 if setting.dry else max(0.1, 0.85 * 60 * setting.minutes * speed / 50_000)
        plan.write_text(json.dumps({"epochs": epochs, "images a second": speed, "minutes": setting.minutes}))
        shutil.rmtree(trial, ignore_errors=True)
    words += ["--run-dir", str(run), "--train.epochs", str(epochs)]
    words += ["--train.evaluate-every-epochs", str(epochs / 8), "--train.sample-every-epochs", str(epochs / 4)]
    yield _ran(Figure(what="CIFAR-10"), setting, [*words, *(["--resume"] if run.exists() else [])], 3, to_stop=10.0)
    if (run / "pipeline").exists():
        yield tried(Figure(what="CIFAR-10", case="results"), lambda blank: _kept(setting, blank, run))


def _kept(setting: Setting, blank: Figure, run: Path) -> Figure:
    """The curve, the newest grid and the weights in bf16, beside the run."""
    kept = setting.out / "cifar10-kept"
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "metrics.jsonl", kept / "metrics.jsonl")
    grids = sorted((run / "samples").glob("*.png"))
    if grids:
        shutil.copy(grids[-1], kept / "samples.png")
    pipe = ITARFlowPipeline.from_pretrained(run / "pipeline", torch_dtype=torch.bfloat16)
    pipe.save_pretrained(kept / "pipeline", max_shard_size=SHARD)
    held_out = [line["held_out"]["nll"] for line in _lines(run) if "held_out" in line]
    more = {"largest file, MB": max(path.stat().st_size for path in kept.rglob("*") if path.is_file()) / 1e6}
    done = subprocess.run(
        [sys.executable, "-m", "itarflow", "plot", str(run), "--output", str(kept / "curves.png")],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        more["curves.png"] = f"not drawn: {' '.join(done.stderr.split())[-120:]}"
    return replace(blank, more={**more, "held-out nats/dim by noise level": held_out[-1:], "kept": str(kept)})


def study(setting: Setting) -> Iterator[Figure]:
    """The noise dilemma with four flows at a GPU's scale; the same command goes on where it was stopped."""
    words = [sys.executable, str(ROOT / "experiments" / "noise_dilemma.py")]
    if setting.dry:
        yield _ran(Figure(what="noise dilemma", case="--help"), setting, [*words, "--help"])
        yield Figure(what="noise dilemma", left_out="a dry run only asks for --help: its smallest scale takes an hour")
        return
    if setting.data is None:
        yield Figure(what="noise dilemma", left_out="no --data names a folder with CIFAR-10's parquet files")
        return
    words += ["--scale", "gpu", "--data", str(setting.data), "--output", str(setting.out / "study")]
    if setting.features is None:
        words += ["--extractor", "efficientnet-lite0"]  # needs no download; its distances are no FID
    else:
        words += ["--features", str(setting.features)]
    yield _ran(Figure(what="noise dilemma"), setting, words, lines=8, to_stop=10.0)


def _ran(blank: Figure, setting: Setting, words: Sequence[str], lines: int = 0, to_stop: float = 2.0) -> Figure:
    """A command, which is asked to stop when its time is over: a training then saves its state.

    Args:
        blank: what it is called.
        setting: how much time there is.
        words: the command.
        lines: how many of the last of its output are kept.
        to_stop: seconds that it has to save its state.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    environment |= {"COLUMNS": "150", "ACCELERATE_USE_CPU": "true"} if setting.dry else {"COLUMNS": "150"}
    began, stopped = time.monotonic(), False
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        told, _ = process.communicate(timeout=None if setting.dry else max(1.0, setting.left - 1.5 * to_stop))
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGTERM)
        try:
            told, _ = process.communicate(timeout=to_stop)
        except subprocess.TimeoutExpired:
            process.kill()
            told, _ = process.communicate()
    tail = [line.strip(" │") for line in told.splitlines() if any(map(str.isalnum, line))]  # no frames of tables
    plain = [line for line in tail if "│" not in line]  # nor their rows
    more = {"": " / ".join(plain[-lines:])} if lines else {}
    measured = replace(blank, seconds=time.monotonic() - began, more=more)
    if stopped:
        return replace(measured, failed=f"its time was over; the same command goes on: {tail[-1] if tail else ''}")
    if process.returncode and (missing := named_missing(told)) is not None:
        return replace(blank, left_out=missing)
    if process.returncode:
        return replace(measured, failed=f"exit status {process.returncode}: {' / '.join(tail[-3:])}")
    return measured


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
