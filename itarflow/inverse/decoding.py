"""The conditioner of a block for its inverse: fast, without gradients, one window of tokens after another.

It gives mu_i(x_{<i}) and exp(alpha_i(x_{<i})), guided or not, of equations 4 and 9 of TARFlow, one window of i at a
time; keys and values of x_{<i} are cached (TARFlow, appendix D).

Weights are cast and laid out once, the condition is embedded once, keys and values of earlier tokens are kept in a
cache, and both passes of guidance are one batch.

Shapes: B batch, B' = 2B if the block is guided, else B; N tokens, n of them in a window, D values a token, C channels,
H heads, E head width (C = H * E), L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from itarflow.inverse.guidance import Affine, Guidance, guide
from itarflow.runtime.kernels import (
    Cache,
    PackedLinear,
    attention,
    attention_bias,
    decode_attention,
    has_decode_attention,
)


class PackedLayer(NamedTuple):
    """A transformer layer for use without gradients."""

    qkv: PackedLinear
    """With the norm before it."""
    proj: PackedLinear
    hidden: PackedLinear
    """The first layer of the MLP, with the norm before it and GELU after it."""
    down: PackedLinear


class Window(NamedTuple):
    """Where the tokens of a window lie."""

    positions: slice | Tensor
    """The same for all samples, or (B', n); or (1,) that of a single token, the same for all and on the device."""
    length: int
    """Positions of the cache that are read: 0 .. length - 1."""
    mask: Tensor | None
    """Where a token attends to a position, (n, length) or (B', 1, n, length), by `attention_bias`; None = to all, or
    causal, or up to its own."""
    causal: bool
    """Whether attention is causal from position 0, which kernels know without a mask."""
    rows: Tensor | None = None
    """(B', 1), 0 .. B' - 1, where positions are (B', n)."""


@dataclass(frozen=True)
class CachedConditioner:
    """A `solvers.Conditioner` of a block with a cache of keys and values. Stateful: each call writes the cache.

    A call writes the positions of its window, and reads those before it, which earlier calls must have written.
    """

    layers: tuple[PackedLayer, ...]
    proj_in: PackedLinear
    proj_out: PackedLinear
    position: Tensor
    """(N, C), in the block's own order."""
    embedding: Tensor
    """(B', 1, C), noise level and class."""
    temperature: Tensor | None
    """(B',), divides the attention logits."""
    cache: Cache
    split: Callable[[Tensor], Affine]
    """Outputs of the network -> (shift, log_scale), in at least float32."""
    guidance: Guidance | None
    """None = the block is not guided."""
    weights: Tensor
    """(N - 1, 1), of guidance, for the token after each."""

    def __call__(self, tokens: Tensor, start: int | Tensor, stop: int | None = None) -> Affine:
        """(shift, scale), each (B, n, D), of the tokens at start + 1 .. start + n; see `solvers.Conditioner`."""
        count = tokens.shape[1]
        if isinstance(start, int):
            return self.at(tokens, self._slice_window(start, count))
        return self.at(tokens, self.scattered(start, count, stop or int(start.max()) + count))

    def scattered(self, start: Tensor, count: int, length: int) -> Window:
        """The windows of `count` tokens that begin at start (B,); none goes beyond `length`."""
        start = start.repeat(2) if self.guidance else start
        positions = start[:, None] + torch.arange(count, device=start.device)
        known = torch.arange(length, device=start.device)
        allowed = (known <= positions[..., None])[:, None]
        rows = torch.arange(len(start), device=start.device)[:, None]
        return Window(positions, length, attention_bias(allowed, self.cache.tensor.dtype), causal=False, rows=rows)

    @property
    def reads_exactly(self) -> bool:
        """Whether attention of a single token reads the cache up to its own position, which it looks up itself."""
        return has_decode_attention(self.cache.tensor[0])

    def solve(self, x: Tensor, z: Tensor, start: Tensor, count: int, length: int) -> None:
        """Solve `count` tokens, one after another on the device, which need not wait for the host.

            x_{i+1} = z_{i+1} exp(alpha_{i+1}(x_{<=i})) + mu_{i+1}(x_{<=i})         (TARFlow, eq. 4)

        Args:
            x: (B, N, D), known up to `start`; those that follow are written.
            z: (B, N, D).
            start: (1,) int64, the same for all samples.
            count: i = start .. start + count - 1.
            length: positions of the cache that are read, at least start + count, unless `reads_exactly`.
        """
        positions = start + torch.arange(count, device=x.device)
        token, noise, solved = x.index_select(1, start), z.index_select(1, positions + 1), []
        added = self.position[positions][:, None, None] + self.embedding
        weights, masks = self.weights[positions], [None] * count
        if not self.reads_exactly:
            allowed = torch.arange(length, device=x.device) <= positions[:, None]
            masks = attention_bias(allowed, self.cache.tensor.dtype).split(1)
        for index, (position, mask) in enumerate(zip(positions.split(1), masks, strict=True)):
            window = Window(position, length, mask, causal=False)
            shift, scale = self._affine(token, added[index], window, weights[index])
            token = torch.addcmul(shift, noise[:, index : index + 1], scale)
            solved.append(token)
        x.index_copy_(1, positions + 1, torch.cat(solved, dim=1))

    def at(self, tokens: Tensor, window: Window) -> Affine:
        """As a call: (shift, scale), each (B, n, D), of the tokens that follow those (B, n, D) of the window."""
        positions = window.positions
        weights = self.weights[positions if isinstance(positions, slice) else positions[: len(tokens)]]
        return self._affine(tokens, self.position[positions] + self.embedding, window, weights)

    def _affine(self, tokens: Tensor, added: Tensor, window: Window, weights: Tensor) -> Affine:
        """`at`, with what is added to the embedded tokens, (B', n, C), and the weights of guidance."""
        tokens = tokens.to(self.position.dtype)
        tokens = tokens if self.guidance is None else torch.cat((tokens, tokens))
        x = run_layers(
            self.layers, self.proj_in.plus(tokens, added), self.cache.reaching(window.length), window, self.temperature
        )
        shift, log_scale = self.split(self.proj_out(x))
        if self.guidance is None:
            return shift, log_scale.exp()
        (shift, shift_u), (log_scale, log_scale_u) = shift.chunk(2), log_scale.chunk(2)
        return guide((shift, log_scale), (shift_u, log_scale_u), weights, self.guidance)

    def select(self, samples: Tensor) -> CachedConditioner:
        """The same for the samples of the batch with these indices (b,); the cache is copied."""
        rows = torch.cat([samples, samples + len(self.embedding) // 2]) if self.guidance else samples
        temperature = None if self.temperature is None else self.temperature[rows]
        return replace(self, embedding=self.embedding[rows], temperature=temperature, cache=self.cache.select(rows))

    def over(self, memory: Tensor) -> CachedConditioner:
        """The same with an empty cache for the whole sequence at a fixed address, see `Cache.over`."""
        return replace(self, cache=self.cache.over(memory))

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.embedding) // (2 if self.guidance else 1)

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.position)

    @property
    def kind(self) -> Hashable:
        """What it computes, but for the values of `tensors`."""
        guidance = self.guidance and (self.guidance.rule, self.guidance.shift, self.guidance.scale)
        return guidance, self.temperature is None, *(id(layer.hidden.activation) for layer in self.layers)

    def tensors(self) -> list[Tensor]:
        """All that it reads, but for the cache, in an order of its own."""
        packed = [*itertools.chain(*self.layers), self.proj_in, self.proj_out]
        others = [self.position, self.embedding, self.weights, self.temperature]
        return [*(t for linear in packed for t in linear.tensors()), *(t for t in others if t is not None)]

    def _slice_window(self, start: int, count: int) -> Window:
        stop, causal, mask = start + count, start == 0 and count > 1, None
        if start > 0 and count > 1:
            allowed = torch.ones(count, stop, dtype=torch.bool, device=self.embedding.device).tril(start)
            mask = attention_bias(allowed, self.cache.tensor.dtype)
        return Window(slice(start, stop), stop, mask, causal)


def run_layers(
    layers: tuple[PackedLayer, ...], x: Tensor, cache: Tensor, window: Window, temperature: Tensor | None
) -> Tensor:
    """All layers on a window of tokens.

    Args:
        layers: L of them.
        x: (B', n, C), in the type of the sum over layers, which may be finer than that of the products.
        cache: (L, 2, B', H, room, E); the window's keys and values are written.
        window: where x lies.
        temperature: (B',), or None.

    Returns:
        (B', n, C).
    """
    shape, x = x.shape, x.flatten(0, 1)  # once: products flatten what is no matrix, each for itself
    for layer, part in zip(layers, cache, strict=True):
        qkv = layer.qkv(x).view(*shape[:2], -1)
        x = layer.proj.plus(_attend(qkv, part, window, temperature).flatten(0, 1), x)
        x = layer.down.plus(layer.hidden(x), x)
    return x.view(shape)


def _attend(qkv: Tensor, cache: Tensor, window: Window, temperature: Tensor | None) -> Tensor:
    """qkv (B', n, 3C) and the cache (2, B', H, room, E) of a layer -> (B', n, C)."""
    batch_size, count, _ = qkv.shape
    on_device = isinstance(window.positions, Tensor) and window.positions.ndim == 1
    if on_device and window.mask is None:
        return decode_attention(qkv, cache, cast(Tensor, window.positions), temperature)
    qkv = qkv.view(batch_size, count, 3, cache.shape[2], cache.shape[4])
    q = qkv.select(2, 0).transpose(1, 2)
    if isinstance(window.positions, slice):
        start = window.positions.start
        cache.narrow(3, start, count).copy_(qkv.narrow(2, 1, 2).permute(2, 0, 3, 1, 4))
    elif on_device:
        cache.index_copy_(3, window.positions, qkv.narrow(2, 1, 2).permute(2, 0, 3, 1, 4))
    else:
        cache[:, window.rows, :, window.positions] = qkv[:, :, 1:]
    if temperature is not None:
        q = q / temperature.to(q.dtype)[:, None, None, None]
    k, v = cache.narrow(3, 0, window.length).unbind()
    out = attention(q, k, v, window.mask, window.causal)
    return out.transpose(1, 2).reshape(batch_size, count, q.shape[1] * q.shape[3])
