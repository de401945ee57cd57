"""Attention on any device."""

from __future__ import annotations

from torch import Tensor

from itarflow.runtime.kernels import cpu


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """The values, weighted by softmax(q @ k.T / sqrt(E)): (B, H, n, E).

    Args:
        q: (B, H, n, E), queries.
        k: (B, H, N, E), keys.
        v: (B, H, N, E), values.
        mask: (n, N) or (B, 1, n, N) bool, False where a query must not look; None = it may look at all.
        causal: query i looks at keys 0 .. i; not together with a mask.
    """
    return cpu.attention(q, k, v, mask, causal)
