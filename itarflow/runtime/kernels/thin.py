"""Linear layers of few rows on a GPU, with what stands before and after them, as one kernel.

Such a product takes as long as its weights take to be read, and a token is dozens of them, so that each launch counts.

The same input gives the same bits: every output is summed by one program, in one order. Up to 16 rows, up to 32 and up
to 64 are three kernels, in each of which a row does not depend on the others, nor on their number; between them, and
between them and PyTorch's functions, results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from itarflow.runtime.kernels import proof

MOST_ROWS = 64
_LEAST = 2**18
"""Weights from which on reading them takes longer than a launch."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def thin_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gelu(norm(x) @ weight.T + bias), of (..., out); only where `has_thin_product`; without gradients.

    Args:
        x: (..., in), at most `MOST_ROWS` rows; of the weight's type, or of any if there is a norm.
        weight: (out, in), contiguous.
        bias: (out,).
        norm: a layer norm's weight (in,), bias (in,) and epsilon.
        gelu: whether exact GELU follows the product.
        residual: (..., out), whose type the result has; None = none, and the result has the weight's type.
    """
    norm_weight, norm_bias, epsilon = norm or (None, None, 0.0)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    added = None if residual is None else residual.reshape(-1, len(weight)).contiguous()
    out = torch.ops.itarflow.thin_product(rows, weight, bias, norm_weight, norm_bias, epsilon, gelu, added)
    return out.view(*x.shape[:-1], len(weight))


def plain_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """As `thin_product`, by PyTorch's functions, with gradients."""
    if norm is not None:
        x = F.layer_norm(x, norm[0].shape, *norm).to(weight.dtype)
    product = F.linear(x, weight, bias)
    product = F.gelu(product) if gelu else product
    return product if residual is None else residual + product  # of two types, in one kernel


def has_thin_product(x: Tensor, weight: Tensor, normed: bool, gelu: bool, residual: Tensor | None) -> bool:
    """Whether `thin_product` is there for this: it has been seen to be right and fast on this device.

    The first question for a shape tries it, which takes a tenth of a second, and seconds if it must be built.
    """
    if x.device.type not in proof.DEVICES:
        return False
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    if not 0 < rows <= MOST_ROWS or weight.numel() < _LEAST or inputs % 16 or weight.dtype not in _DTYPES:
        return False
    if not weight.is_contiguous() or (x.dtype != weight.dtype and not normed) or torch.is_autocast_enabled("cuda"):
        return False
    if (torch.is_grad_enabled() and x.requires_grad) or (residual is not None and residual.shape[:-1] != x.shape[:-1]):
        return False
    kinds = (x.dtype, normed, gelu, None if residual is None else residual.dtype)
    tried = (1 << (rows - 1).bit_length(), outputs, inputs)
    dtype, device = weight.dtype, weight.device
    return proof.is_proven("thin products", device, (dtype, tried, kinds), lambda: _trial(tried, kinds, dtype, device))


proof.register(
    "thin_product(Tensor x, Tensor weight, Tensor bias, Tensor? norm_weight, Tensor? norm_bias, float epsilon, "
    "bool gelu, Tensor? residual) -> Tensor",
    lambda x, weight, *rest: x.new_empty(
        len(x), len(weight), dtype=weight.dtype if rest[-1] is None else rest[-1].dtype
    ),
)


def _trial(
    tried: tuple[int, int, int],
    kinds: tuple[torch.dtype, bool, bool, torch.dtype | None],
    dtype: torch.dtype,
    device: torch.device,
) -> proof.Trial:
    (rows, outputs, inputs), (given, normed, gelu, added) = tried, kinds
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device).normal_(mean, std, generator=random)

    copies = proof.uncached_copies(device, outputs * inputs * dtype.itemsize)
    weights = normal(copies, outputs, inputs, dtype=dtype, std=inputs**-0.5)
    bias = normal(outputs, dtype=dtype)
    # A mean that is far from zero, as differences of large numbers are what goes wrong.
    x = normal(rows, inputs, dtype=given, mean=3.0 if normed else 0.0)
    norm = (normal(inputs, dtype=given, mean=1.0), normal(inputs, dtype=given), 1e-5) if normed else None
    residual = None if added is None else normal(rows, outputs, dtype=added)

    def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
        for count in sorted({1, rows // 2 + 1, rows}):
            some, part = x[:count], None if residual is None else residual[:count]
            exact = plain_product(
                some.double(),
                weights[0].double(),
                bias.double(),
                norm and (norm[0].double(), norm[1].double(), norm[2]),
                gelu,
                None if part is None else part.double(),
            )
            found = thin_product(some, weights[0], bias, norm, gelu, part)
            yield f"{count} rows, {inputs} inputs and {outputs} outputs", found, exact

    return proof.Trial(
        cases(),
        lambda turn: thin_product(x, weights[turn % copies], bias, norm, gelu, residual),
        lambda turn: plain_product(x, weights[turn % copies], bias, norm, gelu, residual),
    )
