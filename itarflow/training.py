"""The training loop, on Accelerate.

What a step does is a function of the recipe and the step's number: which images it sees (batches.py), their noise
levels, noise, flips and dropped labels (`draw`), and the learning rate. So nothing but weights, optimiser and step
need be stored for a resumed run to be the same run, and the number of processes does not matter.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from diffusers.training_utils import EMAModel
from rich.console import Console
from rich.markup import escape

from itarflow import run as runs
from itarflow.batches import Batch, GlobalBatchSampler, batches
from itarflow.codec import to_pixels
from itarflow.data import ImageData, load_data, too_many_broken
from itarflow.ema import averaged_weights, load_ema, save_ema
from itarflow.export import make_pipeline, sample_grid, training_record
from itarflow.flow import TARFlow, updated_prior_variance
from itarflow.images import DataError
from itarflow.interrupt import Interrupted, StopSignal
from itarflow.objective import Draws, Evaluation, Losses, describe, draw, evaluate, training_losses
from itarflow.processes import on_cpu, on_main
from itarflow.progress import training_progress
from itarflow.recipe import Recipe, learning_rate_factor, to_json
from itarflow.run import RunDir, RunError, Start, replace_folder, save_state


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and what to try."""


@dataclass(frozen=True)
class Summary:
    """What a finished training reports."""

    run: RunDir
    steps: int
    seconds: float
    """Of training, over all resumed parts."""
    images_per_second: float
    held_out: Evaluation
    """As `evaluate` returns it."""
    bad_steps: int
    unreadable_images: int
    class_names: tuple[str, ...]
    grid: Path


class _State(NamedTuple):
    """What a saved state holds besides Accelerate's files."""

    step: int = 0
    seconds: float = 0.0
    bad_steps: int = 0


def train(
    recipe: Recipe,
    run_path: Path,
    *,
    start: Start = "fresh",
    max_steps: int | None = None,
    allow_changes: bool = False,
) -> Summary:
    """Train a flow, and leave its states, grids, metrics and pipeline in the run's folder.

    Args:
        recipe: resolved settings.
        run_path: folder of the run.
        start: "fresh", "resume" or "restart", see `run.prepare`.
        max_steps: stop after so many optimiser steps; the learning-rate schedule is still the whole training's, so
            that a resumed run continues it.
        allow_changes: resume although settings differ from the stored ones.

    Raises:
        ValueError: settings or data that do not fit together.
        RunError: the folder can't be used, or a save failed.
        TrainingError: too many steps in a row were not finite.
        Interrupted: SIGINT or SIGTERM arrived; the state has been saved.
    """
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU
    recipe.check()
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision="no",  # the loop has its own autocast, so that evaluation and samples are float32
        gradient_accumulation_steps=recipe.train.accumulation,
        log_with=list(recipe.train.trackers) or None,
        project_dir=run_path,
    )
    recipe.check(accelerator.num_processes)
    on_main(accelerator, lambda: runs.check(run_path, recipe, start, allow_changes))
    data = load_data(recipe.data, image_size=recipe.model.image_size, in_channels=recipe.model.in_channels)
    check_classes(recipe, data)
    if recipe.data.in_memory:
        data = data.decoded()
    on_main(accelerator, lambda: runs.prepare(run_path, recipe, start, allow_changes))
    training = _Training(recipe, RunDir(run_path), data, accelerator, resume=start == "resume")
    try:
        return training.run_to(max_steps)
    finally:
        accelerator.end_training()


class _Training:
    """The objects of one training, and the loop over them."""

    def __init__(
        self, recipe: Recipe, run: RunDir, data: ImageData, accelerator: Accelerator, *, resume: bool
    ) -> None:
        self.recipe, self.run, self.data, self.accelerator = recipe, run, data, accelerator
        self.console = Console(quiet=not accelerator.is_main_process)
        self.warnings = Console(stderr=True)  # of every process: a broken image is met by one of them
        self.broken: set[str] = set()
        self.held_out = Evaluation({}, None)
        self.total_steps = recipe.num_steps(len(data.train))
        set_seed(recipe.train.seed)
        flow = recipe.model.build(recipe.noise_range)
        if recipe.train.gradient_checkpointing:
            flow.enable_gradient_checkpointing()
        if recipe.train.compile:
            flow.compile_repeated_blocks()
        optimizer = torch.optim.AdamW(
            flow.parameters(),
            lr=recipe.train.learning_rate,
            betas=recipe.train.betas,
            weight_decay=recipe.train.weight_decay,
            fused=accelerator.device.type == "cuda",
        )
        self.model, self.optimizer = accelerator.prepare(flow, optimizer)
        self.flow: TARFlow = accelerator.unwrap_model(self.model)
        self.ema = None if recipe.train.ema_decay is None else EMAModel(self.flow.parameters(), recipe.train.ema_decay)
        self.state = self._load_newest() if resume else _State()
        accelerator.init_trackers("logs", config=_scalars(to_json(recipe)))

    def run_to(self, max_steps: int | None) -> Summary:
        """Train up to max_steps or the end, evaluate, and export."""
        last_step = min(self.total_steps, max_steps or self.total_steps)
        self._describe_plan()
        self._name_decoded()
        first_step, loader = self.state.step, self._batches()
        bad_in_a_row, step_seconds = 0, 0.0
        with (
            StopSignal() as stop,
            training_progress(self.console, self.recipe.name, self.total_steps, first_step) as show,
        ):
            while self.state.step < last_step:
                began = time.perf_counter()
                losses, grad_norm, broken = self._step(self.state.step, loader)
                self._report_broken(broken)
                bad = not math.isfinite(grad_norm)
                bad_in_a_row = bad_in_a_row + 1 if bad else 0
                step_seconds += time.perf_counter() - began
                seconds = self.state.seconds + time.perf_counter() - began
                self.state = _State(self.state.step + 1, seconds, self.state.bad_steps + bad)
                self._check_bad(bad, bad_in_a_row, losses)
                speed = (self.state.step - first_step) * self.recipe.train.batch_size / step_seconds
                show(self.state.step, float(losses.loss) if self.state.step % 5 == 0 else None, speed)
                if self._due(self.recipe.train.log_every):
                    self._log(losses, grad_norm, speed)
                if self._stopped(stop):
                    self._save()
                    raise Interrupted(stop.signal_number or 0, self.run.path, self.state.step)
                self._chores(last_step)
        self._save()  # before anything else can go wrong
        self._evaluate()
        grid = self._sample()
        self._export()
        speed = (self.state.step - first_step) * self.recipe.train.batch_size / max(step_seconds, 1e-9)
        state = self.state
        return Summary(
            run=self.run,
            steps=state.step,
            seconds=state.seconds,
            images_per_second=speed,
            held_out=self.held_out,
            bad_steps=state.bad_steps,
            unreadable_images=len(self.broken),
            class_names=self.data.class_names if self.recipe.model.num_classes else (),
            grid=grid,
        )

    def _chores(self, last_step: int) -> None:
        """What is due now and then: what saves work first, and nothing shortly before the end does it anyway."""
        train = self.recipe.train
        evaluate_every, sample_every = self._intervals()
        if self._due(train.save_every) and self.state.step < last_step:
            self._save()
        if self._due(evaluate_every) and self.state.step + evaluate_every // 2 < last_step:
            self._evaluate()
        if self._due(sample_every) and self.state.step + sample_every // 2 < last_step:
            self._sample()

    def _intervals(self) -> tuple[int, int]:
        """Steps between held-out evaluations, and between sample grids."""
        train, steps_per_epoch = self.recipe.train, self.recipe.steps_per_epoch(len(self.data.train))
        every = (train.evaluate_every_epochs, train.sample_every_epochs)
        evaluate, sample = (max(1, round(epochs * steps_per_epoch)) for epochs in every)
        return evaluate, sample

    def _describe_plan(self) -> None:
        evaluate_every, sample_every = self._intervals()
        processes = self.accelerator.num_processes
        self.console.print(
            f"{len(self.data.train):,} training images, {len(self.data.held_out):,} held out. An epoch has "
            f"{self.recipe.steps_per_epoch(len(self.data.train)):.4g} steps, the whole training {self.total_steps:,}. "
            f"Held-out likelihood every {evaluate_every:,} steps, samples every {sample_every:,}, a saved state every "
            f"{self.recipe.train.save_every:,}.\n"
            f"{processes} process{'es' if processes > 1 else ''} on {self.accelerator.device.type}.",
            soft_wrap=True,
            highlight=False,
        )

    def _name_decoded(self) -> None:
        """Name the images that could not be decoded into memory: each process has tried them all."""
        names = (*self.data.train.broken, *self.data.held_out.broken)
        if self.accelerator.is_main_process:
            self._report_broken(names)
        self.broken |= set(names)

    # -- one step -----------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        train = self.recipe.train
        sampler = GlobalBatchSampler(
            len(self.data.train),
            train.batch_size,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            accumulation=train.accumulation,
            seed=train.seed,
            start_step=self.state.step,
        )
        return batches(self.data.train, sampler, self.recipe.data.num_workers)

    def _step(self, step: int, loader: Iterator[Batch]) -> tuple[Losses, float, list[str]]:
        """One optimiser step: mean losses over this process's micro-batches, gradient norm, and unreadable images."""
        train, accelerator = self.recipe.train, self.accelerator
        self.model.train()
        self._set_learning_rate(step)
        draws = draw(self.recipe, step, accelerator.device)
        parts: list[Losses] = []
        broken: list[str] = []
        grad_norm = math.nan
        for micro in range(train.accumulation):
            batch = next(loader)
            broken += batch.broken
            size = len(batch.images)
            start = (micro * accelerator.num_processes + accelerator.process_index) * size
            part = Draws(*(values[start : start + size] for values in draws))
            images = to_pixels(batch.images.to(accelerator.device, non_blocking=True))
            labels = batch.labels.to(accelerator.device, non_blocking=True)
            with accelerator.accumulate(self.model):
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=train.mixed_precision == "bf16"):
                    losses = training_losses(self.model, self.recipe, images, labels, part)
                accelerator.backward(losses.loss)
                if accelerator.sync_gradients:
                    limit = train.max_grad_norm or math.inf
                    grad_norm = float(accelerator.clip_grad_norm_(self.model.parameters(), limit))
                    if math.isfinite(grad_norm):
                        self.optimizer.step()
                    self.optimizer.zero_grad()
            parts.append(Losses(*(value.detach() for value in losses)))
        mean = Losses(*(torch.stack(values).mean(dim=0) for values in zip(*parts, strict=True)))
        if math.isfinite(grad_norm):
            self._after_update(mean)
        return mean, grad_norm, broken

    def _after_update(self, losses: Losses) -> None:
        if self.ema is not None:
            self.ema.step(self.flow.parameters())
        if self.recipe.model.volume_preserving:
            mean_square = self.accelerator.reduce(losses.mean_square, "mean")
            self.flow.prior_variance.copy_(updated_prior_variance(self.flow.prior_variance, mean_square.sqrt()[None]))

    def _set_learning_rate(self, step: int) -> None:
        train = self.recipe.train
        warmup = round(train.warmup_epochs * self.recipe.steps_per_epoch(len(self.data.train)))
        lowest = train.min_learning_rate / train.learning_rate
        rate = train.learning_rate * learning_rate_factor(step, warmup, self.total_steps, lowest)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _check_bad(self, bad: bool, in_a_row: int, losses: Losses) -> None:
        if bad:
            self.console.print(
                f"[yellow]Step {self.state.step}: the gradient is not finite (loss {float(losses.loss):g}); "
                f"the step was skipped ({in_a_row} in a row, {self.state.bad_steps} in all)."
            )
        if in_a_row >= self.recipe.train.max_bad_steps:
            self._save()  # these steps changed nothing: the weights are those of the last good one
            raise TrainingError(
                f"{in_a_row} steps in a row had no finite gradient, up to step {self.state.step}, whose state is "
                "saved. Go on by --resume --allow-changes with a lower train.learning_rate, a smaller "
                "train.max_grad_norm or train.mixed_precision no; or begin anew by --restart, also with a longer "
                "train.warmup_epochs."
            )

    def _report_broken(self, names: Sequence[str]) -> None:
        """Name each unreadable image once, and give up past the limit."""
        for name in names:
            if name not in self.broken:
                self.broken.add(name)
                self.warnings.print(
                    f"[yellow]Unreadable image, replaced by the next one: {escape(name)}", soft_wrap=True
                )
        self._check_broken()

    def _check_broken(self) -> None:
        if len(self.broken) > self.recipe.data.max_broken:
            raise too_many_broken(sorted(self.broken), self.recipe.data.max_broken)

    # -- now and then -------------------------------------------------------------------------------------------

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0

    def _log(self, losses: Losses, grad_norm: float, speed: float) -> None:
        loss, nll = self.accelerator.reduce(torch.stack([losses.loss, losses.nll]), "mean").tolist()
        if not self.accelerator.is_main_process:
            return
        on_gpu = self.accelerator.device.type == "cuda"
        values = {
            "step": self.state.step,
            "epoch": self.state.step / self.recipe.steps_per_epoch(len(self.data.train)),
            "loss": loss,
            "nll": nll + 0.5 * math.log(2 * math.pi),
            "grad_norm": grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": speed,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
            "seconds": self.state.seconds,
            "unreadable_images": len(self.broken),
        }
        self.run.log(values)
        self.accelerator.log({k: v for k, v in values.items() if v is not None}, step=self.state.step)

    def _evaluate(self) -> None:
        with self._sampling_weights():
            self.held_out = held_out = evaluate(self.flow, self.data.held_out, self.recipe, self.accelerator)
        self._report_broken(held_out.broken)
        if self.accelerator.is_main_process:
            self.run.log({"step": self.state.step, "held_out": {"nll": held_out.nll, "bpd": held_out.bpd}})
            flat = {f"held_out/nll at t={level}": value for level, value in held_out.nll.items()}
            if held_out.bpd is not None:
                flat["held_out/bpd"] = held_out.bpd
            self.accelerator.log(flat, step=self.state.step)
            self.console.print(f"step {self.state.step}  held-out {describe(held_out)}", soft_wrap=True)

    def _sample(self) -> Path:
        path = self.run.grid(self.state.step)
        with self._sampling_weights():
            pipeline = make_pipeline(self.flow, self.recipe, self.data.class_names, None)
            sample_grid(pipeline, self.recipe, path, self.accelerator)
        self.accelerator.wait_for_everyone()
        return path

    @contextmanager
    def _sampling_weights(self) -> Iterator[None]:
        """Averaged weights, and no compilation: sampling has other shapes at each token."""
        with averaged_weights(self.ema, self.flow), torch.compiler.set_stance("force_eager"):
            yield

    def _stopped(self, stop: StopSignal) -> bool:
        """Whether any process was asked to stop; all must agree, or they would wait for one another."""
        if self.accelerator.num_processes == 1:
            return stop.requested
        flag = torch.tensor([float(stop.requested)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    # -- states and the pipeline --------------------------------------------------------------------------------

    def _save(self) -> None:
        self.broken = set(gather_object(sorted(self.broken)))  # from here on those of all processes
        save_state(
            self.run,
            self.state.step,
            self.recipe.train.keep_states,
            self._write_state,
            self.accelerator.is_main_process,
            self.accelerator.wait_for_everyone,
        )
        self._export()
        self._check_broken()

    def _export(self) -> None:
        if self.accelerator.is_main_process:
            record = training_record(self.recipe, self.held_out, self._facts())
            with self._sampling_weights():
                pipeline = make_pipeline(self.flow, self.recipe, self.data.class_names, record)
                replace_folder(self.run.pipeline, pipeline.save_pretrained)
        self.accelerator.wait_for_everyone()

    def _write_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        if self.accelerator.is_main_process:
            if self.ema is not None:
                save_ema(self.ema, folder)
            progress = {**self.state._asdict(), "broken": sorted(self.broken)}
            (folder / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
        self.accelerator.wait_for_everyone()

    def _facts(self) -> dict[str, Any]:
        return {
            "train_images": len(self.data.train),
            "held_out_images": len(self.data.held_out),
            "steps": self.state.step,
            "total_steps": self.total_steps,
            "seconds": round(self.state.seconds, 1),
            "bad_steps": self.state.bad_steps,
            "unreadable_images": len(self.broken),
        }

    def _load_newest(self) -> _State:
        folder = self.run.states()[-1]
        try:
            progress = json.loads((folder / "progress.json").read_text())
            self.broken = set(progress.pop("broken"))
            state = _State(**progress)
            self.accelerator.load_state(str(folder))
            # It also restores a count of micro-batches, which means nothing under another accumulation.
            self.accelerator.step = 0
            if self.ema is not None:
                load_ema(self.ema, folder)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of many libraries, and all mean the same
            raise RunError(
                f"The state {folder} can't be read: {str(error).rstrip('. ')}. Remove it to resume from an older one."
            ) from error
        kept = [line for line in self.run.logged() if line["step"] <= state.step]
        measured = [line["held_out"] for line in kept if "held_out" in line]
        if measured:
            self.held_out = Evaluation(**measured[-1])
        self.accelerator.wait_for_everyone()  # all have read before one writes
        if self.accelerator.is_main_process:
            self.run.rewrite_metrics(kept)
        self.console.print(f"Resuming from {folder} at step {state.step} of {self.total_steps}.")
        return state


def check_classes(recipe: Recipe, data: ImageData) -> None:
    """Refuse a data set whose labels are not the model's.

    Raises:
        DataError: naming both numbers.
    """
    num_classes, found = recipe.model.num_classes, len(data.class_names)
    if num_classes and not found:
        raise DataError(
            f"The images in {recipe.data.path} have no labels, but model.num_classes is {num_classes}. Put each class "
            "in a folder of its own, name the column by data.label_column, or train without labels "
            "by --model.num-classes 0."
        )
    if num_classes and found != num_classes:
        raise DataError(
            f"The images in {recipe.data.path} have {found} classes, but model.num_classes is {num_classes}; "
            f"set --model.num-classes {found}, or 0 to ignore the labels."
        )


def _scalars(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flat and plain, as trackers want them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _scalars(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | bool | str) else str(value)
    return flat
