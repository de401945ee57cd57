"""CUDA graphs for small windows: recorded once and replayed, since launching each kernel would bound the speed.

A graph has fixed shapes and addresses. So the window's position is a tensor, and attention reads the cache up to a
length that stays the same for many windows, with a mask: the next power of two, hence few recordings a block. They
last as long as the inversion of the block, and each takes about as long as one evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from itarflow.inverse.decoding import CachedConditioner
from itarflow.inverse.guidance import Affine
from itarflow.runtime.recording import record

Evaluation = Callable[[Tensor, Tensor], Affine]
"""(tokens (B, n, D), start (B,)) -> (shift, scale)."""

_WIDEST = 64
"""Larger windows keep the device busy for longer than the host takes to launch their kernels."""
_SHORTEST = 64
"""The least length of cache that is read."""


@dataclass(frozen=True)
class GraphedConditioner:
    """A `solvers.Conditioner` that evaluates small windows by CUDA graphs. Stateful, as the conditioner it wraps.

    The tensors that a call returns are overwritten by the next call.
    """

    conditioner: CachedConditioner
    """Its cache is allocated for the whole sequence, because a graph needs a fixed address."""
    record: Callable[[Evaluation, Tensor, Tensor], Evaluation] = record
    _recorded: dict[tuple[int, int], Evaluation | None] = field(default_factory=dict)
    """By count and length; None = used once."""

    def __post_init__(self) -> None:
        self.conditioner.cache.reaching(len(self.conditioner.position))

    def __call__(self, tokens: Tensor, start: int | Tensor) -> Affine:
        """See `Conditioner`."""
        count = tokens.shape[1]
        if count > _WIDEST:
            return self.conditioner(tokens, start)
        if isinstance(start, int):
            stop, start = start + count, torch.full((len(tokens),), start, device=tokens.device)
        else:
            stop = int(start.max()) + count
        length = min(max(_SHORTEST, 1 << (stop - 1).bit_length()), len(self.conditioner.position))

        def evaluation(tokens: Tensor, start: Tensor) -> Affine:
            return self.conditioner.at(tokens, self.conditioner.scattered(start, count, length))

        # Recorded at the second use: the last windows of a sequence get shorter, and each occurs only once.
        key = count, length
        if key not in self._recorded:
            self._recorded[key] = None
            return evaluation(tokens, start)
        recorded = self._recorded[key] or self.record(evaluation, tokens, start)
        self._recorded[key] = recorded
        return recorded(tokens, start)

    def select(self, samples: Tensor) -> GraphedConditioner:
        """See `Conditioner`."""
        return GraphedConditioner(self.conditioner.select(samples), self.record)
