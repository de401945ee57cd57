"""The fine-tuning of an autoencoder's decoder on noisy codes, see config.py, as a `Loop`.

OUT/recipe.json   metrics.jsonl   state/step-*/   vae/   psnr.json   comparison.png
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from itarflow.codec import Vae, VaeCodec, code_shape, load_vae, to_pixels, vae_traits
from itarflow.data.load import ImageData, load_data
from itarflow.data.loader import Batch, check_workers
from itarflow.pipeline.folder import finish_vae
from itarflow.runtime.devices import tf32_products, tuned_convolutions
from itarflow.runtime.files import atomically, replace_folder, write_json
from itarflow.runtime.json_file import as_type
from itarflow.runtime.modules import recomputed
from itarflow.runtime.processes import main_first, on_main
from itarflow.runtime.signals import StopSignal
from itarflow.training.decoder.config import (
    DecoderConfig,
    Decoding,
    Draws,
    augmented,
    codes_of,
    comparison,
    decoded_examples,
    draw,
    examples,
    held_out_psnr,
)
from itarflow.training.decoder.losses import (
    PatchCritic,
    adversarial_loss,
    hinge_loss,
    load_lpips,
    reconstruction_terms,
)
from itarflow.training.finished import Finished
from itarflow.training.loop import Loop
from itarflow.training.run_folder import RunDir, Start, check_run_folder, claimed
from itarflow.training.settings import learning_rate_factor
from itarflow.training.sharding import (
    averaged_weights,
    clear_gradients,
    clip_grad_norm,
    make_accelerator,
)
from itarflow.training.tensors import load_tensors, save_tensors


@dataclass(frozen=True, kw_only=True)
class Tuned(Finished):
    """The result of a finished fine-tuning."""

    before: dict[str, float]
    """Noise level -> PSNR in dB of the VAE as it was."""
    after: dict[str, float]
    """The same of the fine-tuned one."""
    held_out_images: int


def fine_tune(
    config: DecoderConfig,
    out: Path,
    *,
    start: Start = "fresh",
    max_steps: int | None = None,
    allow_changes: bool = False,
) -> Tuned:
    """Fine-tune a VAE's decoder on noisy codes, and write VAE, PSNR, a comparison and states to a folder.

    Args:
        config: all settings.
        out: the folder.
        start: "fresh", "resume" or "restart", see `run_folder.claim`.
        max_steps: stop after so many optimiser steps; the schedule is still that of the whole fine-tuning.
        allow_changes: resume although settings differ from the stored ones.

    Raises:
        ValueError: settings, VAE or data that do not fit together.
        RunError: the folder can't be used, a save failed, or there is no such VAE or LPIPS.
        TrainingError: too many steps in a row were not finite.
        Interrupted: SIGINT or SIGTERM arrived; the state has been saved.
    """
    accelerator = make_accelerator(out, accumulation=config.train.accumulation, trackers=config.train.trackers)
    run = RunDir(out, "OUT")
    check_run_folder(run, config, accelerator, start, allow_changes)
    vae = main_first(accelerator, lambda: load_vae(config.codec))
    config.check(vae, accelerator.num_processes)
    perceptual = main_first(accelerator, load_lpips) if config.loss.lpips else None
    data = load_data(config.data, image_size=config.size, in_channels=vae_traits(vae).in_channels)
    if len(data.held_out) == 0:
        raise ValueError("data.held_out_images is 0: there is nothing to measure the decoder on; expected 1 or more.")
    if config.data.in_memory:
        data = data.decoded()
    else:
        micro_batch = config.train.batch_size // accelerator.num_processes // config.train.accumulation
        check_workers(config.data.num_workers, micro_batch * vae_traits(vae).in_channels * config.size**2)
    with ExitStack() as within:
        within.enter_context(tf32_products(False))  # what is measured is float32; `Loop` allows TF32 for steps
        within.enter_context(tuned_convolutions())
        stop = within.enter_context(claimed(run, config, accelerator, start, allow_changes))
        tuning = _Tuning(config, run, data, accelerator, stop, vae=vae, perceptual=perceptual)
        return tuning.run_to(max_steps, resume=start == "resume", allow_changes=allow_changes)


class _DecoderStep(NamedTuple):
    """The output of an optimiser step."""

    terms: dict[str, Tensor]
    """() each, of this process's images: "loss", and what it is made of."""
    grad_norm: float
    """The decoder's, of all processes; not finite if the step was skipped."""

    @property
    def loss(self) -> Tensor:
        """()"""
        return self.terms["loss"]


class _Tuning(Loop[_DecoderStep, Tuned]):
    """A `Loop` that trains a VAE's decoder, and a critic with it if there is an adversarial loss."""

    task = "VAE"
    advice = (
        "Go on by --resume --allow-changes with a lower train.learning_rate or train.mixed_precision no; or begin "
        "anew by --restart."
    )

    def __init__(
        self,
        config: DecoderConfig,
        run: RunDir,
        data: ImageData,
        accelerator: Accelerator,
        stop: StopSignal,
        *,
        vae: Vae,
        perceptual: nn.Module | None,
    ) -> None:
        super().__init__(config, run, data, accelerator, stop, name="decoder", total_steps=config.train.steps)
        self.config = config
        # Convolutions are faster with the channels last, on CPUs and GPUs alike.
        self.vae = vae.to(accelerator.device, memory_format=torch.channels_last)
        if config.train.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing(recomputed)
        self.perceptual = None if perceptual is None else perceptual.to(accelerator.device)
        self.codec, self.decoding = VaeCodec(self.vae), Decoding(self.vae)
        self.measured = VaeCodec(self.vae, slice_size=4)  # whole images in float32 may be larger than those of a step
        self.examples = examples(config, data.held_out)
        self.before_images = self._decoded_examples()
        self.after: dict[str, float] = {}
        set_seed(config.train.seed)
        self.critic = PatchCritic(vae_traits(vae).in_channels) if config.loss.adversarial else None
        self.model = accelerator.prepare(self.decoding)
        self.critic_model: nn.Module | None = None if self.critic is None else accelerator.prepare(self.critic)
        self.optimizer = self._optimizer(self.model, config.train.betas[0], config.train.weight_decay)
        self.critic_optimizer = (
            None
            if self.critic_model is None
            else self._optimizer(self.critic_model, min(config.train.betas[0], 0.5), weight_decay=0.0)
        )
        decay = config.train.ema_decay
        self.ema = None if decay is None else EMAModel(self.model.parameters(), decay)

    def _optimizer(self, model: nn.Module, first_beta: float, weight_decay: float) -> torch.optim.Optimizer:
        train = self.config.train
        return torch.optim.AdamW(
            model.parameters(),
            lr=train.learning_rate,
            betas=(first_beta, train.betas[1]),
            weight_decay=weight_decay,
            fused=self.accelerator.device.type == "cuda",
        )

    def plan(self) -> str:
        """See `Loop.plan`."""
        config, train = self.config, self.config.train
        level = f"{config.t_max:g}" if config.t_min is None else f"{config.t_min:g} to {config.t_max:g}"
        learning = sum(parameter.numel() for parameter in self.decoding.parameters())
        return (
            f"{len(self.data.train):,} training images, {len(self.data.held_out):,} held out; "
            f"{train.steps:,} steps of {train.batch_size} images see each "
            f"{train.steps * train.batch_size / len(self.data.train):.3g} times. The decoder's {learning:,} weights "
            f"learn to decode codes with noise {level}.\n{self.shares()}"
        )

    def begin(self) -> None:
        """As `Loop.begin`, and evaluate the VAE before any step."""
        super().begin()
        if not self.own:
            self.evaluate()
            self.own = {"before": self.after}

    # -- one step -----------------------------------------------------------------------------------------------

    def step(self, number: int, micro_batches: Sequence[Batch]) -> _DecoderStep:
        """See `Loop.step`."""
        train, accelerator = self.config.train, self.accelerator
        self._set_learning_rate(number)
        size = self.config.trained_size
        channels = vae_traits(self.vae).in_channels
        draws = draw(self.config, code_shape(self.vae, (channels, size, size)), number, accelerator.device)
        critical = self.critic_model is not None and number >= self.config.loss.adversarial_start
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
        return _DecoderStep(
            {name: torch.stack([terms[name] for terms in found]).mean() for name in found[0]}, grad_norm
        )

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
        clear_gradients(self.model, self.optimizer)
        if self.critic_model is not None and self.critic_optimizer is not None:
            clear_gradients(self.critic_model, self.critic_optimizer)
        return norms[0] if finite else math.nan

    def _set_learning_rate(self, step: int) -> None:
        train = self.config.train
        lowest = train.min_learning_rate / train.learning_rate
        factor = 1.0
        if step < train.warmup_steps or train.schedule == "cosine":
            factor = learning_rate_factor(step, train.warmup_steps, train.steps, lowest)
        for optimizer in (self.optimizer, self.critic_optimizer):
            for group in () if optimizer is None else optimizer.param_groups:
                group["lr"] = train.learning_rate * factor

    def bad_step_report(self, output: _DecoderStep) -> str:  # noqa: ARG002
        """The cause is not known."""
        return ""

    # -- periodic work -----------------------------------------------------------------------------------------

    def metrics(self, output: _DecoderStep) -> dict[str, Any]:
        """See `Loop.metrics`."""
        means = self.accelerator.reduce(torch.stack(list(output.terms.values())).float(), "mean").tolist()
        return dict(zip(output.terms, means, strict=True))

    def end_of_step(self, last_step: int) -> None:
        """See `Loop.end_of_step`."""
        step = self.state.step
        if self.due(self.config.train.evaluate_every) and step < last_step and self.measured_at != step:
            self.evaluate()

    def evaluate(self) -> None:
        """See `Loop.evaluate`."""
        with averaged_weights(self.ema, self.decoding):
            self.after, broken = held_out_psnr(self.config, self.measured, self.data.held_out, self.accelerator)
        self.measured_at = self.state.step
        self.monitor.name_broken(broken)
        self.monitor.log({"step": self.state.step, "psnr": self.after})
        figures = ", ".join(f"{value:.2f} at t={level}" for level, value in self.after.items())
        self.monitor.say(f"step {self.state.step}  held-out PSNR {figures} (dB)")

    def load_state(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """See `Loop.load_state`."""
        as_type(self.own.get("before"), dict[str, float], f"before in the newest state of {self.run.path}")
        for line in lines:
            if "psnr" in line:
                self.after, self.measured_at = line["psnr"], line["step"]

    # -- exports -------------------------------------------------------------------------------------------------

    def _decoded_examples(self) -> list[Tensor]:
        """Decoded examples on the main process, which draws the comparison; [] on the others."""
        if not self.accelerator.is_main_process:
            return []
        return decoded_examples(self.config, self.measured, self.examples, self.accelerator.device)

    def _write_comparison(self) -> None:
        """Write comparison.png and psnr.json, each atomically."""
        with averaged_weights(self.ema, self.decoding):
            picture = comparison(self.config, self.examples, self.before_images, self._decoded_examples())
        figures = {
            "unit": "dB, mean over the held-out images",
            "before": self.own["before"],
            "after": self.after,
            "held_out_images": len(self.data.held_out),
            "steps": self.state.step,
        }
        with atomically(self.run.path / "comparison.png") as partial:
            picture.save(partial)
        write_json(self.run.path / "psnr.json", figures)

    def save_tensors(self, folder: Path) -> None:
        """As `Loop.save_tensors`, and those of the critic."""
        super().save_tensors(folder)
        if self.critic_model is not None and self.critic_optimizer is not None:
            save_tensors(folder / "critic", self.critic_model, self.critic_optimizer, None)

    def load_tensors(self, folder: Path) -> None:
        """As `Loop.load_tensors`, and those of the critic."""
        super().load_tensors(folder)
        # A critic may be added by a resumed run.
        if self.critic_model is not None and self.critic_optimizer is not None and (folder / "critic").exists():
            load_tensors(folder / "critic", self.critic_model, self.critic_optimizer, None)

    def export(self) -> None:
        """Write the VAE."""
        on_main(self.accelerator, lambda: replace_folder(self.run.path / "vae", self._write_vae))

    def _write_vae(self, folder: Path) -> None:
        with averaged_weights(self.ema, self.decoding):
            vae = copy.deepcopy(self.vae)
        vae.to("cpu", memory_format=torch.contiguous_format).save_pretrained(folder)
        finish_vae(folder)

    def finish(self) -> Tuned:
        """Write the comparison, and return the figures."""
        on_main(self.accelerator, self._write_comparison)
        return Tuned(
            **vars(self.finished()),
            before=self.own["before"],
            after=self.after,
            held_out_images=len(self.data.held_out),
        )
