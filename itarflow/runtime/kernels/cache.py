"""The cache of keys and values of a block.

Shapes: L layers, B' rows of the batch, H heads, N tokens, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


class Cache:
    """The keys and values of all layers. It grows with the positions in use, to at most twice as many.

    It grows by copying, so that attention reads contiguous memory. Unwritten positions are zero, not uninitialised:
    masked values must be finite, too.

    Args:
        shape: (L, 2, B', H, N, E).
        like: gives its dtype and device.
        room: positions allocated at first.
    """

    def __init__(self, shape: Sequence[int], like: Tensor, room: int = 64) -> None:
        *outer, self.num_tokens, width = shape
        self.tensor = like.new_zeros(*outer, min(room, self.num_tokens), width)
        """(L, 2, B', H, room, E)."""

    def reaching(self, stop: int) -> Tensor:
        """The tensor, grown if needed to hold positions 0 .. stop - 1."""
        *outer, room, width = self.tensor.shape
        if stop > room:
            grown = self.tensor.new_zeros(*outer, min(max(stop, 2 * room), self.num_tokens), width)
            grown[..., :room, :] = self.tensor
            self.tensor = grown
        return self.tensor

    def over(self, memory: Tensor) -> Cache:
        """An empty cache for the whole sequence, in the first of these values (n,), which are zero."""
        *outer, _, width = self.tensor.shape
        shape = (*outer, self.num_tokens, width)
        cache = Cache(shape, self.tensor, room=0)
        cache.tensor = memory[: math.prod(shape)].view(shape)
        return cache

    def select(self, rows: Tensor) -> Cache:
        """A copy of some of the B' rows."""
        chosen = self.tensor.index_select(2, rows)
        *outer, _, width = chosen.shape
        cache = Cache((*outer, self.num_tokens, width), chosen[..., :0, :], room=0)
        cache.tensor = chosen
        return cache
