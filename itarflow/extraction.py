"""Features of many images: their moments over all processes of a launch, and the vectors of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from itarflow.extractors import Extractor, Features
from itarflow.moments import Sums

_BLOCK = 1024  # images that are summed at a time: a sum costs F^2, however few they are


@dataclass(frozen=True)
class Extracted:
    """Of a set of images. The same on all processes, and up to rounding for any number of them.

    Attributes:
        pool: sums of the pooled features of all images.
        spatial: sums of those that sFID is taken of, or None.
        kept: (K, ...) features of some images, in the order of the images, on the CPU; `kept.spatial` is None.
    """

    pool: Sums
    spatial: Sums | None
    kept: Features

    @property
    def count(self) -> int:
        """Number of images."""
        return self.pool.count


def evenly_spaced(total: int, wanted: int) -> Tensor:
    """(K,) ascending indices of K = min(wanted, total) of 0 .. total - 1."""
    count = min(wanted, total)
    return (2 * torch.arange(count) + 1) * total // (2 * max(count, 1))


def extract(
    extractor: Extractor,
    batches: Iterable[tuple[Tensor, Tensor]],
    total: int,
    *,
    keep: int | None = None,
    count: Callable[[int], object] = int,
) -> Extracted:
    """Features of all images of a launch; every process calls this with its share of them.

    Args:
        extractor: on the device of this process.
        batches: (indices (B,) int64, images (B, C, H, W) uint8); over all processes each of the indices
            0 .. total - 1 comes exactly once, in any order. Batches of any size; a process may have none.
        total: number of images of all processes.
        keep: of how many evenly spaced images to keep the features; None = of all.
        count: called with the number of images done since its last call, of this process.

    Returns:
        The same on all processes.

    Raises:
        ValueError: indices are missing, or come twice.
    """
    if total < 1:
        raise ValueError(f"there are {total} images; expected 1 or more.")
    wanted = torch.zeros(total, dtype=torch.bool)
    wanted[evenly_spaced(total, total if keep is None else keep)] = True
    pool, spatial = _Summing(), _Summing()
    share = _Share([], [], [], [])
    for numbers, images in batches:
        features = extractor(images)
        pool.take(features.pool)
        chosen = wanted[numbers]
        share.seen.append(numbers)
        share.kept.append(numbers[chosen])
        share.pool.append(features.pool.cpu()[chosen])
        if features.spatial is not None:
            spatial.take(features.spatial)
        if features.logits is not None:
            share.logits.append(features.logits.cpu()[chosen])
        count(len(images))
    # As objects: not every device has float64.
    everywhere = gather_object([(pool.sums(), spatial.sums(), *map(_joined, share))])
    pools, spatials, seen, kept, vectors, logits = (
        [part for part in parts if part is not None] for parts in zip(*everywhere, strict=True)
    )
    found = torch.cat([*seen, torch.empty(0, dtype=torch.int64)])
    if not torch.equal(found.sort().values, torch.arange(total)):
        raise ValueError(f"there are features of {len(found)} images; expected each of {total} images exactly once.")
    order = torch.cat(kept).argsort()
    features = Features(torch.cat(vectors)[order], None, torch.cat(logits)[order] if logits else None)
    return Extracted(reduce(add, pools), reduce(add, spatials) if spatials else None, features)


class _Share(NamedTuple):
    """What a process has found, batch by batch."""

    seen: list[Tensor]
    """Indices of the images."""
    kept: list[Tensor]
    """Of those whose features are kept."""
    pool: list[Tensor]
    logits: list[Tensor]


class _Summing:
    """Sums that take features block by block."""

    def __init__(self) -> None:
        self._done: Sums | None = None
        self._waiting: list[Tensor] = []

    def take(self, features: Tensor) -> None:
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= _BLOCK:
            self._add()

    def sums(self) -> Sums | None:
        """Those of all that was taken; None of nothing."""
        if self._waiting:
            self._add()
        return self._done

    def _add(self) -> None:
        block = Sums.of(torch.cat(self._waiting))
        self._done = block if self._done is None else self._done + block
        self._waiting = []


def _joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None
