"""The largest micro-batch that fits the memory, found by trying."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from diffusers.training_utils import EMAModel

from itarflow.flow.density import nll_per_dim
from itarflow.runtime.devices import is_out_of_memory
from itarflow.runtime.modules import recomputed
from itarflow.training.recipe import Recipe
from itarflow.training.sharding import update_average


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
    gather_object([0])  # from now on there is what the connection needs, which is no memory of torch's
    with _part_of_memory(accelerator.device):
        sizes = (size for size in range(share, 0, -1) if share % size == 0)
        found = next((share // size for size in sizes if _fits(recipe, accelerator, size)), 0)
    everywhere = gather_object([found])
    if 0 in everywhere:
        raise ValueError(
            "not even a micro-batch of one image fits the memory; try --train.gradient-checkpointing, "
            "--train.mixed-precision bf16, or --train.shard on several devices."
        )
    return max(everywhere)


LEFT = 0.08
"""Part of a GPU's memory that a trial leaves to fragmentation, sample grids and what is not torch's."""


@contextmanager
def _part_of_memory(device: torch.device) -> Iterator[None]:
    """Within, and on this GPU, more than all but `LEFT` of the memory counts as too much."""
    if device.type != "cuda":
        yield
        return
    # An older torch can't say; then it is the usual one.
    before = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    torch.cuda.set_per_process_memory_fraction(min(before, 1 - LEFT), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
        torch.cuda.reset_peak_memory_stats(device)  # or metrics would include the peak of the trials


def _fits(recipe: Recipe, accelerator: Accelerator, batch_size: int) -> bool:
    """Whether a step with so many images at a time fits; the memory of the trial is free again."""
    fits = True
    try:
        _try_steps(recipe, accelerator, batch_size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    # Outside the handler, which keeps the tensors of the failed trial alive.
    clear_device_cache(garbage_collection=True)
    return fits


def _try_steps(recipe: Recipe, accelerator: Accelerator, batch_size: int) -> None:
    """Two training steps on noise: the optimiser's state is there from the second on. No process waits for another."""
    device = accelerator.device
    flow = recipe.model.build(recipe.noise_range).to(device).train()
    if recipe.train.gradient_checkpointing:
        flow.enable_gradient_checkpointing(recomputed)
    optimizer = torch.optim.AdamW(flow.parameters(), fused=device.type in ("cuda", "cpu"))
    ema = None if recipe.train.ema_decay is None else EMAModel(flow.parameters(), recipe.train.ema_decay, foreach=True)
    images = torch.randn(batch_size, *flow.image_shape, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device) if recipe.model.num_classes else None
    level = torch.full((batch_size,), recipe.noise.t_max, device=device)
    captioned = recipe.model.takes_captions
    context = torch.randn(batch_size, *recipe.model.context_shape, device=device) if captioned else None
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.mixed_precision == "bf16"):
            nll_per_dim(flow(images, labels, level, context=context)).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), math.inf)
        optimizer.step()
        # They stay in DDP's buckets, and from one micro-batch to the next.
        optimizer.zero_grad(set_to_none=batch_size == recipe.train.batch_size)
        if ema is not None:
            update_average(ema, flow)
