"""Attention on any device.

On a GPU the kernel is named here, not chosen by `torch.nn.functional.scaled_dot_product_attention`: that takes cuDNN's
on some devices, which prepares itself for each new shape, for up to half a second, and turns a mask of bools into
numbers in each layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itarflow.runtime.kernels import cpu

_OLDEST, _NEWEST = (8, 0), (12, 1)
"""Compute capabilities for which PyTorch's fused kernels are built."""
_WIDEST = 128
"""Head width up to which they have gradients on all of these devices."""
_ALIGNED = 16
"""Numbers to which the rows of a bias are aligned."""
_KNOWN: dict[torch.device, bool] = {}


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """The values, weighted by softmax(q @ k.T / sqrt(E)): (B, H, n, E).

    Args:
        q: (B, H, n, E), queries.
        k: (B, H, N, E), keys.
        v: (B, H, N, E), values.
        mask: what `attention_bias` returned, (n, N) or (B, 1, n, N); None = a query may look at all.
        causal: query i looks at keys 0 .. i; not together with a mask.
    """
    if q.device.type != "cuda":
        return cpu.attention(q, k, v, mask, causal)
    if mask is not None and mask.dtype == torch.bool:
        mask = attention_bias(mask, q.dtype)
    if _takes_flash(q, k, mask, causal):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]
    if _takes_efficient(q, k):
        # The kernel doesn't broadcast: a view with strides of 0.
        bias = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
        with_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, with_gradient, 0.0, causal)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attention_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as `attention` wants it, to be made once for all layers.

    Args:
        allowed: (n, N) or (B, 1, n, N) bool, False where a query must not look; each may look somewhere.
        dtype: of the queries.

    Returns:
        On a GPU what is added to the logits, 0 or -inf, of that dtype; elsewhere `allowed` itself. The shape is the
        same.
    """
    if allowed.device.type != "cuda":
        return allowed
    *outer, length = allowed.shape
    aligned = -(-length // _ALIGNED) * _ALIGNED
    bias = torch.full((*outer, aligned), -torch.inf, dtype=dtype, device=allowed.device)
    return bias.narrow(-1, 0, length).masked_fill_(allowed, 0)


def _takes_flash(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether the kernel for 16 bits takes it. Its causal attention ends, not begins, at the same token."""
    return (
        mask is None
        and q.dtype in (torch.bfloat16, torch.float16)
        and (not causal or q.shape[2] == k.shape[2])
        and torch._C._get_flash_sdp_enabled()  # as by default, not within sdpa_kernel(SDPBackend.MATH)
        and _is_fused(q, k)
    )


def _takes_efficient(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel for a bias, and for 32 bits, takes it."""
    return (
        q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and torch._C._get_mem_efficient_sdp_enabled()
        and _is_fused(q, k)
    )


def _is_fused(q: Tensor, k: Tensor) -> bool:
    width = q.shape[3]
    return width % 8 == 0 and width <= _WIDEST and q.numel() > 0 and k.numel() > 0 and _has_fused_kernels(q.device)


def _has_fused_kernels(device: torch.device) -> bool:
    if torch.compiler.is_compiling():  # which takes what is found as a constant
        return _look_at(device)
    if device not in _KNOWN:
        _KNOWN[device] = _look_at(device)
    return _KNOWN[device]


def _look_at(device: torch.device) -> bool:
    if not torch.cuda.is_available():  # then these are no tensors, but their shapes
        return True
    properties = torch.cuda.get_device_properties(device)
    return torch.version.hip is None and _OLDEST <= (properties.major, properties.minor) <= _NEWEST
