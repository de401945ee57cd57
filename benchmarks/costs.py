"""The least that a flow costs: FLOPs and bytes of a training step, an inverse and a score, and the time they take.

FLOPs are those of matrix products, attention among them, a multiplication and an addition counted apart. Bytes are
those between memory and processor if every product reads its operands once and writes its result once, and all else
is fused into the products. Attention is causal: the token at position n looks at n + 1 tokens, and no more is counted.

Symbols: B images, N tokens of a block, of which n = N - 1 go through its transformer, L layers, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from itarflow.flow import TARFlow
from itarflow.flow.block import AutoregressiveBlock
from itarflow.inverse import Guidance


@dataclass(frozen=True)
class Cost:
    """What something takes that is done at one go: nothing of it waits for its end."""

    flops: int
    """Multiplications and additions."""
    moved_bytes: int
    """Read from memory, or written to it."""


@dataclass(frozen=True)
class Peak:
    """The most that a device does."""

    name: str
    """Of the device, for people."""
    dtype: torch.dtype
    """Of the numbers that are multiplied."""
    flops_per_second: float
    bytes_per_second: float
    """Between memory and processor."""


H200 = Peak("H200", torch.bfloat16, flops_per_second=790e12, bytes_per_second=4.3e12)
"""What large products and copies have been seen to reach on one; its data sheet says 989e12 and 4.8e12."""


def total(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    flops, moved = zip(*((cost.flops, cost.moved_bytes) for cost in costs), strict=True)
    return Cost(sum(flops), sum(moved))


def floor(costs: Iterable[Cost], peak: Peak) -> float:
    """The least seconds in which a device does one after another what waits for one another.

    Each takes the longer of computing and moving; the two overlap within one cost, never between two.

    Args:
        costs: one a training step or score; one a token step of an inverse.
        peak: of the device.
    """
    return sum(max(cost.flops / peak.flops_per_second, cost.moved_bytes / peak.bytes_per_second) for cost in costs)


def training_cost(flow: TARFlow, batch_size: int, dtype: torch.dtype) -> Cost:
    """One optimiser step: forward and backward pass without recomputation, and AdamW in float32.

    Args:
        flow: any, also on the meta device.
        batch_size: B.
        dtype: of the products, as under autocast; the weights themselves are float32.
    """
    flops = moved = 0
    for index, block in enumerate(_blocks(flow)):
        tokens = batch_size * block.steps
        # The result, the gradient of the input, and that of the weight. Nothing asks for those of images and levels.
        linears, conditioning = 3 * block.linear_flops * tokens, 3 * block.conditioning_flops * batch_size
        unasked = batch_size * block.unasked_conditioning_flops
        if index == 0:
            unasked += tokens * block.entrance_flops
        flops += linears + conditioning - unasked + 3 * block.attention_flops(batch_size)
        values = 3 * block.linear_values * tokens + (4 + 8) * block.attention_values * tokens
        moved += dtype.itemsize * (values + 2 * block.weights)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    # In float32: the gradient is written; then it, the weight and two moments are read, and those three written.
    return Cost(flops, moved + 4 * (1 + 4 + 3) * parameters)


def score_cost(flow: TARFlow, batch_size: int, dtype: torch.dtype) -> Cost:
    """One evaluation of the score: a forward pass, and a backward pass to the images alone. Arguments as above."""
    flops = moved = 0
    for block in _blocks(flow):
        tokens = batch_size * block.steps
        flops += 2 * block.linear_flops * tokens + block.conditioning_flops * batch_size
        flops += 3 * block.attention_flops(batch_size)
        values = 2 * block.linear_values * tokens + (4 + 8) * block.attention_values * tokens
        moved += dtype.itemsize * (values + 2 * block.weights)
    return Cost(flops, moved)


def inverse_costs(
    flow: TARFlow, batch_size: int, dtype: torch.dtype, guidance: Guidance | None = None
) -> Iterator[Cost]:
    """The token steps of one sequential inverse in order, and before each block's its conditioning.

    A token step reads the weights of its block once and the keys and values of all positions so far. In a guided block
    both branches ride in one batch: twice the keys and values, but the same weights. What a step computes between its
    products is taken to stay in the processor's caches.

    Args:
        flow: any, also on the meta device. All images have labels if it has classes.
        batch_size: B.
        dtype: of weights, keys and values.
        guidance: None = off.
    """
    differs = guidance is not None and (flow.config.num_classes > 0 or guidance.temperature != 1)
    for from_noise, block in enumerate(reversed(_blocks(flow))):
        guided = differs and guidance is not None and guidance.guides(from_noise)
        rows = 2 * batch_size if guided else batch_size
        yield Cost(rows * block.conditioning_flops, dtype.itemsize * block.conditioning_weights)
        for position in range(block.steps):
            flops = rows * (block.linear_flops + 4 * block.attention_values * (position + 1))
            # Those so far are read, one of them having just been written.
            keys_and_values = rows * 2 * block.attention_values * (position + 2)
            yield Cost(flops, dtype.itemsize * (block.step_weights + keys_and_values))


@dataclass(frozen=True)
class _Block:
    """The sizes of a block that costs depend on."""

    steps: int
    """n."""
    linear_flops: int
    """Of one token through all linear layers."""
    linear_values: int
    """Inputs and outputs of these layers, of one token."""
    attention_values: int
    """L * C: a query, key, value or result of one token, in all layers."""
    entrance_flops: int
    """The part of linear_flops that the first layer has."""
    conditioning_flops: int
    """Of noise level, class and first token, of one image."""
    unasked_conditioning_flops: int
    """The part of them whose inputs have no gradient."""
    step_weights: int
    """Parameters that a token step reads."""
    conditioning_weights: int
    """All others, but for the embeddings of positions."""
    weights: int
    """All, those of the layers that are shared with other blocks among them."""

    def attention_flops(self, batch_size: int) -> int:
        """Of a forward pass: queries by keys, and weights by values, over n (n + 1) / 2 pairs of positions."""
        return batch_size * 2 * self.attention_values * self.steps * (self.steps + 1)


def _blocks(flow: TARFlow) -> list[_Block]:
    """Image side first."""
    return [_sizes(block) for block in cast(Sequence[AutoregressiveBlock], flow.blocks)]


def _sizes(block: AutoregressiveBlock) -> _Block:
    trunk = [block.proj_in, *block.backbone, block.transformer, block.proj_out]
    conditioning = [m for m in (block.noise_embedding, block.class_embedding, block.first_token) if m is not None]
    steps = block.num_tokens - 1
    linears = [linear for module in trunk for linear in _linears(module)] if steps else []
    unasked = [] if block.noise_embedding is None else _linears(block.noise_embedding)[:1]
    if block.first_token is not None and block.noise_embedding is None and block.class_embedding is None:
        unasked = _linears(block.first_token)[:1]  # its input is zero
    channels = block.transformer.channels
    layers = sum(len(transformer.layers) for transformer in (*block.backbone, block.transformer))
    step_weights = _parameters(trunk) + channels  # and the embedding of its position
    conditioning_weights = _parameters(conditioning)
    return _Block(
        steps=steps,
        linear_flops=_flops(linears),
        linear_values=sum(linear.in_features + linear.out_features for linear in linears),
        attention_values=layers * channels,
        entrance_flops=_flops([block.proj_in]),
        conditioning_flops=_flops([linear for module in conditioning for linear in _linears(module)]),
        unasked_conditioning_flops=_flops(unasked),
        step_weights=step_weights,
        conditioning_weights=conditioning_weights,
        weights=step_weights + conditioning_weights + (steps - 1) * channels,
    )


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _flops(linears: Iterable[nn.Linear]) -> int:
    """Of one row through each."""
    return sum(2 * linear.in_features * linear.out_features for linear in linears)


def _parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
