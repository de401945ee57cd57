"""Linear layers whose float32 products go through oneDNN on CPUs.

PyTorch gives float32 products on x86 to MKL, which on AMD's processors runs at less than half of oneDNN's speed. Both
libraries are part of PyTorch; the results differ by rounding. On other devices, in other precisions and under
torch.compile or torch.func these layers are `torch.nn.Linear`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

_FEWEST = 2**20
"""Products of fewer multiplications are faster without the detour."""
# Parts of PyTorch that promise nothing: without any of them all is as in `torch.nn.Linear`.
_OPERATORS = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
    and hasattr(torch._C, "_are_functorch_transforms_active")
    and hasattr(forward_ad, "_current_level")
)
if _HAS_ONEDNN:  # looked up once: that takes as long as a small product
    _product, _sum = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary


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
        _HAS_ONEDNN
        and x.ndim > 1
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= _FEWEST
        and type(weight) in (Tensor, nn.Parameter)  # no subclass, such as a distributed tensor
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
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


class PackedLinear(NamedTuple):
    """A linear layer that is used many times without gradients: its weights are cast, and laid out for oneDNN, once.

    Made by `pack`. It keeps the values that the weights had then.
    """

    weight: Tensor
    """(out, in), in oneDNN's own layout if `onednn`."""
    bias: Tensor
    onednn: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in), of the weight's type, -> (..., out)."""
        if self.onednn:
            return _product(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product, in the same kernel where there is one."""
        if self.onednn:
            return _product(x, self.weight, self.bias, "gelu", [], "none")
        return F.gelu(F.linear(x, self.weight, self.bias))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product, added to the residual (..., out), whose type the result has."""
        if self.onednn and residual.dtype == x.dtype:
            return _sum(x, residual, self.weight, self.bias, "add")
        return residual + self(x).to(residual.dtype)


def pack(layer: nn.Linear, dtype: torch.dtype) -> PackedLinear:
    """The layer with its present weights in that type."""
    weight, bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
    onednn = _HAS_ONEDNN and weight.device.type == "cpu" and (dtype == torch.float32 or _knows(dtype))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if onednn else weight
    return PackedLinear(packed, bias, onednn)


def _knows(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
