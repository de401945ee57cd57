"""The least that a flow costs: FLOPs and bytes of a training step, an inverse and a score, and the time they take.

FLOPs are those of matrix products, attention among them, a multiplication and an addition counted apart. Bytes are
those between memory and processor if every product reads its operands once and writes its result once, and all else
is fused into the products. Attention is causal: the token at position n looks at n + 1 tokens, and no more is counted.

Symbols: B images, N tokens of a block, of which n = N - 1 go through its transformer, after P vectors of context and
a start token if it has them; L layers, C channels.
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
        # The result, the gradient of the input, and that of the weight. Nothing asks for those of images and levels.
        linears, conditioning = 3 * block.linear_flops(batch_size), 3 * block.conditioning_flops * batch_size
        unasked = batch_size * block.unasked_conditioning_flops
        if index == 0 and not block.has_start:
            unasked += batch_size * block.steps * block.entrance_flops
        flops += linears + conditioning - unasked + 3 * block.attention_flops(batch_size)
        values = 3 * block.linear_values(batch_size) + (4 + 8) * block.attention_values * batch_size * block.rows
        moved += dtype.itemsize * (values + 2 * block.weights)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    # In float32: the gradient is written; then it, the weight and two moments are read, and those three written.
    return Cost(flops, moved + 4 * (1 + 4 + 3) * parameters)


def score_cost(flow: TARFlow, batch_size: int, dtype: torch.dtype) -> Cost:
    """One evaluation of the score: a forward pass, and a backward pass to the images alone. Arguments as above."""
    flops = moved = 0
    for block in _blocks(flow):
        flops += 2 * block.linear_flops(batch_size) + block.conditioning_flops * batch_size
        flops += 3 * block.attention_flops(batch_size)
        values = 2 * block.linear_values(batch_size) + (4 + 8) * block.attention_values * batch_size * block.rows
        moved += dtype.itemsize * (values + 2 * block.weights)
    return Cost(flops, moved)


def inverse_costs(
    flow: TARFlow, batch_size: int, dtype: torch.dtype, guidance: Guidance | None = None
) -> Iterator[Cost]:
    """The token steps of one sequential inverse in order, and before each block's its conditioning and its prefix.

    A token step reads the weights of its block once and the keys and values of all positions so far. In a guided block
    both branches ride in one batch: twice the keys and values, but the same weights. What a step computes between its
    products is taken to stay in the processor's caches.

    Args:
        flow: any, also on the meta device. All images have labels, or context, if it takes them.
        batch_size: B.
        dtype: of weights, keys and values.
        guidance: None = off.
    """
    for from_noise, block in enumerate(reversed(_blocks(flow))):
        differs = guidance is not None and (block.has_condition or guidance.temperature != 1)
        guided = differs and guidance is not None and guidance.guides(from_noise)
        rows = 2 * batch_size if guided else batch_size
        yield Cost(rows * block.conditioning_flops, dtype.itemsize * block.conditioning_weights)
        if prefix := block.prefix:
            flops = block.prefix_flops(rows)
            keys_and_values = rows * 2 * block.attention_values * 2 * prefix  # written, then read
            yield Cost(flops, dtype.itemsize * (block.step_weights + keys_and_values))
        for position in range(prefix, prefix + block.steps):
            flops = rows * (block.token_flops + 4 * block.attention_values * (position + 1))
            # Those so far are read, one of them having just been written.
            keys_and_values = rows * 2 * block.attention_values * (position + 2)
            yield Cost(flops, dtype.itemsize * (block.step_weights + keys_and_values))


@dataclass(frozen=True)
class _Block:
    """The sizes of a block that costs depend on."""

    steps: int
    """n."""
    context: int
    """P."""
    has_start: bool
    """Whether there is a start token."""
    has_condition: bool
    """Whether it knows the class, or context."""
    layer_flops: int
    """Of one row through the layers."""
    entrance_flops: int
    """Of one token, or the start token, through what comes before them."""
    exit_flops: int
    """The same of what comes after them."""
    layer_values: int
    """Inputs and outputs of the linear ones among the layers, of one row."""
    outer_values: int
    """The same of what comes before and after them, of one token."""
    attention_values: int
    """L * C: a query, key, value or result of one row, in all layers."""
    conditioning_flops: int
    """Of noise level, class, context and first token, of one image."""
    unasked_conditioning_flops: int
    """The part of them whose inputs have no gradient."""
    step_weights: int
    """Parameters that a token step reads."""
    conditioning_weights: int
    """All others, but for the embeddings of positions."""
    weights: int
    """All, those of the layers that are shared with other blocks among them."""

    @property
    def prefix(self) -> int:
        """Rows before those of the tokens."""
        return self.context + self.has_start

    @property
    def rows(self) -> int:
        """Of a sequence, all that go through the layers."""
        return self.prefix + self.steps

    @property
    def token_flops(self) -> int:
        """Of one token through all linear layers."""
        return self.layer_flops + self.entrance_flops + self.exit_flops

    def linear_flops(self, batch_size: int) -> int:
        """Of a forward pass through all linear layers."""
        outer = (self.entrance_flops + self.exit_flops) * (self.rows - self.context)
        return batch_size * (self.layer_flops * self.rows + outer)

    def linear_values(self, batch_size: int) -> int:
        """Inputs and outputs of these layers."""
        return batch_size * (self.layer_values * self.rows + self.outer_values * (self.rows - self.context))

    def attention_flops(self, batch_size: int) -> int:
        """Of a forward pass: queries by keys, and weights by values, over all pairs of a row and one up to it."""
        return batch_size * 2 * self.attention_values * self.rows * (self.rows + 1)

    def prefix_flops(self, batch_size: int) -> int:
        """Of the prefix alone, and of what follows its last row."""
        pairs = self.prefix * (self.prefix + 1)
        each = self.layer_flops * self.prefix + 2 * self.attention_values * pairs
        return batch_size * (each + self.entrance_flops * self.has_start + self.exit_flops)


def _blocks(flow: TARFlow) -> list[_Block]:
    """Image side first."""
    return [_sizes(block) for block in cast(Sequence[AutoregressiveBlock], flow.blocks)]


def _sizes(block: AutoregressiveBlock) -> _Block:
    layers, embeddings = (*block.backbone, block.transformer), (block.noise_embedding, block.class_embedding)
    conditioning = [m for m in (*embeddings, block.proj_context, block.first_token) if m is not None]
    steps, context = block.num_tokens - 1, block.context_tokens
    has_start = block.start_token is not None
    runs = steps > 0 or context > 0 or has_start
    linears = _linears(*layers) if runs else []
    outer = [block.proj_in, block.proj_out] if runs else []
    of_context = [] if block.proj_context is None else [block.proj_context]
    unasked = context * _flops(of_context)
    unasked += 0 if block.noise_embedding is None else _flops(_linears(block.noise_embedding)[:1])
    if block.first_token is not None and block.noise_embedding is None and block.class_embedding is None:
        unasked += _flops(_linears(block.first_token)[:1])  # its input is zero
    channels = block.transformer.channels
    position = 0 if block.position_embedding is None else channels  # numbers of an embedding
    step_weights = _parameters([block.proj_in, *layers, block.final_norm, block.proj_out]) + position
    conditioning_weights = _parameters(conditioning) + (block.proj_in.in_features if has_start else 0)
    of_image = [linear for module in conditioning if module is not block.proj_context for linear in _linears(module)]
    return _Block(
        steps=steps,
        context=context,
        has_start=has_start,
        has_condition=context > 0 or block.class_embedding is not None,
        layer_flops=_flops(linears),
        entrance_flops=_flops(outer[:1]),
        exit_flops=_flops(outer[1:]),
        layer_values=_values(linears),
        outer_values=_values(outer),
        attention_values=sum(len(transformer.layers) for transformer in layers) * channels,
        conditioning_flops=_flops(of_image) + context * _flops(of_context),
        unasked_conditioning_flops=unasked,
        step_weights=step_weights,
        conditioning_weights=conditioning_weights,
        weights=step_weights + conditioning_weights + (steps - 1) * position,
    )


def _linears(*modules: nn.Module) -> list[nn.Linear]:
    return [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]


def _flops(linears: Iterable[nn.Linear]) -> int:
    """Of one row through each."""
    return sum(2 * linear.in_features * linear.out_features for linear in linears)


def _values(linears: Iterable[nn.Linear]) -> int:
    return sum(linear.in_features + linear.out_features for linear in linears)


def _parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
