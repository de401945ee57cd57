"""Attention of one new token to all tokens before it, which are in a cache, on a GPU.

One kernel rotates the query and the key, if positions are rotary, appends the new key and value, and reads exactly the
keys that there are, whose number it finds on the device: one recording serves all lengths. Of few rows and heads the
keys are split over several programs, whose parts a second kernel adds in a fixed order: the same input gives the same
bits. The split depends on the number of rows, so a row's result may change in the last bits with their number, as
those of PyTorch's functions do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from itarflow.runtime.kernels import proof
from itarflow.runtime.kernels.attention import attention, attention_bias
from itarflow.runtime.kernels.rotary import Rotation, rotated, rotation_of, rotator

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDTHS = (8, 16, 32, 64, 128)
_PART = 256
"""Keys that are not split further."""


def has_decode_attention(cache: Tensor, rotary: bool = False) -> bool:
    """Whether `decode_attention` is there for such a cache: it has been seen to be right and fast on its device.

    The first question for a shape tries it, which takes a tenth of a second, and seconds if it must be built.

    Args:
        cache: (2, R, H, N, E), the last two dimensions contiguous.
        rotary: whether queries and keys are to be rotated.
    """
    _, rows, heads, tokens, width = cache.shape
    if cache.dtype not in _DTYPES or width not in _WIDTHS or cache.stride()[3:] != (width, 1) or rows == 0:
        return False
    # Beyond two programs a multiprocessor more rows change nothing, and neither do more tokens in the end.
    enough = 2 * proof.multiprocessors(cache.device) // heads + 1
    tried = (2, min(_power_of_2(rows), enough), heads, min(tokens, 1024), width)
    device, dtype = cache.device, cache.dtype
    splits = _splits(rows * heads, tokens, device)
    key = dtype, tried, splits, rotary
    return proof.is_proven("attention to a cache", device, key, lambda: _trial(tried, splits, rotary, dtype, device))


def decode_attention(
    qkv: Tensor,
    cache: Tensor,
    position: Tensor,
    temperature: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Append keys and values of one token at `position` of the cache, and attend to positions 0 .. position.

    Only where `has_decode_attention`; without gradients.

    Args:
        qkv: (R, 1, 3C), C = H * E, of one token for each of R rows: queries, keys and values, each (H, E).
        cache: (2, R, H, N, E), keys and values; written at `position`, not read beyond it.
        position: (1,) int64, on the device, the same for all rows; 0 <= position < N, which is not checked.
        temperature: (R,), divides the attention logits; None = 1.
        rotation: (1, E), of that position, by which queries and keys are rotated first; None = they are so already.

    Returns:
        (R, 1, C) of qkv's dtype.
    """
    _, rows, heads, tokens, _ = cache.shape
    splits = _splits(rows * heads, tokens, cache.device)
    pairs = None if rotation is None else rotation.pairs
    return torch.ops.itarflow.decode_attention(qkv, cache, position, temperature, pairs, splits)


proof.register(
    "decode_attention(Tensor qkv, Tensor(a!) cache, Tensor position, Tensor? temperature, Tensor? pairs, "
    "int splits) -> Tensor",
    lambda qkv, *_: qkv.new_empty(len(qkv), 1, qkv.shape[2] // 3),
)


def _splits(pairs: int, tokens: int, device: torch.device) -> int:
    """Parts of the keys of each row and head, a power of 2, so that there are about two programs a multiprocessor."""
    wanted = 2 * proof.multiprocessors(device) // pairs
    return max(1, min(_power_of_2(wanted + 1) // 2, _power_of_2(-(-tokens // _PART))))


def _power_of_2(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()


def _trial(shape: tuple[int, ...], splits: int, rotary: bool, dtype: torch.dtype, device: torch.device) -> proof.Trial:
    _, rows, heads, tokens, width = shape
    random = torch.Generator(device).manual_seed(0)
    copies = proof.uncached_copies(device, math.prod(shape) * dtype.itemsize)
    caches = torch.empty(copies, *shape, dtype=dtype, device=device).normal_(generator=random)
    qkv = torch.empty(rows, 1, 3 * heads * width, dtype=dtype, device=device).normal_(generator=random)
    q, k, v = qkv.view(rows, 3, heads, 1, width).transpose(0, 1)
    temperature = torch.empty(rows, device=device).uniform_(0.5, 2, generator=random)
    angles = torch.empty(1, width // 2, device=device).uniform_(0, 32, generator=random)
    rotation = rotation_of(angles) if rotary else None
    if rotation is not None:
        q, k = (rotated(given.double(), rotation) for given in (q, k))
    last = torch.tensor([tokens - 1], device=device)
    bias = attention_bias(torch.ones(1, tokens, dtype=torch.bool, device=device), dtype)

    def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
        edges = {0, 1, 63, 64, _PART - 1, _PART, _PART + 1, tokens // 2, tokens - 1}
        for position in sorted(edges & set(range(tokens)), reverse=True):
            cache, tempered = caches[0], temperature if position % 2 else None
            cache[..., position:, :] = torch.nan  # as if never written
            expected = cache.clone()
            found = decode(cache, torch.full_like(last, position), tempered)
            asked, here = f"the token at position {position} of {tokens}", slice(position, position + 1)
            if rotary:  # rounded in another way than PyTorch's would be
                yield f"the key of {asked}", cache[0, :, :, here], k
            expected[..., here, :] = torch.stack((cache[0, :, :, here] if rotary else k, v))
            some = [0, rows - 1]
            queries = q[some].double() / (1 if tempered is None else tempered[some].double()[:, None, None, None])
            exact = F.scaled_dot_product_attention(queries, *expected[:, some, :, : position + 1].double())
            yield asked, found.view(rows, heads, 1, width)[some], exact
            # What is appended is so to the bit, and nothing else is written.
            same = torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))
            yield f"{asked} in the cache", torch.tensor([float(same)]), torch.ones(1, dtype=torch.float64)
        caches.normal_(generator=random)

    def decode(cache: Tensor, position: Tensor, tempered: Tensor | None) -> Tensor:
        pairs = None if rotation is None else rotation.pairs
        return torch.ops.itarflow.decode_attention(qkv, cache, position, tempered, pairs, splits)

    def plain(turn: int) -> Tensor:
        cache, new = caches[turn % copies], qkv.view(rows, 1, 3, heads, width)
        if rotation is not None:
            rotator(rotation)(new[:, :, :2])  # again and again, which keeps their lengths
        cache.index_copy_(3, last, new[:, :, 1:].permute(2, 0, 3, 1, 4))
        return attention(new[:, :, 0].transpose(1, 2), cache[0], cache[1], bias)

    return proof.Trial(cases(), lambda turn: decode(caches[turn % copies], last, None), plain)
