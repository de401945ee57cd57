"""A layer norm whose result has another type than what it is given, on a GPU, as one kernel; and an RMS norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from itarflow.runtime.kernels import proof

_WIDEST = 8192
_DTYPES = (torch.bfloat16, torch.float16)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """The layer norm of x (..., C) over C, in that type; by the kernel where it has been seen to be right and fast.

    Args:
        x: (..., C).
        weight: (C,), of x's type.
        bias: (C,), of x's type.
        epsilon: > 0.
        dtype: of the result.
    """
    if x.device.type in proof.DEVICES and _has_kernel(x, dtype):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return torch.ops.itarflow.layer_norm(rows, weight, bias, epsilon, dtype).view(x.shape)
    # Without the wrapper of torch.nn.functional, which takes as long as the norm of a token.
    return torch.layer_norm(x, weight.shape, weight, bias, epsilon).to(dtype)


def rms_norm(x: Tensor, factor: Tensor, epsilon: float = 1e-6) -> Tensor:
    """x (..., C) / rms(x) * factor (C,), over C, computed in the finer type of the two; in x's type."""
    exact = x.to(torch.promote_types(x.dtype, factor.dtype))
    return F.rms_norm(exact, factor.shape, factor.to(exact.dtype), epsilon).to(x.dtype)


def _has_kernel(x: Tensor, dtype: torch.dtype) -> bool:
    channels, device = x.shape[-1], x.device
    if x.dtype != torch.float32 or dtype not in _DTYPES or not 0 < channels <= _WIDEST or x.numel() == 0:
        return False
    if (torch.is_grad_enabled() and x.requires_grad) or torch.is_autocast_enabled("cuda"):
        return False
    return proof.is_proven("layer norms", device, (dtype, channels), lambda: _trial(channels, dtype, device))


proof.register(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon, ScalarType dtype) -> Tensor",
    lambda x, *rest: x.new_empty(x.shape, dtype=rest[-1]),
)


def _trial(channels: int, dtype: torch.dtype, device: torch.device) -> proof.Trial:
    random = torch.Generator(device).manual_seed(0)
    x, weight, bias = (
        torch.empty(*shape, device=device).normal_(mean, generator=random)
        for shape, mean in (((128, channels), 30.0), ((channels,), 1.0), ((channels,), 0.0))
    )

    def own(_: int = 0) -> Tensor:
        return torch.ops.itarflow.layer_norm(x, weight, bias, 1e-5, dtype)

    def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
        exact = F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), 1e-5)
        yield f"{channels} channels", own(), exact

    return proof.Trial(cases(), own, lambda _: F.layer_norm(x, weight.shape, weight, bias, 1e-5).to(dtype))
