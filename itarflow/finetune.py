"""The loop that fine-tunes an autoencoder's decoder on noisy codes; see decoder.py.

OUT/recipe.json   metrics.jsonl   state/step-*/   vae/   psnr.json   comparison.png

What a step does is a function of the settings and the step's number, as in training.py: a resumed run is the same run,
and the number of processes does not matter.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from itarflow import run as runs
from itarflow.batches import Batch, batches, training_sampler
from itarflow.codec import Vae, VaeCodec, code_shape, load_vae, to_pixels
from itarflow.data import ImageData, load_data
from itarflow.decoder import (
    DecoderConfig,
    Decoding,
    Draws,
    augmented,
    codes_of,
    comparison,
    decoded_examples,
    draw,
    examples,
    measure,
)
from itarflow.ema import averaged_weights
from itarflow.images import DataError
from itarflow.insight import memory_gib
from itarflow.interrupt import Interrupted, StopSignal
from itarflow.monitor import Monitor
from itarflow.processes import agreed, agreed_state, make_accelerator, on_main
from itarflow.progress import training_progress
from itarflow.recipe import learning_rate_factor
from itarflow.reconstruction import PatchCritic, adversarial_loss, hinge_loss, load_lpips, reconstruction_terms
from itarflow.run import RunDir, RunError, Start, replace_folder
from itarflow.sharding import clip_grad_norm, load_tensors, save_tensors
from itarflow.states import PROGRESS, first_cause, save_state
from itarflow.training import TrainingError


@dataclass(frozen=True)
class Tuned:
    """What a finished fine-tuning reports."""

    run: RunDir
    steps: int
    total_steps: int
    """Of the whole fine-tuning; more than `steps` if it was told to stop before."""
    seconds: float
    """Of training, over all resumed parts."""
    images_per_second: float
    before: dict[str, float]
    """Noise level -> PSNR in dB of the VAE as it was."""
    after: dict[str, float]
    """The same of the fine-tuned one."""
    held_out_images: int
    bad_steps: int
    unreadable_images: int


def fine_tune(
    config: DecoderConfig,
    out: Path,
    *,
    start: Start = "fresh",
    max_steps: int | None = None,
    allow_changes: bool = False,
) -> Tuned:
    """Fine-tune a VAE's decoder on noisy codes, and leave VAE, figures, pictures and states in a folder.

    Args:
        config: all settings.
        out: the folder.
        start: "fresh", "resume" or "restart", see `run.prepare`.
        max_steps: stop after so many optimiser steps; the schedule is still that of the whole fine-tuning.
        allow_changes: resume although settings differ from the stored ones.

    Raises:
        OSError: there is no such VAE.
        ValueError: settings, VAE or data that do not fit together.
        RunError: the folder can't be used, or a save failed.
        TrainingError: too many steps in a row were not finite.
        Interrupted: SIGINT or SIGTERM arrived; the state has been saved.
    """
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU
    accelerator = make_accelerator(out, accumulation=config.train.accumulation, trackers=config.train.trackers)
    run = RunDir(out, "OUT")
    on_main(accelerator, lambda: runs.check(out, config, start, allow_changes, run.option))
    on_main(accelerator, lambda: runs.check_free(run))
    vae = load_vae(config.codec)
    config.check(vae, accelerator.num_processes)
    perceptual = load_lpips() if config.loss.lpips else None
    data = load_data(config.data, image_size=config.size, in_channels=vae.config.in_channels)
    if len(data.held_out) == 0:
        raise ValueError("data.held_out_images is 0: there is nothing to measure the decoder on; expected 1 or more.")
    if config.data.in_memory:
        data = data.decoded()
    with ExitStack() as locks, StopSignal() as stop:
        on_main(accelerator, lambda: runs.claim(run, config, start, allow_changes, locks))
        tuning = _Tuning(config, run, data, accelerator, vae, perceptual, resume=start == "resume", stop=stop)
        try:
            tuned = tuning.run_to(max_steps)
        except Interrupted:
            tuning.close()  # all processes have agreed to stop
            raise
        except BaseException:
            tuning.finish_trackers()  # others may be waiting for this one: the connection is not closed in order
            raise
        tuning.close()
        return tuned


class _State(NamedTuple):
    """Where a fine-tuning is, besides its tensors."""

    step: int
    seconds: float
    bad_steps: int
    before: Mapping[str, float]
    """PSNR of the VAE as it was."""


class _Tuning:
    """The objects of one fine-tuning, and the loop over them."""

    def __init__(
        self,
        config: DecoderConfig,
        run: RunDir,
        data: ImageData,
        accelerator: Accelerator,
        vae: Vae,
        perceptual: nn.Module | None,
        *,
        resume: bool,
        stop: StopSignal,
    ) -> None:
        self.config, self.run, self.data, self.accelerator, self.stop = config, run, data, accelerator, stop
        self.saved_at = 0  # the step whose state is on the disk; of step 0 there is nothing to save
        self.monitor = Monitor(config, run, accelerator)
        # Convolutions are faster with the channels last, on CPUs and GPUs alike.
        self.vae = vae.to(accelerator.device, memory_format=torch.channels_last)
        if config.train.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.perceptual = None if perceptual is None else perceptual.to(accelerator.device)
        self.codec, self.decoding = VaeCodec(self.vae), Decoding(self.vae)
        self.measured = VaeCodec(self.vae, slice_size=4)  # whole images in float32 may be larger than those of a step
        self.examples = examples(config, data.held_out)
        self.before_images = self._decoded_examples()
        set_seed(config.train.seed)
        self.critic = PatchCritic(vae.config.in_channels) if config.loss.adversarial else None
        self.model: nn.Module = accelerator.prepare(self.decoding)
        self.critic_model: nn.Module | None = None if self.critic is None else accelerator.prepare(self.critic)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **self._optimizer_settings(critic=False))
        self.critic_optimizer = (
            None
            if self.critic_model is None
            else torch.optim.AdamW(self.critic_model.parameters(), **self._optimizer_settings(critic=True))
        )
        decay = config.train.ema_decay
        self.ema = None if decay is None else EMAModel(self.model.parameters(), decay)
        self.after: dict[str, float] = {}
        self.measured_at = -1
        if resume and run.states():
            self.state = self._load_newest()
        else:
            if resume:
                on_main(accelerator, lambda: run.rewrite_metrics([]))
                self.monitor.say(f"{run.path} was stopped before its first saved state: beginning anew.")
            self.state = _State(0, 0.0, 0, {})

    def run_to(self, max_steps: int | None) -> Tuned:
        """Train up to max_steps or the end, measure, compare, and export."""
        last_step = min(self.config.train.steps, max_steps or self.config.train.steps)
        self._describe_plan()
        # Each process has decoded all images, and one says which failed.
        decoded = (*self.data.train.broken, *self.data.held_out.broken)
        self.monitor.name_broken(decoded, aloud=self.accelerator.is_main_process)
        if not self.state.before:
            self._evaluate()
            self.state = self.state._replace(before=self.after)
        if self.state.step >= last_step:
            self.monitor.say(f"Nothing is left to train: step {self.state.step} has been reached.")
        speed = self._loop(last_step)
        self._save()  # before anything else can go wrong
        if self.measured_at != self.state.step:
            self._stop_if_asked()
            self._evaluate()
        self._stop_if_asked()
        on_main(self.accelerator, self._report)
        return Tuned(
            run=self.run,
            steps=self.state.step,
            total_steps=self.config.train.steps,
            seconds=self.state.seconds,
            images_per_second=speed,
            before=dict(self.state.before),
            after=self.after,
            held_out_images=len(self.data.held_out),
            bad_steps=self.state.bad_steps,
            unreadable_images=len(self.monitor.broken),
        )

    def close(self) -> None:
        """End together: see `training._Training.close`, whose order this is."""
        self.finish_trackers()
        self.accelerator.wait_for_everyone()
        del self.model, self.decoding, self.codec, self.measured, self.vae, self.optimizer, self.ema
        del self.critic, self.critic_model, self.critic_optimizer
        self.accelerator.free_memory()
        self.accelerator.state.destroy_process_group()

    def finish_trackers(self) -> None:
        """Let what was logged reach its place."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _loop(self, last_step: int) -> float:
        """Train up to last_step; returns images a second."""
        train, first_step, loader = self.config.train, self.state.step, self._batches()
        bad_in_a_row, step_seconds, speed = 0, 0.0, 0.0
        with training_progress(self.monitor.console, "decoder", train.steps, first_step) as show:
            while self.state.step < last_step:
                began = time.perf_counter()
                micro_batches = self._fetch(loader)
                terms, grad_norm = self._step(self.state.step, micro_batches)
                bad = not math.isfinite(grad_norm)
                bad_in_a_row = bad_in_a_row + 1 if bad else 0
                passed = time.perf_counter() - began
                step_seconds += passed
                step, seconds = self.state.step + 1, self.state.seconds + passed
                self.state = self.state._replace(step=step, seconds=seconds, bad_steps=self.state.bad_steps + bad)
                self._give_up_after(bad_in_a_row)
                speed = (step - first_step) * train.batch_size / step_seconds
                show(step, float(terms["loss"]) if step % 5 == 0 else None, speed)
                if step % train.log_every == 0:
                    self._log(terms, grad_norm, speed)
                if step % train.save_every == 0 and step < last_step:
                    self._save()
                if step % train.evaluate_every == 0 and step < last_step:
                    self._evaluate()
        return speed

    def _describe_plan(self) -> None:
        config, train, processes = self.config, self.config.train, self.accelerator.num_processes
        level = f"{config.t_max:g}" if config.t_min is None else f"{config.t_min:g} to {config.t_max:g}"
        learning = sum(parameter.numel() for parameter in self.decoding.parameters())
        micro = train.batch_size // processes // train.accumulation
        self.monitor.say(
            f"{len(self.data.train):,} training images, {len(self.data.held_out):,} held out; "
            f"{train.steps:,} steps of {train.batch_size} images see each "
            f"{train.steps * train.batch_size / len(self.data.train):.3g} times. The decoder's {learning:,} weights "
            f"learn to decode codes with noise {level}.\n"
            f"{processes} process{'es' if processes > 1 else ''} on {self.accelerator.device.type}; "
            f"{train.accumulation} micro-batch{'es' if train.accumulation > 1 else ''} of {micro} images a step."
        )

    # -- one step -----------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        train = self.config.train
        sampler = training_sampler(
            self.data.train,
            train.batch_size,
            shuffle_buffer=self.config.data.shuffle_buffer,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            accumulation=train.accumulation,
            seed=train.seed,
            start_step=self.state.step,
        )
        return batches(self.data.train, sampler, self.config.data.num_workers)

    def _fetch(self, loader: Iterator[Batch]) -> list[Batch]:
        """The next step's micro-batches; but if any process was told to stop, or has no images, all save and end here.

        Raises:
            Interrupted: a signal has arrived.
            DataError: images can't be read, here or at another process.
        """
        refusal: DataError | None = None
        found: list[Batch] = []
        try:
            found = [next(loader) for _ in range(self.config.train.accumulation)]
            self.monitor.name_broken([name for batch in found for name in batch.broken])
        except DataError as error:
            refusal = error
        signal_number, refused = agreed(self.accelerator, self.stop.signal_number or 0, int(refusal is not None))
        if signal_number or refused:
            self._save()
        if signal_number:
            raise Interrupted(signal_number, self.run.path, self.state.step)
        if refused:
            raise refusal or DataError("another process can't read its images; its message says why")
        return found

    def _step(self, step: int, micro_batches: Sequence[Batch]) -> tuple[dict[str, Tensor], float]:
        """One optimiser step, on this process's share of the global batch: its mean terms, and the gradient's norm."""
        train, accelerator = self.config.train, self.accelerator
        self._set_learning_rate(step)
        size = self.config.trained_size
        channels = self.vae.config.in_channels
        draws = draw(self.config, code_shape(self.vae, (channels, size, size)), step, accelerator.device)
        critical = self.critic_model is not None and step >= self.config.loss.adversarial_start
        found: list[dict[str, Tensor]] = []
        grad_norm = math.nan
        learning = [self.model] if self.critic_model is None else [self.model, self.critic_model]
        for micro, batch in enumerate(micro_batches):
            count = len(batch.images)
            first = (micro * accelerator.num_processes + accelerator.process_index) * count
            part = Draws(*(values[first : first + count] for values in draws))
            images = augmented(to_pixels(batch.images.to(accelerator.device, non_blocking=True)), part, size)
            with accelerator.accumulate(*learning):
                found.append(self._backward(images, part, critical))
                if accelerator.sync_gradients:
                    grad_norm = self._update(train.max_grad_norm or math.inf, critical)
        return {name: torch.stack([terms[name] for terms in found]).mean() for name in found[0]}, grad_norm

    def _backward(self, images: Tensor, draws: Draws, critical: bool) -> dict[str, Tensor]:
        """Gradients of a micro-batch, of the decoder and, if it has begun, of the critic; returns the terms."""
        loss, accelerator = self.config.loss, self.accelerator
        autocast = torch.autocast(
            accelerator.device.type, torch.bfloat16, enabled=self.config.train.mixed_precision == "bf16"
        )
        with torch.no_grad(), autocast:
            codes = codes_of(self.config, self.codec, images, draws.posterior)
        with autocast:
            decoded = self.model(codes + draws.noise_level[:, None, None, None] * draws.noise)
            terms = reconstruction_terms(loss, decoded, images, self.perceptual)
            if critical and self.critic is not None:
                terms["adversarial"] = adversarial_loss(self.critic, decoded)
        weights = {name: getattr(loss, name) for name in terms}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        accelerator.backward(total)
        if critical and self.critic_model is not None:
            with autocast:
                # Together, because a module of several processes wants one forward pass for each backward pass.
                real, false = self.critic_model(torch.cat([images, decoded.detach()])).chunk(2)
                terms["critic"] = hinge_loss(real, false)
            accelerator.backward(terms["critic"])
        return {name: term.detach() for name, term in ({"loss": total} | terms).items()}

    def _update(self, limit: float, critical: bool) -> float:
        """Step decoder and critic, unless a gradient is not finite; returns the norm of the decoder's, or nan."""
        norms = [clip_grad_norm(self.model, limit)]
        if critical and self.critic_model is not None:
            norms.append(clip_grad_norm(self.critic_model, limit))
        finite = all(map(math.isfinite, norms))
        if finite:
            self.optimizer.step()
            if critical and self.critic_optimizer is not None:
                self.critic_optimizer.step()
            if self.ema is not None:
                self.ema.step(self.model.parameters())
        self.optimizer.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()
        return norms[0] if finite else math.nan

    def _optimizer_settings(self, *, critic: bool) -> dict[str, Any]:
        train = self.config.train
        first, second = train.betas
        return {
            "lr": train.learning_rate,
            "betas": (min(first, 0.5), second) if critic else (first, second),
            "weight_decay": 0.0 if critic else train.weight_decay,
            "fused": self.accelerator.device.type == "cuda",
        }

    def _set_learning_rate(self, step: int) -> None:
        train = self.config.train
        lowest = train.min_learning_rate / train.learning_rate
        factor = 1.0
        if step < train.warmup_steps or train.schedule == "cosine":
            factor = learning_rate_factor(step, train.warmup_steps, train.steps, lowest)
        for optimizer in (self.optimizer, self.critic_optimizer):
            for group in () if optimizer is None else optimizer.param_groups:
                group["lr"] = train.learning_rate * factor

    def _give_up_after(self, bad_in_a_row: int) -> None:
        if bad_in_a_row == 0:
            return
        step = self.state.step
        self.monitor.say(
            f"Step {step}: the gradient is not finite; the step was skipped ({bad_in_a_row} in a row, "
            f"{self.state.bad_steps} in all).",
            "yellow",
        )
        if bad_in_a_row >= self.config.train.max_bad_steps:
            self._save()  # these steps changed nothing: the weights are those of the last good one
            raise TrainingError(
                f"{bad_in_a_row} steps in a row had no finite gradient, up to step {step}, whose state is saved. Go "
                "on by --resume --allow-changes with a lower train.learning_rate or train.mixed_precision no; or "
                "begin anew by --restart."
            )

    # -- now and then -------------------------------------------------------------------------------------------

    def _log(self, terms: Mapping[str, Tensor], grad_norm: float, speed: float) -> None:
        """One line of metrics, of the images of all processes."""
        means = self.accelerator.reduce(torch.stack(list(terms.values())).float(), "mean").tolist()
        self.monitor.log({
            "step": self.state.step,
            **dict(zip(terms, means, strict=True)),
            "grad_norm": grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": speed,
            "memory_gib": memory_gib(self.accelerator.device),
            "seconds": self.state.seconds,
            "bad_steps": self.state.bad_steps,
            "unreadable_images": len(self.monitor.broken),
        })  # fmt: skip

    def _evaluate(self) -> None:
        with averaged_weights(self.ema, self.decoding):
            self.after, broken = measure(self.config, self.measured, self.data.held_out, self.accelerator)
        self.measured_at = self.state.step
        self.monitor.name_broken(broken)
        self.monitor.log({"step": self.state.step, "psnr": self.after})
        figures = ", ".join(f"{value:.2f} at t={level}" for level, value in self.after.items())
        self.monitor.say(f"step {self.state.step}  held-out PSNR {figures} (dB)")

    def _stop_if_asked(self) -> None:
        """Between the chores after the last step, whose state has been saved."""
        (signal_number,) = agreed(self.accelerator, self.stop.signal_number or 0)
        if signal_number:
            raise Interrupted(signal_number, self.run.path, self.state.step)

    # -- what is left in the folder -----------------------------------------------------------------------------

    def _decoded_examples(self) -> list[Tensor]:
        """On the main process, which alone draws the comparison."""
        if not self.accelerator.is_main_process:
            return []
        return decoded_examples(self.config, self.measured, self.examples, self.accelerator.device)

    def _report(self) -> None:
        """Write comparison.png and psnr.json, each whole or not at all."""
        with averaged_weights(self.ema, self.decoding):
            picture = comparison(self.config, self.examples, self.before_images, self._decoded_examples())
        figures = {
            "unit": "dB, mean over the held-out images",
            "before": dict(self.state.before),
            "after": self.after,
            "held_out_images": len(self.data.held_out),
            "steps": self.state.step,
        }
        for name, write in (
            ("comparison.png", picture.save),
            ("psnr.json", lambda path: path.write_text(json.dumps(figures, indent=2) + "\n")),
        ):
            partial = self.run.path / f".partial-{name}"
            write(partial)
            os.replace(partial, self.run.path / name)

    def _save(self) -> None:
        """Save the state, unless it is on the disk already, and the VAE."""
        if self.saved_at == self.state.step:
            return
        self.monitor.gather_broken()
        save_state(
            self.run,
            self.state.step,
            self.config.train.keep_states,
            self._write_tensors,
            {**self.state._asdict(), "broken": sorted(self.monitor.broken)},
            lambda action: on_main(self.accelerator, action),
        )
        self.saved_at = self.state.step
        on_main(self.accelerator, lambda: replace_folder(self.run.path / "vae", self._write_vae))

    def _write_tensors(self, folder: Path) -> None:
        save_tensors(folder, self.model, self.optimizer, self.ema)
        if self.critic_model is not None and self.critic_optimizer is not None:
            save_tensors(folder / "critic", self.critic_model, self.critic_optimizer, None)

    def _write_vae(self, folder: Path) -> None:
        with averaged_weights(self.ema, self.decoding):
            vae = copy.deepcopy(self.vae)
        vae.to("cpu", memory_format=torch.contiguous_format).save_pretrained(folder)

    def _load_newest(self) -> _State:
        folder = agreed_state(self.run, self.accelerator, self.monitor.say)
        try:
            progress = json.loads((folder / PROGRESS).read_text())
            load_tensors(folder, self.model, self.optimizer, self.ema)
            # A critic may join in the middle.
            if self.critic_model is not None and self.critic_optimizer is not None and (folder / "critic").exists():
                load_tensors(folder / "critic", self.critic_model, self.critic_optimizer, None)
        except torch.OutOfMemoryError:
            raise
        except (Exception, CheckpointException) as error:  # of many libraries, and all mean the same
            raise RunError(
                f"The state {folder} is whole, but can't be read: {first_cause(error)}. It is of another VAE, or of "
                "another version of this program: use the settings of its recipe.json, or begin anew by --restart."
            ) from error
        self._restore_optimizer_settings()
        self.monitor.broken = frozenset(progress.pop("broken"))
        state = _State(**progress)
        self.saved_at = state.step
        if self.ema is not None:
            self.ema.optimization_step = state.step - state.bad_steps
        kept = [line for line in self.run.logged() if line["step"] <= state.step]
        for line in kept:
            if "psnr" in line:
                self.after, self.measured_at = line["psnr"], line["step"]
        # All have read before one writes.
        self.accelerator.wait_for_everyone()
        on_main(self.accelerator, lambda: self.run.rewrite_metrics(kept))
        self.monitor.say(f"Resuming from {folder} at step {state.step} of {self.config.train.steps}.")
        return state

    def _restore_optimizer_settings(self) -> None:
        """A state brings the settings of the run that saved it."""
        for optimizer, critic in ((self.optimizer, False), (self.critic_optimizer, True)):
            for group in () if optimizer is None else optimizer.param_groups:
                group.update(self._optimizer_settings(critic=critic))
