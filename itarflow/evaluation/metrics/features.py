"""Features of many images, shared by processes, and Fréchet distances from their float64 sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from itarflow.evaluation.metrics.extractors import Extractor, Features


@dataclass(frozen=True)
class Moments:
    """Of a set of feature vectors; float64 on the CPU.

    Attributes:
        mean: (F,).
        covariance: (F, F), unbiased, as `numpy.cov` gives it.
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Sums:
    """What moments are made of: of shares of a set, however it is dealt out, the sum is that of the set.

    The shares of a set give the same up to rounding (1e-16 of the largest value) in any order and grouping, by the
    update of Chan, Golub and LeVeque (1979): nothing large is subtracted from anything large. float64 on the CPU.

    Attributes:
        count: number of feature vectors.
        mean: (F,), theirs.
        scatter: (F, F), sum of the products of their differences to the mean.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Tensor) -> Sums:
        """Those of features (B, F) on any device, B > 0."""
        # Not every accelerator has float64.
        values = (features if features.device.type in ("cpu", "cuda") else features.cpu()).double()
        mean = values.mean(dim=0)
        centred = values - mean
        return Sums(len(features), mean.cpu(), (centred.T @ centred).cpu())

    def __add__(self, other: Sums) -> Sums:
        """Those of both shares together."""
        count = self.count + other.count
        step = other.mean - self.mean
        weight = self.count * other.count / count
        scatter = self.scatter + other.scatter + weight * torch.outer(step, step)
        return Sums(count, self.mean + step * (other.count / count), scatter)

    def moments(self) -> Moments:
        """Mean and covariance.

        Raises:
            ValueError: of a single vector, which has no covariance.
        """
        if self.count < 2:
            raise ValueError(f"there are features of {self.count} image; expected 2 or more, to have a covariance.")
        return Moments(self.mean, self.scatter / (self.count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), in float64.

    By Fréchet (1957), as FID of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017). The trace of
    (A B)^(1/2) is taken as the sum of the singular values of A^(1/2) B^(1/2), which exist for singular covariances
    as well, and need no constant added to the diagonal.

    Raises:
        ValueError: numbers of features that differ, or features that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"there are {len(a.mean)} features and {len(b.mean)}; expected as many of one extractor.")
    for moments in (a, b):
        if not (moments.mean.isfinite().all() and moments.covariance.isfinite().all()):
            raise ValueError("features are not finite; the extractor's weights are damaged, or its numbers overflow.")
    shared = torch.linalg.svdvals(_square_root(a.covariance) @ _square_root(b.covariance)).sum()
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared)


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric one; what is below 0 by rounding counts as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


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
