"""The training loop on Accelerate: resume, step, log, save, evaluate, close.

A step is a function of the settings and the step's number: which images it sees (data/order.py), and which random
numbers a subclass draws. So an exact resume needs weights, optimiser and step, no more, and the number of processes
does not matter.
"""

from __future__ import annotations

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from itarflow.data.load import ImageData
from itarflow.data.loader import Batch, batches
from itarflow.data.order import training_sampler
from itarflow.runtime.devices import memory_gib, tf32_products
from itarflow.runtime.errors import DataError, TrainingError
from itarflow.runtime.launch import part, wait_for_main
from itarflow.runtime.processes import agreed, on_main
from itarflow.runtime.progress import training_progress
from itarflow.runtime.signals import Interrupted, StopSignal
from itarflow.runtime.text import listed
from itarflow.training.finished import Finished, StepOutputT
from itarflow.training.metrics import Monitor
from itarflow.training.run_folder import RunDir, step_of
from itarflow.training.settings import Settings
from itarflow.training.states import State, check_stateless, open_state, reading, save_state
from itarflow.training.tensors import load_tensors, save_tensors

Result = TypeVar("Result")


class Loop(ABC, Generic[StepOutputT, Result]):
    """The objects of one training, and the loop over them. Each process has one, and all call the same methods.

    A subclass implements the plan, a step, its metrics, the evaluation and the export. Its constructor sets `model`,
    `optimizer` and `ema`, after calling this one's.
    """

    task: ClassVar[str]
    """What is trained, for messages: "model"."""
    advice: ClassVar[str]
    """How to go on after too many bad steps: a sentence."""
    tf32 = True  # whether float32 products of a step may be TF32 on a GPU; evaluations and pictures are float32

    model: nn.Module
    """As Accelerate or `sharding.distribute` has prepared it."""
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None

    def __init__(
        self,
        settings: Settings,
        run: RunDir,
        data: ImageData,
        accelerator: Accelerator,
        stop: StopSignal,
        *,
        name: str,
        total_steps: int,
    ) -> None:
        run = run.held() if accelerator.is_main_process else run  # other machines may see it a little later
        self.settings, self.run, self.data, self.accelerator, self.stop = settings, run, data, accelerator, stop
        self.name, self.total_steps = name, total_steps
        self.monitor = Monitor(settings, run, accelerator)
        self.state = State()
        self.speed = 0.0  # images a second, of this part of the run
        self.saved_at = 0  # the step whose state is on the disk; of step 0 there is nothing to save
        self.exported_at = 0  # the step of what this process has exported
        self.resumed_at = 0
        self.bad_in_a_row = 0
        self.run_name = uuid.uuid4().hex  # by which its states are told from others
        self.own: dict[str, Any] = {}  # plain values of a subclass, which states keep, too
        self.measured_at = -1  # the step of the newest evaluation

    # -- what a subclass implements -------------------------------------------------------------------------------

    @abstractmethod
    def plan(self) -> str:
        """A summary of the training ahead, in lines for the terminal."""

    @abstractmethod
    def step(self, number: int, micro_batches: Sequence[Batch]) -> StepOutputT:
        """Optimiser step `number` = 0, 1, ..., on this process's share of the global batch.

        It changes nothing where the gradient is not finite.
        """

    @abstractmethod
    def bad_step_report(self, output: StepOutputT) -> str:
        """What is known of the cause of a step without a finite gradient: a sentence after a space, or ""."""

    @abstractmethod
    def metrics(self, output: StepOutputT) -> dict[str, Any]:
        """Metrics of a step over the images of all processes, for a line of metrics.jsonl."""

    @abstractmethod
    def end_of_step(self, last_step: int) -> None:
        """Periodic work besides saving, such as evaluations; skipped shortly before the end, which does it anyway."""

    @abstractmethod
    def evaluate(self) -> None:
        """Measure on the held-out images, log it, and set `measured_at`."""

    @abstractmethod
    def export(self) -> None:
        """Write what users load, such as a pipeline, from the current weights."""

    @abstractmethod
    def finish(self) -> Result:
        """Called last, after the final state and evaluation are there; returns the training's result."""

    def finished(self) -> Finished:
        """The part of the result that all trainings share."""
        return Finished(
            run=self.run,
            steps=self.state.step,
            total_steps=self.total_steps,
            seconds=self.state.seconds,
            images_per_second=self.speed,
            bad_steps=self.state.bad_steps,
            unreadable_images=len(self.monitor.broken),
        )

    @abstractmethod
    def load_state(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Restore the newest evaluation, and `measured_at`, from the lines of metrics.jsonl up to a state."""

    # -- what a subclass may add to -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Called before the first step: prints the plan, and the images that could not be decoded."""
        self.monitor.say(self.plan())
        # Each process has decoded all images, and the main one reports which failed.
        decoded = (*self.data.train.broken, *self.data.held_out.broken)
        self.monitor.name_broken(decoded, aloud=self.accelerator.is_main_process)

    def save_tensors(self, folder: Path) -> None:
        """Write the tensors of a state: model, optimiser, EMA. All processes call this."""
        save_tensors(folder, self.model, self.optimizer, self.ema)

    def load_tensors(self, folder: Path) -> None:
        """Read the tensors of a state. All processes call this."""
        load_tensors(folder, self.model, self.optimizer, self.ema)

    # -- the whole training ---------------------------------------------------------------------------------

    def run_to(self, max_steps: int | None, *, resume: bool, allow_changes: bool = False) -> Result:
        """Resume, train up to max_steps or the end, save, evaluate, and close.

        Args:
            max_steps: None = all steps.
            resume: go on from the newest whole state, if there is one.
            allow_changes: resume although the images are others than the state's.

        Raises:
            RunError: there is no whole state among those saved, it is of other settings or images, or a save failed.
            DataError: too many images can't be read.
            TrainingError: too many steps in a row were not finite.
            Interrupted: a signal has arrived; the state is saved.
        """
        try:
            result = self._run_to(max_steps, resume, allow_changes)
        except Interrupted:
            self._close()  # all processes have agreed to stop
            raise
        except BaseException as error:
            self._finish_trackers()  # others may be waiting for this one: the connection is not closed in order
            if isinstance(error, TrainingError):  # of all processes: the first that ends would end the others
                wait_for_main(self.accelerator)
            raise
        self._close()
        return result

    def _run_to(self, max_steps: int | None, resume: bool, allow_changes: bool) -> Result:
        last_step = min(self.total_steps, max_steps or self.total_steps)
        if resume:
            self._resume(allow_changes)
        self.begin()
        if self.state.step >= last_step:
            self.monitor.say(f"Nothing is left to train: step {self.state.step} has been reached.")
        if self.state.step:  # a kill may have come after the state was saved, and before the rest of its step
            self._export()
            self.end_of_step(last_step)
        self._loop(last_step)
        self._save()  # before anything else can go wrong
        if self.measured_at != self.state.step:
            self._stop_if_asked()
            self.evaluate()
        self._stop_if_asked()
        on_main(self.accelerator, self.run.check_held)
        return self.finish()

    def _loop(self, last_step: int) -> None:
        """Train up to last_step."""
        train, first_step, loader = self.settings.train, self.state.step, self._batches()
        step_seconds = 0.0
        with training_progress(self.monitor.console, self.name, last_step, first_step) as show:
            while self.state.step < last_step:
                began = time.perf_counter()
                micro_batches = self._fetch(loader)
                with tf32_products(self.tf32):
                    output = self.step(self.state.step, micro_batches)
                bad = not math.isfinite(output.grad_norm)
                self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
                passed = time.perf_counter() - began
                step_seconds += passed
                step, seconds, bad_steps = self.state
                self.state = State(step + 1, seconds + passed, bad_steps + bad)
                if bad:
                    self._report_bad(output)
                self.speed = (self.state.step - first_step) * train.batch_size / step_seconds
                show(self.state.step, float(output.loss) if self.due(5) else None, self.speed)
                if self.due(train.log_every):
                    self._log(output)
                if self.due(train.save_every) and self.state.step < last_step and not bad:  # which changed nothing
                    self._save()  # first, because it saves work
                self.end_of_step(last_step)

    def due(self, every: int) -> bool:
        """Whether the current step is a multiple of `every`."""
        return self.state.step % every == 0

    def shares(self, spread: str = "") -> str:
        """A line for the plan: how a step's batch is divided over processes, and `spread`: how the model is."""
        train, processes = self.settings.train, self.accelerator.num_processes
        micro = train.batch_size // processes // train.accumulation
        return (
            f"{processes} process{'es' if processes > 1 else ''} on {self.accelerator.device.type}{spread}; "
            f"{train.accumulation} micro-batch{'es' if train.accumulation > 1 else ''} of {micro} images a step."
        )

    def _close(self) -> None:
        """End together: all processes call this, and none returns before the main one has finished its trackers.

        All objects are released first, the model among them. The other way round, DDP would close the process group
        while holding the GIL, which gloo's threads may be waiting for: about one process in some hundreds would hang.
        """
        accelerator = self.accelerator
        self._finish_trackers()
        accelerator.wait_for_everyone()
        part()
        vars(self).clear()
        accelerator.free_memory()
        accelerator.state.destroy_process_group()

    def _finish_trackers(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    # -- around a step ------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        train, data = self.settings.train, self.settings.data
        sampler = training_sampler(
            self.data.train,
            train.batch_size,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            accumulation=train.accumulation,
            seed=train.seed, start_step=self.state.step, shuffle_buffer=data.shuffle_buffer,
        )  # fmt: skip
        return batches(self.data.train, sampler, data.num_workers)

    def _fetch(self, loader: Iterator[Batch]) -> list[Batch]:
        """The next step's micro-batches; if any process got a signal or can't read images, all save and stop here.

        This is the one place between two steps where the processes agree, and where no work is half done.

        Raises:
            Interrupted: a signal has arrived.
            DataError: images can't be read, here or at another process.
        """
        refusal: DataError | None = None
        found: list[Batch] = []
        try:
            found = [next(loader) for _ in range(self.settings.train.accumulation)]
            self.monitor.name_broken([name for batch in found for name in batch.broken])
        except DataError as error:
            refusal = error
        signal_number, refused = agreed(self.accelerator, self.stop.signal_number or 0, int(refusal is not None))
        if signal_number or refused:
            self._save()
        if signal_number:  # which may have killed the processes that decode
            raise Interrupted(signal_number, self.run.path, self.state.step)
        if refused:
            raise refusal or DataError("another process can't read its images; its message says why")
        return found

    def _report_bad(self, output: StepOutputT) -> None:
        """Report that a step was skipped, and why as far as known; stop after too many."""
        # A gradient that is not finite on one process is so on all, so all come here.
        step, cause, in_a_row = self.state.step, self.bad_step_report(output), self.bad_in_a_row
        self.monitor.say(
            f"Step {step}: the gradient is not finite; the step was skipped ({in_a_row} in a row, "
            f"{self.state.bad_steps} in all).{cause}",
            "yellow",
        )
        if in_a_row >= self.settings.train.max_bad_steps:
            self._save()  # these steps changed nothing: the weights are those of the last good one
            older = [state.name for state in reversed(self.run.states()) if step_of(state) < step]
            raise TrainingError(
                f"{in_a_row} steps in a row had no finite gradient, up to step {step}, whose state is saved.{cause} "
                f"{self.advice} Should its weights be spoilt, first move it out of state/, where these are before it: "
                f"{listed(older) or 'none'}."
            )

    def _log(self, output: StepOutputT) -> None:
        """Write a line of metrics.jsonl."""
        self.monitor.log({
            "step": self.state.step,
            **self.metrics(output),
            "grad_norm": output.grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": self.speed,
            "memory_gib": memory_gib(self.accelerator.device),
            "seconds": self.state.seconds,
            "bad_steps": self.state.bad_steps,
            "unreadable_images": len(self.monitor.broken),
        })  # fmt: skip

    def _stop_if_asked(self) -> None:
        """After the last step, whose state has been saved."""
        (signal_number,) = agreed(self.accelerator, self.stop.signal_number or 0)
        if signal_number:
            raise Interrupted(signal_number, self.run.path, self.state.step)

    # -- states -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Save the state, unless it is on the disk already, and export."""
        if self.saved_at == self.state.step:
            return
        self.monitor.gather_broken()
        save_state(
            self.run,
            self.state.step,
            # After bad steps the newest weights may be spoilt, so the older ones stay.
            None if self.bad_in_a_row else self.settings.train.keep_states,
            self.save_tensors,
            {
                **self.state._asdict(),
                "broken": sorted(self.monitor.broken),
                "run": self.run_name,
                "data": self.data.identity.to_json(),
                **self.own,
            },
            lambda action: on_main(self.accelerator, action),
            lambda text: self.monitor.say(text, "yellow"),
        )
        self.saved_at = self.state.step
        self._export()

    def _export(self) -> None:
        """Export, unless this process has done so at this step."""
        if self.exported_at != self.state.step:
            on_main(self.accelerator, self.run.check_held)
            self.export()
            self.exported_at = self.state.step

    def drawn_before(self, picture: Path) -> bool:
        """Whether a killed part of this run has already drawn a picture of the step that it was resumed at."""
        there = self.resumed_at == self.state.step and self.accelerator.is_main_process and picture.exists()
        return bool(agreed(self.accelerator, int(there))[0])

    def _resume(self, allow_changes: bool) -> None:
        """Go on from the newest whole state, or from the beginning, if none has been saved yet."""
        if not self.run.states():
            on_main(self.accelerator, lambda: check_stateless(self.run))
            on_main(self.accelerator, lambda: self.run.resume(self.settings, []))
            self.monitor.say(f"{self.run.path} was stopped before its first saved state: beginning anew.")
            return
        say = self.monitor.say
        folder, progress, self.own = open_state(self.run, self.accelerator, self.data.identity, allow_changes, say)
        with reading(folder, self.task):
            self.load_tensors(folder)
        self.monitor.broken = frozenset(progress.broken)
        self.state = State(progress.step, progress.seconds, progress.bad_steps)
        self.run_name = progress.run
        self.saved_at = self.resumed_at = self.state.step
        if self.ema is not None:
            self.ema.optimization_step = self.state.step - self.state.bad_steps
        lines, damaged = self.run.read_log()
        kept = [line for line in lines if line["step"] <= self.state.step]
        self.load_state(kept)
        self.accelerator.wait_for_everyone()  # all have read before one writes
        on_main(self.accelerator, lambda: self.run.resume(self.settings, kept))
        if damaged:
            say(f"{damaged} damaged lines of {self.run.metrics} are left out.", "yellow")
        say(f"Resuming from {folder} at step {self.state.step} of {self.total_steps}.")
