"""The conditioner of a block for its inverse: fast, without gradients, one window of tokens after another.

It gives mu_i(x_{<i}) and exp(alpha_i(x_{<i})), guided or not, of equations 4 and 9 of TARFlow, one window of i at a
time; keys and values of x_{<i} are cached (TARFlow, appendix D).

Weights are cast and laid out once, the condition is embedded once, keys and values of earlier tokens are kept in a
cache, and both passes of guidance are one batch. All of it is freed after one inversion of one block.

Shapes: B batch, B' = 2B if the block is guided, else B; N tokens, n of them in a window, D values a token, C channels,
H heads, E head width (C = H * E), L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from itarflow.inverse.guidance import Affine, Guidance, guide
from itarflow.runtime.kernels import PackedLinear, attention


class PackedLayer(NamedTuple):
    """A transformer layer for use without gradients."""

    qkv: PackedLinear
    """With the norm before it."""
    proj: PackedLinear
    hidden: PackedLinear
    """The first layer of the MLP, with the norm before it and GELU after it."""
    down: PackedLinear


class Cache:
    """The keys and values of all layers. It grows with the positions in use, to at most twice as many.

    It grows by copying, so that attention reads contiguous memory. Unwritten positions are zero, not uninitialised:
    masked values must be finite, too.

    Args:
        shape: (L, 2, B', H, N, E).
        like: gives its dtype and device.
        room: positions allocated at first.
    """

    def __init__(self, shape: Sequence[int], like: Tensor, room: int = 64) -> None:
        *outer, self.num_tokens, width = shape
        self.tensor = like.new_zeros(*outer, min(room, self.num_tokens), width)
        """(L, 2, B', H, room, E)."""

    def reaching(self, stop: int) -> Tensor:
        """The tensor, grown if needed to hold positions 0 .. stop - 1."""
        *outer, room, width = self.tensor.shape
        if stop > room:
            grown = self.tensor.new_zeros(*outer, min(max(stop, 2 * room), self.num_tokens), width)
            grown[..., :room, :] = self.tensor
            self.tensor = grown
        return self.tensor

    def select(self, rows: Tensor) -> Cache:
        """A copy of some of the B' rows."""
        chosen = self.tensor.index_select(2, rows)
        *outer, _, width = chosen.shape
        cache = Cache((*outer, self.num_tokens, width), chosen[..., :0, :], room=0)
        cache.tensor = chosen
        return cache


class Window(NamedTuple):
    """Where the tokens of a window lie."""

    positions: slice | Tensor
    """The same for all samples, or (B', n)."""
    length: int
    """Positions of the cache that are read: 0 .. length - 1."""
    mask: Tensor | None
    """True where a token attends to a position, (n, length) or (B', 1, n, length); None = to all, or causal."""
    causal: bool
    """Whether attention is causal from position 0, which kernels know without a mask."""


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

    def __call__(self, tokens: Tensor, start: int | Tensor) -> Affine:
        """(shift, scale), each (B, n, D), of the tokens at start + 1 .. start + n.

        Args:
            tokens: (B, n, D), at positions start .. start + n - 1 of the block's own order.
            start: one position for all samples, or (B,) int64.
        """
        count = tokens.shape[1]
        if isinstance(start, int):
            return self.at(tokens, _slice_window(start, count, tokens.device))
        return self.at(tokens, self.scattered(start, count, int(start.max()) + count))

    def scattered(self, start: Tensor, count: int, length: int) -> Window:
        """The windows of `count` tokens that begin at start (B,); none goes beyond `length`."""
        start = start.repeat(2) if self.guidance else start
        positions = start[:, None] + torch.arange(count, device=start.device)
        known = torch.arange(length, device=start.device)
        return Window(positions, length, (known <= positions[..., None])[:, None], causal=False)

    def at(self, tokens: Tensor, window: Window) -> Affine:
        """As a call: (shift, scale), each (B, n, D), of the tokens that follow those (B, n, D) of the window."""
        tokens = tokens.to(self.position.dtype)
        tokens = tokens if self.guidance is None else torch.cat((tokens, tokens))
        x = self.proj_in.plus(tokens, self.position[window.positions] + self.embedding)
        x = run_layers(self.layers, x, self.cache.reaching(window.length), window, self.temperature)
        shift, log_scale = self.split(self.proj_out(x))
        if self.guidance is None:
            return shift, log_scale.exp()
        (shift, shift_u), (log_scale, log_scale_u) = shift.chunk(2), log_scale.chunk(2)
        positions = window.positions
        weights = self.weights[positions if isinstance(positions, slice) else positions[: len(shift)]]
        return guide((shift, log_scale), (shift_u, log_scale_u), weights, self.guidance)

    def select(self, samples: Tensor) -> CachedConditioner:
        """The same for the samples of the batch with these indices (b,); the cache is copied."""
        rows = torch.cat([samples, samples + len(self.embedding) // 2]) if self.guidance else samples
        temperature = None if self.temperature is None else self.temperature[rows]
        return replace(self, embedding=self.embedding[rows], temperature=temperature, cache=self.cache.select(rows))


def _slice_window(start: int, count: int, device: torch.device) -> Window:
    stop, causal, mask = start + count, start == 0 and count > 1, None
    if start > 0 and count > 1:
        mask = torch.ones(count, stop, dtype=torch.bool, device=device).tril(start)
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
    for layer, part in zip(layers, cache, strict=True):
        x = layer.proj.plus(_attend(layer.qkv(x), part, window, temperature), x)
        x = layer.down.plus(layer.hidden(x), x)
    return x


def _attend(qkv: Tensor, cache: Tensor, window: Window, temperature: Tensor | None) -> Tensor:
    """qkv (B', n, 3C) and the cache (2, B', H, room, E) of a layer -> (B', n, C)."""
    batch_size, count, _ = qkv.shape
    qkv = qkv.view(batch_size, count, 3, cache.shape[2], cache.shape[4])
    q = qkv.select(2, 0).transpose(1, 2)
    if isinstance(window.positions, slice):
        start = window.positions.start
        cache.narrow(3, start, count).copy_(qkv.narrow(2, 1, 2).permute(2, 0, 3, 1, 4))
    else:
        rows = torch.arange(batch_size, device=qkv.device)[:, None]
        cache[:, rows, :, window.positions] = qkv[:, :, 1:]
    if temperature is not None:
        q = q / temperature.to(q.dtype)[:, None, None, None]
    k, v = cache.narrow(3, 0, window.length).unbind()
    out = attention(q, k, v, window.mask, window.causal)
    return out.transpose(1, 2).reshape(batch_size, count, q.shape[1] * q.shape[3])
