"""Triton kernels for single tokens, and their launches. Imported at their first use: Triton is not everywhere.

They read the most that a token needs once, weights or keys and values, in pieces of 16 bytes a thread.
"""

# mypy: disallow-untyped-defs=False, ignore-errors=True

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
_TILE = 4096
"""Numbers of keys that a program of `_decode` holds at a time."""
_MANY = 3072
"""Outputs of which a program of `_thin` takes 32, not 16: there are still about 100 programs."""


# Positions lie 8 bytes apart: specialised, every other one would want a kernel of its own, loaded while recording.
@triton.jit(do_not_specialize=["tempered", "position"])
def _decode(
    qkv,
    cache,
    position,
    temperature,
    pairs,
    out,
    stats,
    partial,
    heads,
    qkv_row,
    cache_kv,
    cache_row,
    cache_head,
    scale,
    tempered,
    width: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    rotary: tl.constexpr,
    stages: tl.constexpr,
):
    """One head of one row, and one part of its keys. Each of `block` places keeps a softmax of its own to the end."""
    pair, split = tl.program_id(0), tl.program_id(1)
    row, head = pair // heads, pair % heads
    last = tl.load(position).to(tl.int32)  # the cache holds keys 0 .. last - 1
    n, e = tl.arange(0, block), tl.arange(0, width)
    new = qkv + row.to(tl.int64) * qkv_row + head * width + e
    channels = heads * width
    q, k_new, v_new = tl.load(new).to(tl.float32), tl.load(new + channels), tl.load(new + 2 * channels)
    if rotary:
        cos, sin = tl.load(pairs + (e & ~1)), tl.load(pairs + (e | 1))
        sin = tl.where((e & 1) == 0, -sin, sin)  # of what is added to an entry from the other one of its pair
        other = qkv + row.to(tl.int64) * qkv_row + head * width + (e ^ 1)
        q = q * cos + tl.load(other).to(tl.float32) * sin
        turned = k_new.to(tl.float32) * cos + tl.load(other + channels).to(tl.float32) * sin
        k_new = turned.to(cache.dtype.element_ty)
    q = q * scale
    q = q / tl.load(temperature + row, mask=tempered != 0, other=1.0)  # one kernel, with and without
    keys = cache + row.to(tl.int64) * cache_row + head.to(tl.int64) * cache_head
    if split == 0:  # nobody reads them there before the next token
        place_new = keys + last * width + e
        tl.store(place_new, k_new)
        tl.store(place_new + cache_kv, v_new)
    per_split = tl.cdiv(tl.cdiv(last, block), splits) * block
    start = split * per_split
    stop = tl.minimum(start + per_split, last)
    offsets = n[:, None] * width + e[None, :]
    most = tl.full((block,), -1e30, tl.float32)  # finite, so that differences are numbers
    total = tl.zeros((block,), tl.float32)
    mixed = tl.zeros((block, width), tl.float32)
    for first in tl.range(start, stop, block, num_stages=stages):
        inside = first + n < stop
        place = keys + first * width + offsets
        k = tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
        v = tl.load(place + cache_kv, mask=inside[:, None], other=0.0).to(tl.float32)
        logits = tl.where(inside, tl.sum(k * q[None, :], axis=1), -float("inf"))
        higher = tl.maximum(most, logits)
        fade, weight = tl.exp2(most - higher), tl.exp2(logits - higher)
        mixed = mixed * fade[:, None] + v * weight[:, None]
        total = total * fade + weight
        most = higher
    top = tl.max(most, axis=0)
    share = tl.exp2(most - top)
    total_all = tl.sum(total * share, axis=0)
    mixed_all = tl.sum(mixed * share[:, None], axis=0)
    if split == 0:  # which adds the new token, too
        logit = tl.sum(k_new.to(tl.float32) * q, axis=0)
        higher_all = tl.maximum(top, logit)
        fade_all, weight_new = tl.exp2(top - higher_all), tl.exp2(logit - higher_all)
        mixed_all = mixed_all * fade_all + v_new.to(tl.float32) * weight_new
        total_all = total_all * fade_all + weight_new
        top = higher_all
    if splits == 1:
        tl.store(out + pair * width + e, (mixed_all / total_all).to(out.dtype.element_ty))
    else:
        place_stats = stats + (pair * splits + split) * 2
        tl.store(place_stats, top)
        tl.store(place_stats + 1, total_all)
        tl.store(partial + (pair * splits + split) * width + e, mixed_all)


@triton.jit
def _combine(stats, partial, out, width: tl.constexpr, splits: tl.constexpr):
    """The parts of one head of one row, in their order."""
    pair = tl.program_id(0)
    s, e = tl.arange(0, splits), tl.arange(0, width)
    place = stats + (pair * splits + s) * 2
    tops, totals = tl.load(place), tl.load(place + 1)
    share = tl.exp2(tops - tl.max(tops, axis=0))
    mixed = tl.load(partial + (pair * splits + s[:, None]) * width + e[None, :])
    value = tl.sum(mixed * share[:, None], axis=0) / tl.sum(totals * share, axis=0)
    tl.store(out + pair * width + e, value.to(out.dtype.element_ty))


def decode_attention(
    qkv: Tensor, cache: Tensor, position: Tensor, temperature: Tensor | None, pairs: Tensor | None, splits: int
) -> Tensor:
    """See `decode.decode_attention`; `pairs` of the rotation; so many programs share the keys, a power of two."""
    _, rows, heads, _, width = cache.shape
    out = qkv.new_empty(rows, 1, heads * width)
    parts = 0 if splits == 1 else rows * heads * splits
    stats = torch.empty(2 * parts, dtype=torch.float32, device=qkv.device)
    partial = torch.empty(parts * width, dtype=torch.float32, device=qkv.device)
    _decode[(rows * heads, splits)](
        qkv,
        cache,
        position,
        stats if temperature is None else temperature.float(),
        stats if pairs is None else pairs.float().contiguous(),
        out,
        stats,
        partial,
        heads,
        qkv.stride(0),
        *cache.stride()[:3],
        width**-0.5 * _LOG2_E,
        int(temperature is not None),
        width=width,
        block=max(32, min(256, _TILE // width)),
        splits=splits,
        rotary=pairs is not None,
        stages=3,
        num_warps=4,
    )
    if splits > 1:
        _combine[(rows * heads,)](stats, partial, out, width=width, splits=splits, num_warps=1)
    return out


@triton.jit(do_not_specialize=["rows"])
def _thin(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    residual,
    out,
    rows,
    inputs,
    outputs,
    epsilon,
    m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_s: tl.constexpr,
    normed: tl.constexpr,
    gelu: tl.constexpr,
    added: tl.constexpr,
    stages: tl.constexpr,
):
    """All rows, and some of the outputs. Two sums, over the halves of each step: products wait for their own sum."""
    r, n = tl.arange(0, m), tl.program_id(0) * block_n + tl.arange(0, block_n)
    is_row, is_output = r < rows, n < outputs
    element = weight.dtype.element_ty
    # What is added at the end is under way meanwhile.
    shift = tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)
    place_out, kept = r[:, None] * outputs + n[None, :], is_row[:, None] & is_output[None, :]
    if added:
        given = tl.load(residual + place_out, mask=kept, other=0.0).to(tl.float32)
    mean, deviation = tl.zeros((m,), tl.float32), tl.zeros((m,), tl.float32)
    if normed:
        # Parts are merged by Chan's formula: no difference of large sums.
        squares, seen = tl.zeros((m,), tl.float32), 0.0
        s = tl.arange(0, block_s)
        for first in tl.range(0, inputs, block_s, num_stages=2):
            inside = is_row[:, None] & (first + s < inputs)[None, :]
            part = tl.load(x + r[:, None] * inputs + first + s[None, :], mask=inside, other=0.0).to(tl.float32)
            count = tl.minimum(inputs - first, block_s).to(tl.float32)
            part_mean = tl.sum(part, axis=1) / count
            centred = tl.where(inside, part - part_mean[:, None], 0.0)
            change = part_mean - mean
            squares += tl.sum(centred * centred, axis=1) + change * change * (seen * count / (seen + count))
            seen += count
            mean += change * (count / seen)
        deviation = 1.0 / tl.sqrt(squares / inputs + epsilon)
    k = tl.arange(0, block_k)
    product = tl.zeros((m, block_n), tl.float32)
    other = tl.zeros((m, block_n), tl.float32)
    for first in tl.range(0, inputs, 2 * block_k, num_stages=stages):
        w = tl.load(
            weight + n[None, :] * inputs + first + k[:, None],
            mask=is_output[None, :] & (first + k < inputs)[:, None],
            other=0.0,
        )
        w_other = tl.load(
            weight + n[None, :] * inputs + first + block_k + k[:, None],
            mask=is_output[None, :] & (first + block_k + k < inputs)[:, None],
            other=0.0,
        )
        place = x + r[:, None] * inputs + first + k[None, :]
        known = is_row[:, None] & (first + k < inputs)[None, :]
        known_other = is_row[:, None] & (first + block_k + k < inputs)[None, :]
        a = tl.load(place, mask=known, other=0.0)
        a_other = tl.load(place + block_k, mask=known_other, other=0.0)
        if normed:
            g = tl.load(norm_weight + first + k, mask=first + k < inputs, other=0.0).to(tl.float32)
            b = tl.load(norm_bias + first + k, mask=first + k < inputs, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) - mean[:, None]) * deviation[:, None] * g[None, :] + b[None, :]
            beyond = first + block_k + k
            g = tl.load(norm_weight + beyond, mask=beyond < inputs, other=0.0).to(tl.float32)
            b = tl.load(norm_bias + beyond, mask=beyond < inputs, other=0.0).to(tl.float32)
            a_other = (a_other.to(tl.float32) - mean[:, None]) * deviation[:, None] * g[None, :] + b[None, :]
        product = tl.dot(a.to(element), w, product, input_precision="ieee")
        other = tl.dot(a_other.to(element), w_other, other, input_precision="ieee")
    product += other + shift[None, :]
    if gelu:
        product = 0.5 * product * (1.0 + tl.math.erf(product * 0.7071067811865476))
    if added:
        product += given
    tl.store(out + place_out, product.to(out.dtype.element_ty), mask=kept)


def thin_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float,
    gelu: bool,
    residual: Tensor | None,
) -> Tensor:
    """See `thin.thin_product`; x (rows, in) and the residual (rows, out) are contiguous."""
    (rows, inputs), outputs = x.shape, len(weight)
    out = torch.empty(rows, outputs, dtype=weight.dtype if residual is None else residual.dtype, device=x.device)
    m = max(16, triton.next_power_of_2(rows))
    wide = weight.element_size() > 2
    block_n = 32 if outputs >= _MANY else 16
    plain = norm_weight is None
    block_k = 128 if m == 16 and plain and not wide else 64
    _thin[(triton.cdiv(outputs, block_n),)](
        x,
        weight,
        bias,
        weight if norm_weight is None else norm_weight,
        weight if norm_bias is None else norm_bias,
        x if residual is None else residual,
        out,
        rows,
        inputs,
        outputs,
        epsilon,
        m=m,
        block_n=block_n,
        block_k=block_k,
        block_s=max(128, 4096 // m),
        normed=norm_weight is not None,
        gelu=gelu,
        added=residual is not None,
        stages=2 if m == 64 else 3 if m == 32 or wide else 5 if plain else 4,
        num_warps=4 if plain else 8,  # so that two programs fit the registers of a multiprocessor
    )
    return out


@triton.jit
def _norm(x, weight, bias, out, channels, epsilon, width: tl.constexpr):
    """One row."""
    c = tl.arange(0, width)
    known = c < channels
    place = tl.program_id(0).to(tl.int64) * channels + c
    given = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
    centred = tl.where(known, given - tl.sum(given, axis=0) / channels, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / channels + epsilon)
    g = tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    tl.store(out + place, (centred * scale * g + b).to(out.dtype.element_ty), mask=known)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """See `norm.layer_norm`; x (rows, C) is contiguous."""
    rows, channels = x.shape
    out = torch.empty(rows, channels, dtype=dtype, device=x.device)
    _norm[(rows,)](x, weight, bias, out, channels, epsilon, width=triton.next_power_of_2(channels), num_warps=4)
    return out
