"""Attention of one new token to all tokens before it, which are in a cache, on a GPU."""

from __future__ import annotations

from torch import Tensor


def has_decode_attention(cache: Tensor) -> bool:
    """Whether `decode_attention` is there for caches of this dtype, shape and device.

    Args:
        cache: (2, R, H, N, E).
    """
    del cache
    return False


def decode_attention(qkv: Tensor, cache: Tensor, position: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Append keys and values of one token at `position` of the cache, and attend to positions 0 .. position.

    Args:
        qkv: (R, 1, 3C), C = H * E, of one token for each of R rows: queries, keys and values, each (H, E).
        cache: (2, R, H, N, E), keys and values; written at `position`, not read beyond it.
        position: (1,) int64, on the device, the same for all rows; 0 <= position < N.
        temperature: (R,), divides the attention logits; None = 1.

    Returns:
        (R, 1, C) of qkv's dtype.
    """
    raise NotImplementedError("see has_decode_attention")
