"""Attention, faster than PyTorch's on CPUs in two cases; else it is `scaled_dot_product_attention`.

PyTorch's own attention on CPUs multiplies tiles, too small for bfloat16 to be faster there than float32. Where it is
causal over a whole sequence, blocks of queries take its place; and single queries of many heads, as in sampling, are
two products. The results differ by rounding. Other devices and torch.compile see nothing of this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_BLOCK = 128
"""Queries at a time: fewer make small products, more compute much that the mask hides."""
_VECTOR = 32
"""Numbers in a register of AVX-512: softmax is several times slower on rows that leave a rest."""
_MANY = 64
"""Heads times samples from which two products are faster for single queries."""
_LARGE = 2**21
"""Numbers in all keys from which they are read faster as the left factor."""
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    and hasattr(torch._C, "_are_functorch_transforms_active")
    and hasattr(forward_ad, "_current_level")
    and hasattr(torch, "_softmax_backward_data")
)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """The values, weighted by softmax(q @ k.T / sqrt(E)): (B, H, n, E).

    Args:
        q: (B, H, n, E), queries.
        k: (B, H, N, E), keys.
        v: (B, H, N, E), values.
        mask: (n, N) or (B, 1, n, N) bool, False where a query must not look; None = it may look at all.
        causal: query i looks at keys 0 .. i; not together with a mask.
    """
    if causal and mask is None and _prefers_blocks(q, k, v):
        return _CausalBlocks.apply(q, k, v)
    if mask is None and not causal and _prefers_products(q):
        rows, keys, values = ((q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        if keys.numel() >= _LARGE:
            logits = torch.bmm(keys, rows.transpose(1, 2)).transpose(1, 2)
        else:
            logits = torch.bmm(rows, keys.transpose(1, 2))
        return torch.bmm(logits.softmax(dim=-1), values).unflatten(0, q.shape[:2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _prefers_products(q: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and q.shape[2] == 1
        and q.shape[0] * q.shape[1] >= _MANY
        and not torch.compiler.is_compiling()
    )


def _prefers_blocks(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and q.shape == k.shape
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class _CausalBlocks(torch.autograd.Function):
    """Keeps queries, keys and values, and computes the weights a second time for the gradient, block by block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        batch, heads, tokens, width = q.shape
        out = q.new_empty(batch, tokens, heads, width).transpose(1, 2)  # as the next layer reads it
        q, k, v = _padded(q).mul_(width**-0.5), _padded(k), _padded(v)
        for start in range(0, tokens, _BLOCK):
            weights, stop = _weights(q, k, start)
            values = torch.bmm(weights, v[:, :stop])[:, : tokens - start]
            out[:, :, start:stop] = values.unflatten(0, (batch, heads))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        batch, heads, tokens, width = grads[0].shape
        q, k, v, grad = (_padded(tensor) for tensor in (*ctx.saved_tensors, *grads))
        q.mul_(width**-0.5)
        grad_q = torch.empty_like(q)
        # Sums over blocks, for which bfloat16 would be too coarse.
        grad_k, grad_v = (torch.zeros_like(k, dtype=torch.float32) for _ in range(2))
        for start in range(0, tokens, _BLOCK):
            weights, stop = _weights(q, k, start)
            part = grad[:, start:stop]
            grad_v[:, :stop] += torch.bmm(weights.transpose(1, 2), part)
            grad_weights = torch.bmm(part, v[:, :stop].transpose(1, 2))
            grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_q[:, start:stop] = torch.bmm(grad_logits, k[:, :stop])
            grad_k[:, :stop] += torch.bmm(grad_logits.transpose(1, 2), q[:, start:stop])
        parts = (grad_q.mul_(width**-0.5), grad_k, grad_v)
        return tuple(part[:, :tokens].to(k.dtype).unflatten(0, (batch, heads)) for part in parts)


def _padded(tensor: Tensor) -> Tensor:
    """(B, H, N, E) -> a copy (B * H, N', E), with zeros up to the next length whose rows fill whole vectors.

    What is added comes after all queries, which do not look there.
    """
    return F.pad(tensor.flatten(end_dim=1), (0, 0, 0, -tensor.shape[2] % _VECTOR))


def _weights(q: Tensor, k: Tensor, start: int) -> tuple[Tensor, int]:
    """The weights (B * H, n, stop) of the n queries start .. stop - 1, and stop."""
    stop = min(start + _BLOCK, q.shape[1])
    logits = torch.bmm(q[:, start:stop], k[:, :stop].transpose(1, 2))
    later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
    logits[:, :, start:].masked_fill_(later, -torch.inf)
    return logits.softmax(dim=-1), stop
