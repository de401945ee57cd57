"""What a model costs before anything is allocated: parameters, FLOPs per image, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from itarflow.block import AutoregressiveBlock
from itarflow.flow import TARFlow, nll_per_dim
from itarflow.recipe import Recipe


@dataclass(frozen=True)
class Estimate:
    """Costs of a recipe."""

    parameters: int
    forward_flops: int
    """Of one image through the flow, multiplications and additions counted apart."""
    training_flops: int
    """Of one image: forward and backward, and the second forward of gradient checkpointing."""
    sampling_tokens: int
    """Sequential token steps of one inverse, over all blocks."""
    state_bytes: int
    """Weights, gradients, AdamW's moments and, if there is one, the moving average, in float32."""
    activation_bytes: int
    """Kept for the backward pass, for one image, in float32; about half with bf16."""
    checkpointed_bytes: int
    """The same with gradient checkpointing."""
    cache_bytes: int
    """Largest key-value cache of sampling, for one image in float32, both passes if the block is guided."""


def estimate(recipe: Recipe) -> Estimate:
    """Count on the meta device, where tensors have shapes but no memory; takes seconds at any size."""
    with torch.device("meta"):
        flow = recipe.model.build(recipe.noise_range)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    with FlopCounterMode(display=False) as counter:
        activations = _saved_bytes(flow)
    forward = counter.get_total_flops()
    copies = 4 if recipe.train.ema_decay is None else 5
    flow.enable_gradient_checkpointing()
    return Estimate(
        parameters=parameters,
        forward_flops=forward,
        training_flops=(4 if recipe.train.gradient_checkpointing else 3) * forward,
        sampling_tokens=flow.num_solved_tokens,
        state_bytes=copies * 4 * parameters,
        activation_bytes=activations,
        checkpointed_bytes=_saved_bytes(flow) + _one_layer_bytes(recipe, flow),
        cache_bytes=_cache_bytes(recipe, flow),
    )


def _cache_bytes(recipe: Recipe, flow: TARFlow) -> int:
    guides = recipe.sampling.guidance.guides
    blocks = enumerate(reversed(cast(Sequence[AutoregressiveBlock], flow.blocks)))
    caches = (block.new_cache(2 if guides(index) else 1) for index, block in blocks)
    return max(cache.numel() * cache.element_size() for cache in caches)


def _example(flow: TARFlow) -> tuple[Tensor, Tensor | None, Tensor]:
    labels = torch.zeros(1, dtype=torch.int64, device="meta") if flow.config.num_classes else None
    return torch.zeros(1, *flow.image_shape, device="meta"), labels, torch.ones(1, device="meta")


def _saved_bytes(flow: TARFlow) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one image, weights left out."""
    weights = {id(parameter) for parameter in flow.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        # The meta device writes attention out and keeps its weights; the kernels of real devices do not.
        square = base.ndim == 4 and base.shape[-1] == base.shape[-2] != flow.config.head_dim
        if id(base) not in weights and not square:
            saved[id(base)] = base  # held, so that its id stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nll_per_dim(flow(*_example(flow))).sum()
    return sum(tensor.numel() * tensor.element_size() for tensor in saved.values())


def _one_layer_bytes(recipe: Recipe, flow: TARFlow) -> int:
    """What the backward pass recomputes at a time: the widest block's activations over its layers."""
    single = replace(recipe.model, num_layers=(1,) * len(flow.blocks), shared_layers=0)
    with torch.device("meta"):
        shallow = single.build()
    return _saved_bytes(shallow) // len(flow.blocks)


def human_bytes(count: float) -> str:
    """Such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.3g} TiB"


def human_number(count: float) -> str:
    """Such as "417M" or "1.5T"."""
    for unit in ("", "K", "M", "G"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"
