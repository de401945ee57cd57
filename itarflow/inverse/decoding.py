"""The conditioner of a block for its inverse: fast, without gradients, one window of tokens after another.

It gives mu_i(x_{<i}) and exp(alpha_i(x_{<i})), guided or not, of equations 4 and 9 of TARFlow, one window of i at a
time; keys and values of x_{<i} are cached (TARFlow, appendix D).

Weights are cast and laid out once, the condition is embedded once, keys and values of earlier tokens are kept in a
cache, and both passes of guidance are one batch.

Shapes: B batch, B' = 2B if the block is guided, else B; N tokens, n of them in a window, D values a token, C channels,
H heads, E head width (C = H * E), L layers; P rows of a prefix, which the transformer reads before the first token: T
condition vectors and a start token. The cache has a row for each position of prefix and tokens.
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
    Rotation,
    attention,
    attention_bias,
    decode_attention,
    has_decode_attention,
    rms_norm,
    rotator,
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
    """Where the tokens of a window lie, in rows of the cache."""

    positions: slice | Tensor
    """The same for all samples, or (B', n); or (1,) that of a single token, the same for all and on the device."""
    length: int
    """Rows of the cache that are read: 0 .. length - 1."""
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
    norm: Tensor | None
    """(C,), factor of an RMS norm before `proj_out`; None = none."""
    prefix: Tensor | None
    """(B', P, C), embedded; None = none, or it has been read."""
    offset: int
    """P."""
    num_tokens: int
    """N."""
    position: Tensor | None
    """(rows, C), added to what is embedded, in the block's own order; None = nothing is."""
    rotation: Rotation | None
    """Of queries and keys, by rows."""
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
    """(rows, 1), of guidance, for the token after each."""

    def __call__(self, tokens: Tensor, start: int | Tensor, stop: int | None = None) -> Affine:
        """(shift, scale), each (B, n, D), of the tokens at start + 1 .. start + n; see `solvers.Conditioner`."""
        count = tokens.shape[1]
        if isinstance(start, int):
            return self.at(tokens, self._slice_window(start + self.offset, count))
        return self.at(tokens, self.scattered(start, count, stop or int(start.max()) + count))

    def begin(self) -> Affine | None:
        """Read the prefix, before any token: (shift, scale), each (B, 1, D), of what follows it; None = there is none.

        If the prefix ends in a start token, that is the affine map of token 0.
        """
        if self.prefix is None:
            return None
        prefix = slice(0, self.offset)
        window, weights = self._slice_window(0, self.offset), self.weights[self.offset - 1]
        return self._affine(self.prefix, window, weights, self._rotations(prefix), last=1)

    def scattered(self, start: Tensor, count: int, length: int) -> Window:
        """The windows of `count` tokens that begin at start (B,); none goes beyond token `length`."""
        start, length = self.offset + (start.repeat(2) if self.guidance else start), self._rows(length)
        positions = start[:, None] + torch.arange(count, device=start.device)
        known = torch.arange(length, device=start.device)
        allowed = (known <= positions[..., None])[:, None]
        rows = torch.arange(len(start), device=start.device)[:, None]
        return Window(positions, length, attention_bias(allowed, self.cache.tensor.dtype), causal=False, rows=rows)

    @property
    def reads_exactly(self) -> bool:
        """Whether attention of a single token reads the cache up to its own position, which it looks up itself."""
        return has_decode_attention(self.cache.tensor[0], rotary=self.rotation is not None)

    def solve(self, x: Tensor, z: Tensor, start: Tensor, count: int, length: int) -> None:
        """Solve `count` tokens, one after another on the device, which need not wait for the host.

            x_{i+1} = z_{i+1} exp(alpha_{i+1}(x_{<=i})) + mu_{i+1}(x_{<=i})         (TARFlow, eq. 4)

        Args:
            x: (B, N, D), known up to `start`; those that follow are written.
            z: (B, N, D).
            start: (1,) int64, the same for all samples.
            count: i = start .. start + count - 1.
            length: tokens whose keys are read, at least start + count, unless `reads_exactly`.
        """
        following, length = start + torch.arange(1, count + 1, device=x.device), self._rows(length)
        token, noise, solved = x.index_select(1, start), z.index_select(1, following), []
        rows = following + (self.offset - 1)
        weights, masks, rotations = self.weights[rows], [None] * count, self._rotations(rows)
        added = [self.embedding] * count
        if self.position is not None:
            added = list(self.position[rows][:, None, None] + self.embedding)
        if not self.reads_exactly:
            allowed = torch.arange(length, device=x.device) <= rows[:, None]
            masks = attention_bias(allowed, self.cache.tensor.dtype).split(1)
        for index, (row, mask) in enumerate(zip(rows.split(1), masks, strict=True)):
            window = Window(row, length, mask, causal=False)
            rotation = None if rotations is None else rotations.at(slice(index, index + 1))
            embedded = self._embedded(token, added[index])
            shift, scale = self._affine(embedded, window, weights[index], rotation)
            token = torch.addcmul(shift, noise[:, index : index + 1], scale)
            solved.append(token)
        x.index_copy_(1, following, torch.cat(solved, dim=1))

    def at(self, tokens: Tensor, window: Window) -> Affine:
        """As a call: (shift, scale), each (B, n, D), of the tokens that follow those (B, n, D) of the window."""
        rows = window.positions
        weights = self.weights[rows if isinstance(rows, slice) else rows[: len(tokens)]]
        added = self.embedding if self.position is None else self.position[rows] + self.embedding
        return self._affine(self._embedded(tokens, added), window, weights, self._rotations(rows))

    def _embedded(self, tokens: Tensor, added: Tensor) -> Tensor:
        """Tokens (B, n, D) -> (B', n, C), with what is added, (B', n or 1, C)."""
        tokens = tokens.to(added.dtype)
        tokens = tokens if self.guidance is None else torch.cat((tokens, tokens))
        return self.proj_in.plus(tokens, added.expand(-1, tokens.shape[1], -1))

    def _affine(
        self, x: Tensor, window: Window, weights: Tensor, rotation: Rotation | None, last: int | None = None
    ) -> Affine:
        """(shift, scale), each (B, n, D), of the tokens that follow those of the window, or `last` ones of them.

        Args:
            x: (B', n, C), embedded.
            window: where they lie.
            weights: of guidance.
            rotation: of their queries and keys.
            last: how many of the results are wanted; None = all.
        """
        x = run_layers(self.layers, x, self.cache.reaching(window.length), window, self.temperature, rotation)
        x = x if last is None else x[:, -last:]
        shift, log_scale = self.split(self.proj_out(x if self.norm is None else rms_norm(x, self.norm)))
        if self.guidance is None:
            return shift, log_scale.exp()
        (shift, shift_u), (log_scale, log_scale_u) = shift.chunk(2), log_scale.chunk(2)
        return guide((shift, log_scale), (shift_u, log_scale_u), weights, self.guidance)

    def select(self, samples: Tensor) -> CachedConditioner:
        """The same for the samples of the batch with these indices (b,); the cache is copied."""
        rows = torch.cat([samples, samples + len(self.embedding) // 2]) if self.guidance else samples
        temperature = None if self.temperature is None else self.temperature[rows]
        cache = self.cache.select(rows)
        return replace(self, embedding=self.embedding[rows], temperature=temperature, cache=cache, prefix=None)

    def over(self, memory: Tensor) -> CachedConditioner:
        """The same with an empty cache for the whole sequence at a fixed address, see `Cache.over`."""
        return replace(self, cache=self.cache.over(memory))

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.embedding) // (2 if self.guidance else 1)

    @property
    def kind(self) -> Hashable:
        """What it computes, but for the values of `tensors`."""
        guidance = self.guidance and (self.guidance.rule, self.guidance.shift, self.guidance.scale)
        return guidance, self.temperature is None, *(id(layer.hidden.activation) for layer in self.layers)

    def tensors(self) -> list[Tensor]:
        """All that it reads and that may change, but for the cache, in an order of its own."""
        packed = [*itertools.chain(*self.layers), self.proj_in, self.proj_out]
        others = [self.position, self.embedding, self.weights, self.temperature, self.prefix, self.norm]
        return [*(t for linear in packed for t in linear.tensors()), *(t for t in others if t is not None)]

    def _rows(self, length: int) -> int:
        """Rows of the cache with the keys of so many tokens; the last token is never read."""
        return min(self.offset + length, self.cache.num_tokens)

    def _rotations(self, rows: slice | Tensor) -> Rotation | None:
        return None if self.rotation is None else self.rotation.at(rows)

    def _slice_window(self, start: int, count: int) -> Window:
        stop, causal, mask = start + count, start == 0 and count > 1, None
        if start > 0 and count > 1:
            allowed = torch.ones(count, stop, dtype=torch.bool, device=self.embedding.device).tril(start)
            mask = attention_bias(allowed, self.cache.tensor.dtype)
        return Window(slice(start, stop), stop, mask, causal)


def run_layers(
    layers: tuple[PackedLayer, ...],
    x: Tensor,
    cache: Tensor,
    window: Window,
    temperature: Tensor | None,
    rotation: Rotation | None = None,
) -> Tensor:
    """All layers on a window of tokens.

    Args:
        layers: L of them.
        x: (B', n, C), in the type of the sum over layers, which may be finer than that of the products.
        cache: (L, 2, B', H, room, E); the window's keys and values are written.
        window: where x lies.
        temperature: (B',), or None.
        rotation: of queries and keys, (n, E) or (B', n, E); None = none.

    Returns:
        (B', n, C).
    """
    shape, x = x.shape, x.flatten(0, 1)  # once: products flatten what is no matrix, each for itself
    rotate = None if rotation is None else rotator(rotation)
    for layer, part in zip(layers, cache, strict=True):
        x = layer.proj.plus(_attend(layer.qkv(x), part, window, temperature, rotation, rotate), x)
        x = layer.down.plus(layer.hidden(x), x)
    return x.view(shape)


def _attend(
    qkv: Tensor,
    cache: Tensor,
    window: Window,
    temperature: Tensor | None,
    rotation: Rotation | None,
    rotate: Callable[[Tensor], None] | None,
) -> Tensor:
    """qkv (B' n, 3C) and the cache (2, B', H, room, E) of a layer -> (B' n, C)."""
    (_, batch_size, heads, _, width), count = cache.shape, len(qkv) // cache.shape[1]
    on_device = isinstance(window.positions, Tensor) and window.positions.ndim == 1
    if on_device and window.mask is None:
        position = cast(Tensor, window.positions)
        return decode_attention(qkv.view(batch_size, 1, -1), cache, position, temperature, rotation).view(len(qkv), -1)
    qkv = qkv.view(batch_size, count, 3, heads, width)
    if rotate is not None:
        rotate(qkv.narrow(2, 0, 2))
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
    return out.transpose(1, 2).reshape(batch_size * count, heads * width)
