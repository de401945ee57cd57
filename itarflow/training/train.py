"""The training of a flow, as a `Loop`.

A step's noise levels, noise, flips and dropped labels are `objective.draw`'s, of the recipe's seed and the step alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor

from itarflow.codec import Vae
from itarflow.data.identity import described
from itarflow.data.load import ImageData
from itarflow.data.loader import Batch, check_workers
from itarflow.flow.density import updated_prior_variance
from itarflow.flow.tarflow import TARFlow
from itarflow.runtime.devices import peak_tflops, tf32_products
from itarflow.runtime.modules import recomputed
from itarflow.runtime.processes import agreed, main_first, on_main
from itarflow.runtime.recording import release_recordings
from itarflow.runtime.signals import StopSignal
from itarflow.text_encoder import TextEncoder
from itarflow.training import captions
from itarflow.training.estimate import estimate
from itarflow.training.export import (
    export_pipeline,
    is_exported,
    make_pipeline,
    open_denoiser,
    sample_grid,
    training_record,
)
from itarflow.training.finished import Summary
from itarflow.training.held_out import Evaluation, evaluate_held_out
from itarflow.training.loop import Loop
from itarflow.training.metrics import bucket_edges, in_bits, step_metrics, step_sums, watch_blocks, worst_level
from itarflow.training.micro_batch import find_accumulation
from itarflow.training.objective import Losses, draw, training_losses
from itarflow.training.recipe import Recipe, open_data, open_vae, stored_bytes, with_identity
from itarflow.training.run_folder import RunDir, Start, check_run_folder, claimed
from itarflow.training.settings import learning_rate_factor
from itarflow.training.sharding import (
    clear_gradients,
    clip_grad_norm,
    compile_layers,
    distribute,
    launcher_asks_for_checkpointing,
    launcher_asks_for_sharding,
    make_accelerator,
    sends_bf16,
    update_average,
    whole_flow,
)


class _FlowStep(NamedTuple):
    """The output of an optimiser step, for this process's images."""

    losses: Losses
    noise_level: Tensor
    """(b,)"""
    grad_norm: float
    """Of all processes; not finite if the step was skipped."""
    moments: Tensor
    """As `watch_blocks` collects them; zeros unless the step is logged."""

    @property
    def loss(self) -> Tensor:
        """()"""
        return self.losses.loss


def train(
    recipe: Recipe,
    run_path: Path,
    *,
    start: Start = "fresh",
    max_steps: int | None = None,
    allow_changes: bool = False,
    find_micro_batch: bool = False,
) -> Summary:
    """Train a flow; its states, grids, metrics and pipeline go to the run's folder.

    Args:
        recipe: resolved settings.
        run_path: folder of the run.
        start: "fresh", "resume" or "restart", see `run_folder.claim`.
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
    recipe.check()
    accelerator = make_accelerator(run_path, accumulation=recipe.train.accumulation, trackers=recipe.train.trackers)
    with tf32_products(False):  # likelihoods and samples are float32 on every device; `Loop` allows it for steps
        return _train(recipe, RunDir(run_path), accelerator, start, max_steps, allow_changes, find_micro_batch)


def _train(
    recipe: Recipe,
    run: RunDir,
    accelerator: Accelerator,
    start: Start,
    max_steps: int | None,
    allow_changes: bool,
    find_micro_batch: bool,
) -> Summary:
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
    if not recipe.data.in_memory:
        micro_batch = recipe.train.batch_size // accelerator.num_processes // recipe.train.accumulation
        check_workers(recipe.data.num_workers, micro_batch * stored_bytes(recipe))
    vae = main_first(accelerator, lambda: open_vae(recipe))
    recipe = with_identity(recipe, vae)
    check_run_folder(run, recipe, accelerator, start, allow_changes)
    main_first(accelerator, lambda: open_denoiser(recipe, vae))
    data = open_data(recipe, vae)
    text = captions.open_text_encoder(recipe, data, run.pipeline, accelerator, accelerator.print)
    if recipe.data.in_memory:
        data = data.decoded()
    with claimed(run, recipe, accelerator, start, allow_changes) as stop:
        training = _Training(
            recipe, run, data, accelerator, stop, vae=vae, text=text, sharded=sharded, max_steps=max_steps
        )
        return training.run_to(max_steps, resume=start == "resume", allow_changes=allow_changes)


class _Training(Loop[_FlowStep, Summary]):
    """A `Loop` that trains a flow."""

    task = "model"
    advice = (
        "Go on by --resume --allow-changes with a lower train.learning_rate, a smaller train.max_grad_norm or "
        "train.mixed_precision no; or begin anew by --restart, also with a longer train.warmup_epochs."
    )

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        data: ImageData,
        accelerator: Accelerator,
        stop: StopSignal,
        *,
        vae: Vae | None,
        text: TextEncoder | None,
        sharded: bool,
        max_steps: int | None,
    ) -> None:
        total_steps = recipe.num_steps(len(data.train))
        super().__init__(recipe, run, data, accelerator, stop, name=recipe.name, total_steps=total_steps)
        self.recipe, self.sharded, self.max_steps = recipe, sharded, max_steps
        self.tf32 = recipe.noise.distribution != "dequantise"  # a likelihood's objective is that of its evaluation
        self.vae = vae  # on the CPU; only sample grids and exports need it
        self.text = text  # on the CPU, of the main process; only exports need it
        self.null_context = captions.empty(data, accelerator.device)
        self.held_out = Evaluation({}, None)
        self.edges = bucket_edges(recipe)
        self.forward_flops = estimate(recipe).forward_flops
        set_seed(recipe.train.seed)
        self.flow: TARFlow = recipe.model.build(recipe.noise_range)
        if recipe.train.gradient_checkpointing:
            self.flow.enable_gradient_checkpointing(recomputed)
        self.model = distribute(self.flow, accelerator, sharded, bf16=sends_bf16(recipe))
        if recipe.train.compile:
            compile_layers(self.flow)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.train.learning_rate,
            betas=recipe.train.betas,
            weight_decay=recipe.train.weight_decay,
            fused=accelerator.device.type in ("cuda", "cpu"),
        )
        decay = recipe.train.ema_decay
        self.ema = None if decay is None else EMAModel(self.model.parameters(), decay, foreach=True)

    def plan(self) -> str:
        """See `Loop.plan`."""
        train, alone = self.recipe.train, self.accelerator.num_processes == 1
        evaluate_every, sample_every = self._intervals()
        nothing = " (there is nothing to shard over)" if train.shard else ""
        spread = nothing if alone else ", the model sharded over them" if self.sharded else ", each a whole model"
        short = self.max_steps is not None and self.max_steps < self.total_steps
        part = f", of which --max-steps takes the first {self.max_steps:,}" if short else ""
        data = "\n".join(described(self.data.identity))
        return (
            f"{data}\nAn epoch has {self.recipe.steps_per_epoch(len(self.data.train)):.4g} steps, the whole training "
            f"{self.total_steps:,}{part}. "
            f"Held-out likelihood every {evaluate_every:,} steps, samples every {sample_every:,}, a saved state every "
            f"{train.save_every:,}.\n{self.shares(spread)}"
        )

    def _intervals(self) -> tuple[int, int]:
        """Steps between held-out evaluations, and between sample grids."""
        train, steps_per_epoch = self.recipe.train, self.recipe.steps_per_epoch(len(self.data.train))
        every = (train.evaluate_every_epochs, train.sample_every_epochs)
        evaluate, sample = (max(1, round(epochs * steps_per_epoch)) for epochs in every)
        return evaluate, sample

    # -- one step -----------------------------------------------------------------------------------------------

    def step(self, number: int, micro_batches: Sequence[Batch]) -> _FlowStep:
        """See `Loop.step`."""
        train, accelerator = self.recipe.train, self.accelerator
        self.model.train()
        self._set_learning_rate(number)
        draws = draw(self.recipe, number, accelerator.device)
        watched = (number + 1) % train.log_every == 0
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
                context = captions.vectors(self.recipe, batch, accelerator.device)
                with accelerator.accumulate(self.model):
                    bf16 = train.mixed_precision == "bf16"
                    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
                        given = images, labels, part, context, self.null_context
                        losses = training_losses(self.model, self.recipe, *given)
                    accelerator.backward(losses.loss)
                    if accelerator.sync_gradients:
                        grad_norm = clip_grad_norm(self.model, train.max_grad_norm or math.inf)
                        if math.isfinite(grad_norm):
                            self.optimizer.step()
                        clear_gradients(self.model, self.optimizer)
                parts.append(losses)
                levels.append(part.noise_level)
        output = _FlowStep(Losses.together(parts), torch.cat(levels), grad_norm, moments)
        if math.isfinite(grad_norm):
            self._after_update(output.losses)
            if self.monitor.exploded(grad_norm):
                worst = worst_level(output.losses.nll, output.noise_level)
                self.monitor.report_explosion(number + 1, grad_norm, *worst)
        return output

    def _after_update(self, losses: Losses) -> None:
        if self.ema is not None:
            update_average(self.ema, self.model)
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

    def bad_step_report(self, output: _FlowStep) -> str:
        """The noise level of the worst image of all processes. All processes call this."""
        found = gather_object([worst_level(output.losses.nll, output.noise_level)])
        level, nll = max(found, key=lambda pair: (not math.isfinite(pair[1]), pair[1]))
        return f" The worst image has noise level {level:.3g} (nll {nll:.3g} nats/dim)."

    # -- periodic work -----------------------------------------------------------------------------------------

    def metrics(self, output: _FlowStep) -> dict[str, Any]:
        """See `Loop.metrics`."""
        sums = self.accelerator.reduce(step_sums(output.losses, output.noise_level, output.moments, self.edges), "sum")
        processes = self.accelerator.num_processes
        metrics = step_metrics(sums, processes, self.edges)
        # Of one forward and one backward pass; recomputed activations do not count.
        tflops = self.speed / processes * 3 * self.forward_flops / 1e12
        peak = peak_tflops(self.accelerator.device, self.recipe.products)
        return {
            "epoch": self.state.step / self.recipe.steps_per_epoch(len(self.data.train)),
            **metrics,
            **(in_bits(metrics) if self.vae is None else {}),
            "tflops": tflops,
            "utilisation": None if peak is None else tflops / peak,
        }

    def end_of_step(self, last_step: int) -> None:
        """See `Loop.end_of_step`."""
        evaluate_every, sample_every = self._intervals()
        step = self.state.step
        if self.due(evaluate_every) and step + evaluate_every // 2 < last_step and self.measured_at != step:
            self.evaluate()
        drawn_now = self.due(sample_every) and step + sample_every // 2 < last_step
        if drawn_now and not self.drawn_before(self.run.grid(step)):
            self._sample()

    def evaluate(self) -> None:
        """See `Loop.evaluate`."""
        if len(self.data.held_out):
            self.monitor.say(f"step {self.state.step}  evaluating {len(self.data.held_out):,} held-out images")
        with self._sampling_flow() as flow:
            self.held_out = evaluate_held_out(flow, self.data.held_out, self.recipe, self.accelerator)
        self.measured_at = self.state.step
        self.monitor.name_broken(self.held_out.broken)
        self.monitor.log_held_out(self.state.step, self.held_out)

    def _sample(self) -> Path:
        path = self.run.grid(self.state.step)
        self.monitor.say(f"step {self.state.step}  sampling {self.recipe.sampling.num_images:,} images")
        with self._sampling_flow() as flow:
            vae = copy.deepcopy(self.vae)  # a copy on the device, freed with the pipeline
            pipeline = make_pipeline(flow, self.recipe, self.data.class_names, None, vae).to(self.accelerator.device)
            sample_grid(pipeline, self.recipe, self.data, path, self.accelerator)
        self.monitor.log_picture(self.state.step, path)
        self.accelerator.wait_for_everyone()
        return path

    @contextmanager
    def _sampling_flow(self) -> Iterator[TARFlow]:
        """Averaged weights, and no compilation: sampling has other shapes at each token."""
        whole = whole_flow(self.model, self.recipe, self.ema, self.accelerator.device)
        try:
            with whole as flow, torch.compiler.set_stance("force_eager"):
                yield flow
        finally:
            release_recordings()  # a step needs their memory more than the next grid needs them

    # -- exports -------------------------------------------------------------------------------------------------

    def export(self) -> None:
        """Write the pipeline, unless the very same is there, perhaps with evaluations that were added to it."""
        main = self.accelerator.is_main_process
        record = training_record(self.recipe, self.held_out, self._facts())
        if agreed(self.accelerator, int(main and is_exported(self.run.pipeline, record)))[0]:
            return
        with whole_flow(self.model, self.recipe, self.ema, torch.device("cpu"), wanted=main) as flow:
            pipeline = make_pipeline(flow, self.recipe, self.data.class_names, record, self.vae, self.text)
            on_main(self.accelerator, lambda: export_pipeline(pipeline, self.run.pipeline))

    def _facts(self) -> dict[str, Any]:
        return {
            "train_images": len(self.data.train),
            "held_out_images": len(self.data.held_out),
            "data_content": self.data.identity.content,
            "steps": self.state.step,
            "total_steps": self.total_steps,
            "seconds": round(self.state.seconds, 1),
            "bad_steps": self.state.bad_steps,
            "unreadable_images": len(self.monitor.broken),
            **captions.facts(self.data, self.text is not None),
        }

    def load_state(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """See `Loop.load_state`."""
        for line in lines:
            if "held_out" in line:
                found = line["held_out"]
                self.held_out, self.measured_at = Evaluation(found["nll"], found["bpd"]), line["step"]

    def finish(self) -> Summary:
        """Write a last sample grid, and the pipeline with the last evaluation."""
        grid = self._sample()
        self.export()
        return Summary(
            **vars(self.finished()),
            held_out=self.held_out,
            class_names=self.data.class_names if self.recipe.model.num_classes else (),
            prompt=captions.example_prompt(self.data) if self.recipe.model.takes_captions else None,
            grid=grid,
        )
