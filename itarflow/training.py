"""The training loop, on Accelerate.

What a step does is a function of the recipe and the step's number: which images it sees (batches.py), their noise
levels, noise, flips and dropped labels (`objective.draw`), and the learning rate. So nothing but weights, optimiser
and step need be stored for a resumed run to be the same run, and the number of processes does not matter.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from itarflow import run as runs
from itarflow.batches import Batch, batches, training_sampler
from itarflow.codec import Vae
from itarflow.data import ImageData
from itarflow.estimate import estimate
from itarflow.export import make_pipeline, open_denoiser, sample_grid, training_record
from itarflow.flow import TARFlow, updated_prior_variance
from itarflow.images import DataError
from itarflow.insight import (
    bucket_edges,
    in_bits,
    memory_gib,
    peak_tflops,
    step_metrics,
    step_sums,
    watch_blocks,
    worst_level,
)
from itarflow.interrupt import Interrupted, StopSignal
from itarflow.microbatch import find_accumulation
from itarflow.monitor import Monitor
from itarflow.objective import Evaluation, Losses, draw, evaluate, training_losses
from itarflow.processes import agreed, agreed_state, make_accelerator, on_main
from itarflow.progress import training_progress
from itarflow.recipe import Recipe, learning_rate_factor, open_data, open_vae
from itarflow.run import RunDir, RunError, Start, replace_folder
from itarflow.sharding import (
    clip_grad_norm,
    compile_layers,
    distribute,
    launcher_asks_for_checkpointing,
    launcher_asks_for_sharding,
    load_tensors,
    save_tensors,
    whole_flow,
)
from itarflow.states import PROGRESS, first_cause, save_state


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and what to try."""


@dataclass(frozen=True)
class Summary:
    """What a finished training reports."""

    run: RunDir
    steps: int
    total_steps: int
    """Of the whole training; more than `steps` if it was told to stop before."""
    seconds: float
    """Of training, over all resumed parts."""
    images_per_second: float
    held_out: Evaluation
    """As `evaluate` returns it."""
    bad_steps: int
    unreadable_images: int
    class_names: tuple[str, ...]
    grid: Path


_ANOTHER = "another process can't read its images; its message says why"


class _State(NamedTuple):
    """Where a training is, besides its tensors."""

    step: int = 0
    seconds: float = 0.0
    bad_steps: int = 0


class _Step(NamedTuple):
    """What one optimiser step tells of this process's images."""

    losses: Losses
    noise_level: Tensor
    """(b,)"""
    grad_norm: float
    """Of all processes; not finite if the step was skipped."""
    moments: Tensor
    """As `watch_blocks` collects them; zeros unless the step is logged."""


def train(
    recipe: Recipe,
    run_path: Path,
    *,
    start: Start = "fresh",
    max_steps: int | None = None,
    allow_changes: bool = False,
    find_micro_batch: bool = False,
) -> Summary:
    """Train a flow, and leave its states, grids, metrics and pipeline in the run's folder.

    Args:
        recipe: resolved settings.
        run_path: folder of the run.
        start: "fresh", "resume" or "restart", see `run.prepare`.
        max_steps: stop after so many optimiser steps; the learning-rate schedule is still the whole training's, so
            that a resumed run continues it.
        allow_changes: resume although settings differ from the stored ones.
        find_micro_batch: choose train.accumulation by trying what fits the memory.

    Raises:
        ValueError: settings or data that do not fit together.
        RunError: the folder can't be used, or a save failed.
        TrainingError: too many steps in a row were not finite.
        Interrupted: SIGINT or SIGTERM arrived; the state has been saved.
    """
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU
    recipe.check()
    accelerator = make_accelerator(run_path, accumulation=recipe.train.accumulation, trackers=recipe.train.trackers)
    sharded = (recipe.train.shard or launcher_asks_for_sharding()) and accelerator.num_processes > 1
    if launcher_asks_for_checkpointing():
        recipe = replace(recipe, train=replace(recipe.train, gradient_checkpointing=True))
    if find_micro_batch:
        if sharded:
            raise ValueError(
                "--find-micro-batch tries a whole model on each process, which a sharded training avoids; leave it "
                "out, and see what fits by --dry-run --devices N --memory GIB."
            )
        found = find_accumulation(recipe, accelerator)
        micro_batch = recipe.train.batch_size // accelerator.num_processes // found
        accelerator.print(f"Micro-batches of {micro_batch} images fit the memory: train.accumulation is {found}.")
        recipe = replace(recipe, train=replace(recipe.train, accumulation=found))
        accelerator.gradient_accumulation_steps = found
    recipe.check(accelerator.num_processes)
    run = RunDir(run_path)
    on_main(accelerator, lambda: runs.check(run_path, recipe, start, allow_changes))
    on_main(accelerator, lambda: runs.check_free(run))
    on_main(accelerator, lambda: open_denoiser(recipe))
    opened: list[Vae | None] = []
    on_main(accelerator, lambda: opened.append(open_vae(recipe)))  # which downloads, or refuses, for all
    vae = opened[0] if opened else open_vae(recipe)
    data = open_data(recipe, vae)
    if recipe.data.in_memory:
        data = data.decoded()
    with ExitStack() as locks, StopSignal() as stop:
        on_main(accelerator, lambda: runs.claim(run, recipe, start, allow_changes, locks))
        resume = start == "resume"
        training = _Training(recipe, run, data, vae, accelerator, sharded=sharded, resume=resume, stop=stop)
        try:
            summary = training.run_to(max_steps)
        except Interrupted:
            training.close()  # all processes have agreed to stop
            raise
        except BaseException:
            training.finish_trackers()  # others may be waiting for this one: the connection is not closed in order
            raise
        training.close()
        return summary


class _Training:
    """The objects of one training, and the loop over them."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        data: ImageData,
        vae: Vae | None,
        accelerator: Accelerator,
        *,
        sharded: bool,
        resume: bool,
        stop: StopSignal,
    ) -> None:
        self.recipe, self.run, self.data, self.accelerator = recipe, run, data, accelerator
        self.vae = vae  # on the CPU; steps do without it, only sample grids are decoded and pipelines shared
        self.sharded, self.stop = sharded, stop
        self.saved_at = 0  # the step whose state is on the disk; of step 0 there is nothing to save
        self.monitor = Monitor(recipe, run, accelerator)
        self.held_out, self.measured_at = Evaluation({}, None), -1
        self.total_steps = recipe.num_steps(len(data.train))
        self.edges = bucket_edges(recipe)
        self.forward_flops = estimate(recipe).forward_flops
        set_seed(recipe.train.seed)
        self.flow: TARFlow = recipe.model.build(recipe.noise_range)
        if recipe.train.gradient_checkpointing:
            self.flow.enable_gradient_checkpointing()
        self.model = distribute(self.flow, accelerator, sharded)
        if recipe.train.compile:
            compile_layers(self.flow)
        settings = {
            "lr": recipe.train.learning_rate,
            "betas": recipe.train.betas,
            "weight_decay": recipe.train.weight_decay,
            "fused": accelerator.device.type == "cuda",
        }
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **settings)
        decay = recipe.train.ema_decay
        self.ema = None if decay is None else EMAModel(self.model.parameters(), decay)
        self.state = self._load_newest() if resume and run.states() else _State()
        for group in self.optimizer.param_groups:
            group.update(settings)  # a state brings those of the run that saved it
        if resume and not run.states():
            on_main(accelerator, lambda: run.rewrite_metrics([]))
            self.monitor.say(f"{run.path} was stopped before its first saved state: beginning anew.")

    def run_to(self, max_steps: int | None) -> Summary:
        """Train up to max_steps or the end, evaluate, and export."""
        last_step = min(self.total_steps, max_steps or self.total_steps)
        self._describe_plan()
        # Each process has decoded all images, and one says which failed.
        decoded = (*self.data.train.broken, *self.data.held_out.broken)
        self.monitor.name_broken(decoded, aloud=self.accelerator.is_main_process)
        if self.state.step >= last_step:
            self.monitor.say(f"Nothing is left to train: step {self.state.step} has been reached.")
        speed = self._loop(last_step)
        self._save()  # before anything else can go wrong
        if self.measured_at != self.state.step:
            self._stop_if_asked()
            self._evaluate()
        self._stop_if_asked()
        grid = self._sample()
        self._export()
        return Summary(
            run=self.run,
            steps=self.state.step,
            total_steps=self.total_steps,
            seconds=self.state.seconds,
            images_per_second=speed,
            held_out=self.held_out,
            bad_steps=self.state.bad_steps,
            unreadable_images=len(self.monitor.broken),
            class_names=self.data.class_names if self.recipe.model.num_classes else (),
            grid=grid,
        )

    def close(self) -> None:
        """End together: all processes call this, and none before the main one has finished its trackers.

        The model is let go first. The other way round, DDP would close the connection to the others while holding the
        interpreter's lock, which gloo's threads may be waiting for: a process in some hundreds would never end.
        """
        self.finish_trackers()
        self.accelerator.wait_for_everyone()
        del self.model, self.flow, self.optimizer, self.ema
        self.accelerator.free_memory()
        self.accelerator.state.destroy_process_group()

    def finish_trackers(self) -> None:
        """Let what was logged reach its place."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _loop(self, last_step: int) -> float:
        """Train up to last_step; returns images a second."""
        first_step, loader = self.state.step, self._batches()
        bad_in_a_row, step_seconds, speed = 0, 0.0, 0.0
        log_every = self.recipe.train.log_every
        console, name = self.monitor.console, self.recipe.name
        with training_progress(console, name, self.total_steps, first_step) as show:
            while self.state.step < last_step:
                began = time.perf_counter()
                micro_batches = self._fetch(loader)
                step = self._step(self.state.step, micro_batches, watched=(self.state.step + 1) % log_every == 0)
                bad = not math.isfinite(step.grad_norm)
                bad_in_a_row = bad_in_a_row + 1 if bad else 0
                step_seconds += time.perf_counter() - began
                seconds = self.state.seconds + time.perf_counter() - began
                self.state = _State(self.state.step + 1, seconds, self.state.bad_steps + bad)
                self._look_at_gradient(step, bad, bad_in_a_row)
                speed = (self.state.step - first_step) * self.recipe.train.batch_size / step_seconds
                show(self.state.step, float(step.losses.loss) if self.state.step % 5 == 0 else None, speed)
                if self._due(log_every):
                    self._log(step, speed)
                self._chores(last_step)
        return speed

    def _chores(self, last_step: int) -> None:
        """What is due now and then: what saves work first, and nothing shortly before the end does it anyway."""
        evaluate_every, sample_every = self._intervals()
        if self._due(self.recipe.train.save_every) and self.state.step < last_step:
            self._save()
        if self._due(evaluate_every) and self.state.step + evaluate_every // 2 < last_step:
            self._evaluate()
        if self._due(sample_every) and self.state.step + sample_every // 2 < last_step:
            self._sample()

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0

    def _intervals(self) -> tuple[int, int]:
        """Steps between held-out evaluations, and between sample grids."""
        train, steps_per_epoch = self.recipe.train, self.recipe.steps_per_epoch(len(self.data.train))
        every = (train.evaluate_every_epochs, train.sample_every_epochs)
        evaluate, sample = (max(1, round(epochs * steps_per_epoch)) for epochs in every)
        return evaluate, sample

    def _describe_plan(self) -> None:
        train, processes = self.recipe.train, self.accelerator.num_processes
        evaluate_every, sample_every = self._intervals()
        alone = " (there is nothing to shard over)" if train.shard else ""
        spread = (
            alone if processes == 1 else ", the model sharded over them" if self.sharded else ", each a whole model"
        )
        micro = train.batch_size // processes // train.accumulation
        self.monitor.say(
            f"{len(self.data.train):,} training images, {len(self.data.held_out):,} held out. An epoch has "
            f"{self.recipe.steps_per_epoch(len(self.data.train)):.4g} steps, the whole training {self.total_steps:,}. "
            f"Held-out likelihood every {evaluate_every:,} steps, samples every {sample_every:,}, a saved state every "
            f"{train.save_every:,}.\n"
            f"{processes} process{'es' if processes > 1 else ''} on {self.accelerator.device.type}{spread}; "
            f"{train.accumulation} micro-batch{'es' if train.accumulation > 1 else ''} of {micro} images a step."
        )

    # -- one step -----------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        train = self.recipe.train
        sampler = training_sampler(
            self.data.train,
            train.batch_size,
            shuffle_buffer=self.recipe.data.shuffle_buffer,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            accumulation=train.accumulation,
            seed=train.seed,
            start_step=self.state.step,
        )
        return batches(self.data.train, sampler, self.recipe.data.num_workers)

    def _fetch(self, loader: Iterator[Batch]) -> list[Batch]:
        """The next step's micro-batches; but if any process was told to stop, or has no images, all save and end here.

        This is the one place between two steps where the processes agree, and where nothing is half done.

        Raises:
            Interrupted: a signal has arrived.
            DataError: images can't be read, here or at another process.
        """
        refusal: DataError | None = None
        batches: list[Batch] = []
        try:
            batches = [next(loader) for _ in range(self.recipe.train.accumulation)]
            self.monitor.name_broken([name for batch in batches for name in batch.broken])
        except DataError as error:
            refusal = error
        signal_number, refused = agreed(self.accelerator, self.stop.signal_number or 0, int(refusal is not None))
        if signal_number or refused:
            self._save()
        if signal_number:  # which may have killed the processes that decode
            raise Interrupted(signal_number, self.run.path, self.state.step)
        if refused:
            raise refusal or DataError(_ANOTHER)
        return batches

    def _step(self, step: int, micro_batches: Sequence[Batch], watched: bool) -> _Step:
        """One optimiser step, on this process's share of the global batch."""
        train, accelerator = self.recipe.train, self.accelerator
        self.model.train()
        self._set_learning_rate(step)
        draws = draw(self.recipe, step, accelerator.device)
        parts: list[Losses] = []
        levels: list[Tensor] = []
        grad_norm = math.nan
        with watch_blocks(self.flow, watched) as moments:
            for micro, batch in enumerate(micro_batches):
                size = len(batch.images)
                start = (micro * accelerator.num_processes + accelerator.process_index) * size
                part = draws.part(start, start + size)
                images = batch.images.to(accelerator.device, non_blocking=True)
                labels = batch.labels.to(accelerator.device, non_blocking=True)
                with accelerator.accumulate(self.model):
                    bf16 = train.mixed_precision == "bf16"
                    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
                        losses = training_losses(self.model, self.recipe, images, labels, part)
                    accelerator.backward(losses.loss)
                    if accelerator.sync_gradients:
                        grad_norm = clip_grad_norm(self.model, train.max_grad_norm or math.inf)
                        if math.isfinite(grad_norm):
                            self.optimizer.step()
                        self.optimizer.zero_grad()
                parts.append(losses)
                levels.append(part.noise_level)
        together = Losses.together(parts)
        if math.isfinite(grad_norm):
            self._after_update(together)
        return _Step(together, torch.cat(levels), grad_norm, moments)

    def _after_update(self, losses: Losses) -> None:
        if self.ema is not None:
            self.ema.step(self.model.parameters())
        if losses.mean_square is not None:
            mean_square = self.accelerator.reduce(losses.mean_square, "mean")
            self.flow.prior_variance.copy_(updated_prior_variance(self.flow.prior_variance, mean_square.sqrt()[None]))

    def _set_learning_rate(self, step: int) -> None:
        train = self.recipe.train
        warmup = round(train.warmup_epochs * self.recipe.steps_per_epoch(len(self.data.train)))
        lowest = train.min_learning_rate / train.learning_rate
        rate = train.learning_rate * learning_rate_factor(step, warmup, self.total_steps, lowest)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _look_at_gradient(self, step: _Step, bad: bool, in_a_row: int) -> None:
        """Report a gradient that is not finite or far too large, with its noise level; give up after too many."""
        worst = worst_level(step.losses.nll, step.noise_level)
        if not bad:
            if self.monitor.exploded(step.grad_norm):
                self.monitor.report_explosion(self.state.step, step.grad_norm, *worst)
            return
        # What is not finite at one process is not finite at any, so all come here.
        found = gather_object([worst])
        level, nll = max(found, key=lambda pair: (not math.isfinite(pair[1]), pair[1]))
        self.monitor.report_bad(self.state.step, in_a_row, self.state.bad_steps, level, nll)
        if in_a_row >= self.recipe.train.max_bad_steps:
            self._save()  # these steps changed nothing: the weights are those of the last good one
            raise TrainingError(
                f"{in_a_row} steps in a row had no finite gradient, up to step {self.state.step}, whose state is "
                f"saved; the last one's worst image has noise level {level:.3g}. Go on by --resume --allow-changes "
                "with a lower train.learning_rate, a smaller train.max_grad_norm or train.mixed_precision no; or "
                "begin anew by --restart, also with a longer train.warmup_epochs."
            )

    # -- now and then -------------------------------------------------------------------------------------------

    def _log(self, step: _Step, speed: float) -> None:
        """One line of metrics, of the images of all processes."""
        sums = self.accelerator.reduce(step_sums(step.losses, step.noise_level, step.moments, self.edges), "sum")
        device, processes = self.accelerator.device, self.accelerator.num_processes
        # Of one forward and one backward pass: what is computed a second time is no achievement.
        tflops = speed / processes * 3 * self.forward_flops / 1e12
        metrics = step_metrics(sums, processes, self.edges)
        peak = peak_tflops(device, self.recipe.train.mixed_precision)
        self.monitor.log({
            "step": self.state.step,
            "epoch": self.state.step / self.recipe.steps_per_epoch(len(self.data.train)),
            **metrics,
            **(in_bits(metrics) if self.vae is None else {}),
            "grad_norm": step.grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": speed,
            "tflops": tflops,
            "utilisation": None if peak is None else tflops / peak,
            "memory_gib": memory_gib(device),
            "seconds": self.state.seconds,
            "bad_steps": self.state.bad_steps,
            "unreadable_images": len(self.monitor.broken),
        })  # fmt: skip

    def _evaluate(self) -> None:
        with self._sampling_flow() as flow:
            self.held_out = evaluate(flow, self.data.held_out, self.recipe, self.accelerator)
        self.measured_at = self.state.step
        self.monitor.name_broken(self.held_out.broken)
        self.monitor.log_held_out(self.state.step, self.held_out)

    def _sample(self) -> Path:
        path = self.run.grid(self.state.step)
        with self._sampling_flow() as flow:
            vae = copy.deepcopy(self.vae)  # for the device: gone with the pipeline
            pipeline = make_pipeline(flow, self.recipe, self.data.class_names, None, vae).to(self.accelerator.device)
            sample_grid(pipeline, self.recipe, path, self.accelerator)
        self.accelerator.wait_for_everyone()
        return path

    @contextmanager
    def _sampling_flow(self) -> Iterator[TARFlow]:
        """Averaged weights, and no compilation: sampling has other shapes at each token."""
        whole = whole_flow(self.model, self.recipe, self.ema, self.accelerator.device)
        with whole as flow, torch.compiler.set_stance("force_eager"):
            yield flow

    def _stop_if_asked(self) -> None:
        """Between the chores after the last step, whose state has been saved."""
        (signal_number,) = agreed(self.accelerator, self.stop.signal_number or 0)
        if signal_number:
            raise Interrupted(signal_number, self.run.path, self.state.step)

    # -- states and the pipeline --------------------------------------------------------------------------------

    def _save(self) -> None:
        """Save the state, unless it is on the disk already, and the pipeline."""
        if self.saved_at == self.state.step:
            return
        self.monitor.gather_broken()
        save_state(
            self.run,
            self.state.step,
            self.recipe.train.keep_states,
            lambda folder: save_tensors(folder, self.model, self.optimizer, self.ema),
            {**self.state._asdict(), "broken": sorted(self.monitor.broken)},
            lambda action: on_main(self.accelerator, action),
        )
        self.saved_at = self.state.step
        self._export()

    def _export(self) -> None:
        main = self.accelerator.is_main_process
        with whole_flow(self.model, self.recipe, self.ema, torch.device("cpu"), wanted=main) as flow:
            record = training_record(self.recipe, self.held_out, self._facts())
            pipeline = make_pipeline(flow, self.recipe, self.data.class_names, record, self.vae)
            on_main(self.accelerator, lambda: replace_folder(self.run.pipeline, pipeline.save_pretrained))

    def _facts(self) -> dict[str, Any]:
        return {
            "train_images": len(self.data.train),
            "held_out_images": len(self.data.held_out),
            "steps": self.state.step,
            "total_steps": self.total_steps,
            "seconds": round(self.state.seconds, 1),
            "bad_steps": self.state.bad_steps,
            "unreadable_images": len(self.monitor.broken),
        }

    def _load_newest(self) -> _State:
        say = self.monitor.say
        folder = agreed_state(self.run, self.accelerator, say)
        try:
            progress = json.loads((folder / PROGRESS).read_text())
            load_tensors(folder, self.model, self.optimizer, self.ema)
        except torch.OutOfMemoryError:
            raise
        except (Exception, CheckpointException) as error:  # of many libraries, and all mean the same
            raise RunError(
                f"The state {folder} is whole, but can't be read: {first_cause(error)}. It is of another model, or of "
                "another version of this program: use the settings of its recipe.json, or begin anew by --restart."
            ) from error
        self.monitor.broken = frozenset(progress.pop("broken"))
        state = _State(**progress)
        self.saved_at = state.step
        if self.ema is not None:
            self.ema.optimization_step = state.step - state.bad_steps
        kept = [line for line in self.run.logged() if line["step"] <= state.step]
        for line in kept:
            if "held_out" in line:
                self.held_out, self.measured_at = Evaluation(**line["held_out"]), line["step"]
        # All have read before one writes.
        self.accelerator.wait_for_everyone()
        on_main(self.accelerator, lambda: self.run.rewrite_metrics(kept))
        say(f"Resuming from {folder} at step {state.step} of {self.total_steps}.")
        return state
