"""Linear layers that are used many times without gradients, with what stands before and after them.

A layer of the inverse is five of these and attention; each may be one kernel where the device has it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itarflow.runtime.kernels import cpu
from itarflow.runtime.kernels.thin import has_thin_product, thin_product


class Norm(NamedTuple):
    """A layer norm over the last dimension."""

    weight: Tensor
    """(in,)"""
    bias: Tensor
    """(in,)"""
    epsilon: float


class PackedLinear(NamedTuple):
    """A linear layer: its weights are cast, and laid out for oneDNN, once.

    Made by `pack`. It keeps the values that the weights had then.
    """

    weight: Tensor
    """(out, in), in oneDNN's own layout if `onednn`."""
    bias: Tensor
    """(out,)"""
    norm: Norm | None
    """Of what is given, before the product."""
    activation: nn.Module | None
    """What follows the product."""
    onednn: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in), of the weight's type, or of the norm's if there is one, -> (..., out) of the weight's type."""
        if self._is_thin(x, None):
            return thin_product(x, self.weight, self.bias, self.norm, self.gelu)
        x = self._normed(x)
        if self.onednn and self.gelu:
            return cpu.packed_product(x, self.weight, self.bias, gelu=True)
        product = cpu.packed_product(x, self.weight, self.bias) if self.onednn else F.linear(x, self.weight, self.bias)
        return product if self.activation is None else self.activation(product)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product, added to the residual (..., out), whose type the result has."""
        if self._is_thin(x, residual):
            return thin_product(x, self.weight, self.bias, self.norm, self.gelu, residual)
        if self.onednn and residual.dtype == self.weight.dtype and self.activation is None:
            return cpu.packed_sum(self._normed(x), residual, self.weight, self.bias)
        product = self(x)
        if product.device.type == "cuda" and torch.promote_types(product.dtype, residual.dtype) == residual.dtype:
            return residual + product  # which is one kernel there
        return residual + product.to(residual.dtype)

    def tensors(self) -> list[Tensor]:
        """All that it reads."""
        return [self.weight, self.bias, *(() if self.norm is None else self.norm[:2])]

    @property
    def gelu(self) -> bool:
        """Whether GELU follows, as `torch.nn.functional.gelu` computes it by default."""
        return isinstance(self.activation, nn.GELU) and self.activation.approximate == "none"

    def _is_thin(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether a GPU's kernel for few rows takes all of it."""
        if self.onednn or not (self.activation is None or self.gelu):
            return False
        return has_thin_product(x, self.weight, self.norm is not None, self.gelu, residual)

    def _normed(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return x
        weight, bias, epsilon = self.norm
        return F.layer_norm(x, weight.shape, weight, bias, epsilon).to(self.weight.dtype)


def pack(
    layer: nn.Linear, dtype: torch.dtype, norm: nn.LayerNorm | None = None, activation: nn.Module | None = None
) -> PackedLinear:
    """The layer with its present weights in that type.

    Args:
        layer: with a bias.
        dtype: of the product.
        norm: a layer norm before it, which keeps its own type.
        activation: what follows.
    """
    weight, bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
    before = None if norm is None else Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)
    onednn = cpu.packs(weight)
    return PackedLinear(cpu.packed_weight(weight) if onednn else weight, bias, before, activation, onednn)
