"""Mean and covariance of features, summed in float64 share by share, and the Fréchet distance of two of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
