"""The largest micro-batch that fits the memory, found by trying."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, gather_object
from diffusers.training_utils import EMAModel

from itarflow.flow.tarflow import nll_per_dim
from itarflow.training.recipe import Recipe


def find_accumulation(recipe: Recipe, accelerator: Accelerator) -> int:
    """The smallest train.accumulation with which a training step fits every process's memory.

    Args:
        recipe: its train.accumulation is ignored.
        accelerator: of the processes that will train; each tries for itself, the largest value is used.

    Raises:
        ValueError: not even one image fits, or the processes can't share the batch.
    """
    share, rest = divmod(recipe.train.batch_size, accelerator.num_processes)
    if rest:
        raise ValueError(
            f"train.batch_size {recipe.train.batch_size} can't be shared evenly by {accelerator.num_processes} "
            f"processes; expected a multiple of {accelerator.num_processes}."
        )
    smaller = iter([size for size in range(share - 1, 0, -1) if share % size == 0])

    @find_executable_batch_size(starting_batch_size=share, reduce_batch_size_fn=lambda: next(smaller, 0))
    def attempt(batch_size: int) -> int:
        _try_steps(recipe, accelerator, batch_size)
        return share // batch_size

    found: int | str
    try:
        found = attempt()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        found = 0
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # or metrics would include the peak of the trials
    everywhere = gather_object([found])
    if 0 in everywhere:
        raise ValueError(
            "not even a micro-batch of one image fits the memory; try --train.gradient-checkpointing, "
            "--train.mixed-precision bf16, or --train.shard on several devices."
        )
    return max(everywhere)


def _try_steps(recipe: Recipe, accelerator: Accelerator, batch_size: int) -> None:
    """Two training steps on noise: the optimiser's state is there from the second on. No process waits for another."""
    device = accelerator.device
    flow = recipe.model.build(recipe.noise_range).to(device).train()
    if recipe.train.gradient_checkpointing:
        flow.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(flow.parameters(), fused=device.type in ("cuda", "cpu"))
    ema = None if recipe.train.ema_decay is None else EMAModel(flow.parameters(), recipe.train.ema_decay, foreach=True)
    # What DDP keeps besides: a second copy of the gradients, to send them.
    buckets = [torch.empty_like(p) for p in flow.parameters() if accelerator.num_processes > 1]
    images = torch.randn(batch_size, *flow.image_shape, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device) if recipe.model.num_classes else None
    level = torch.full((batch_size,), recipe.noise.t_max, device=device)
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.mixed_precision == "bf16"):
            nll_per_dim(flow(images, labels, level)).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), math.inf)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(flow.parameters())
    del buckets
