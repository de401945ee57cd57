"""Faster linear layers and attention on CPUs, by private interfaces of PyTorch, which may change.

Replacements of `torch.nn.functional.linear` and `scaled_dot_product_attention`, equal to them up to rounding:

- float32 products go through oneDNN. PyTorch uses MKL, which does not use AVX-512 on AMD's processors. Without AVX-512
  only packed layers do so, which gain where there are few rows, as in sampling; MKL is faster for whole batches.
- causal attention over a whole sequence in bfloat16 is computed by blocks of queries. PyTorch's tiles are too small
  for bfloat16 to be faster than float32.
- attention of single queries of many heads, as in sampling, is two products.

Other devices, other dtypes, torch.compile, torch.func and forward-mode derivatives use PyTorch's functions. So does a
PyTorch without these interfaces, which are tried when this module is imported. ITARFLOW_PLAIN_KERNELS=1 in the
environment turns them off.

The gain depends on the CPU: `python benchmarks/plain_kernels.py` measures it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_FEWEST = 2**20
"""Products of fewer multiplications are faster by PyTorch's function."""
_BLOCK = 128
"""Queries at a time: fewer make small products, more compute more masked logits."""
_VECTOR = 32
"""Numbers in a register of AVX-512: softmax is several times slower on rows of other lengths than multiples."""
_MANY = 64
"""Heads times samples from which two products are faster for single queries."""
_LARGE = 2**21
"""Size of all keys from which they are read faster as the left factor."""
_SEPARATE = 16
"""Rows from which GELU is faster after the product than in its kernel, without AVX-512."""
_ROWS = 1024
"""Rows for which oneDNN lays weights out. Told nothing it takes a layout that is slower for 1 to 64 of them."""

PLAIN = os.environ.get("ITARFLOW_PLAIN_KERNELS", "") not in ("", "0")
"""Whether the environment turns the replacements off."""


def is_watched() -> bool:
    """Whether a transform is active that does not support the autograd functions below."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def _has_onednn() -> bool:
    """Whether all private functions of the linear layers exist and accept these arguments."""
    one = torch.ones(1, 1, device="cpu", dtype=torch.float32)
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(one, _ROWS)
        operator.default(one, packed, one[0], "gelu", [], "none")
        operator.binary(one, one, packed, one[0], "add")
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
        is_watched()
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def _has_blocks() -> bool:
    """Whether this CPU has bfloat16 products, and PyTorch the private gradient of softmax."""
    one = torch.ones(1, 1, device="cpu", dtype=torch.bfloat16)
    try:
        torch._softmax_backward_data(one, one, -1, one.dtype)
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError, TypeError):
        return False


WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Whether this CPU has AVX-512."""
ONEDNN = not PLAIN and _has_onednn()
"""Whether float32 products may go through oneDNN: those of packed layers, and if WIDE those of `linear`."""
BLOCKS = ONEDNN and _has_blocks()
"""Whether causal attention in bfloat16 may take blocks of queries."""
if ONEDNN:  # looked up once: that takes as long as a small product
    _product, _sum = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary

# -- linear layers ----------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> x @ weight.T + bias (..., out); differentiable any number of times.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,), or None.
    """
    if _prefers_onednn(x, weight):
        return _OneDnn.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear`, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def _prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        ONEDNN
        and WIDE
        and x.ndim > 1
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= _FEWEST
        and type(weight) in (Tensor, nn.Parameter)  # no subclass, such as a distributed tensor
        and not torch.is_autocast_enabled("cpu")
        and not is_watched()
    )


class _OneDnn(torch.autograd.Function):
    """All three products of a linear layer are linear layers, so each derivative is one of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Only what a gradient needs: with frozen weights the input is not kept.
        _, wants_weight, wants_bias = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight)
        ctx.wants_bias = wants_bias
        return _product(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        rows = grad.flatten(end_dim=-2)
        grad_weight = None if x is None else linear(rows.t(), x.flatten(end_dim=-2).t())
        return grad_x, grad_weight, rows.sum(dim=0) if ctx.wants_bias else None


def packs(weight: Tensor) -> bool:
    """Whether oneDNN takes this weight in a layout of its own."""
    knows = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ONEDNN and weight.device.type == "cpu" and (weight.dtype == torch.float32 or knows)


def packed_weight(weight: Tensor) -> Tensor:
    """The weight (out, in) in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)


def packed_product(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x (..., in) by a `packed_weight`, with GELU, in the same kernel where that is faster."""
    if gelu and (WIDE or x.numel() < _SEPARATE * x.shape[-1]):
        return _product(x, weight, bias, "gelu", [], "none")
    product = _product(x, weight, bias, "none", [], "")
    return F.gelu(product) if gelu else product


def packed_sum(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product of x (..., in) by a `packed_weight`, added to the residual (..., out), in the same kernel."""
    return _sum(x, residual, weight, bias, "add")


# -- attention --------------------------------------------------------------------------------------------------


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
        not PLAIN
        and q.device.type == "cpu"
        and q.shape[2] == 1
        and q.shape[0] * q.shape[1] >= _MANY
        and not torch.compiler.is_compiling()
    )


def _prefers_blocks(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        BLOCKS
        and q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and q.shape == k.shape
        and not is_watched()
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
