"""Scores of samples against real images: FID, sFID, Inception Score, kernel distance, precision and recall.

All but the Fréchet distances are taken of feature vectors, and give what torch-fidelity gives, up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from itarflow.evaluation.metrics.extractors import INCEPTION, Extractor
from itarflow.evaluation.metrics.features import Extracted, frechet_distance
from itarflow.evaluation.metrics.reference import Reference
from itarflow.runtime.devices import tf32_products

PUBLISHED_SAMPLES = 50_000
"""From so many samples, papers compute FID."""

_SEED = 2020  # torch-fidelity's, so that its subsets are ours
_NEIGHBOURS = 3
_ROWS = 2048  # of distances at a time


class Spread(NamedTuple):
    """Mean and spread of a figure over splits or subsets."""

    mean: float
    std: float
    """Standard deviation over splits or subsets; not that over other sets of samples."""


class PrecisionRecall(NamedTuple):
    """Each in [0, 1]."""

    precision: float
    recall: float


def inception_score(logits: Tensor, splits: int = 10) -> Spread:
    """exp of the mean KL divergence from the classes of all images to those of each one, for each split.

    By Salimans et al., "Improved Techniques for Training GANs" (2016). Images are shuffled, always in the same way,
    and dealt to the splits, because samples mostly come class by class.

    Args:
        logits: (N, K), without biases ("logits_unbiased"), as in the original.
        splits: number of splits, each of which gives a score.

    Raises:
        ValueError: fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"there are {len(logits)} images; expected at least {splits}, one for each split.")
    order = torch.from_numpy(_random().permutation(len(logits)))
    scores = []
    for part in range(splits):
        rows = order[part * len(logits) // splits : (part + 1) * len(logits) // splits]
        log_p = logits[rows].double().log_softmax(dim=1)
        log_q = log_p.logsumexp(dim=0) - math.log(len(rows))
        scores.append(float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean().exp()))
    return _spread(scores)


def kernel_distance(samples: Tensor, real: Tensor, subsets: int = 100, subset_size: int = 1000) -> Spread:
    """Squared maximum mean discrepancy with the kernel (x . y / F + 1)^3, unbiased, mean over random subsets.

    By Binkowski et al., "Demystifying MMD GANs" (2018), who call it KID. It has no bias from the number of images, and
    may be slightly below 0.

    Args:
        samples: (N, F) features.
        real: (M, F) features.
        subsets: number of subsets.
        subset_size: images in each; fewer if there are fewer.

    Raises:
        ValueError: fewer than 2 images.
    """
    size = min(subset_size, len(samples), len(real))
    if size < 2:
        raise ValueError(f"there are {len(samples)} samples and {len(real)} real images; expected 2 or more of each.")
    random = _random()
    values = []
    for _ in range(subsets):
        x, y = (
            features[torch.from_numpy(random.choice(len(features), size, replace=False))]
            for features in (samples, real)
        )
        xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append(float(within - 2 * xy.mean()))
    return _spread(values)


def precision_recall(samples: Tensor, real: Tensor, neighbours: int = _NEIGHBOURS) -> PrecisionRecall:
    """Share of samples that lie among the real images, and of real images that lie among the samples.

    By Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019): an image
    lies among others if it is no farther from one of them than that one's third nearest neighbour. Both depend on the
    numbers of images: compare at equal ones.

    Args:
        samples: (N, F) features, on any device.
        real: (M, F) features, on the same.
        neighbours: k: the k-th nearest neighbour bounds the surroundings of an image.

    Raises:
        ValueError: there are not more than k images of a kind.
    """
    if min(len(samples), len(real)) <= neighbours:
        raise ValueError(
            f"there are {len(samples)} samples and {len(real)} real images; expected more than {neighbours} of each."
        )
    # About a common centre, so that float32 suffices for differences of squares.
    centre = real.mean(dim=0)
    samples, real = samples - centre, real - centre
    return PrecisionRecall(_among(samples, real, neighbours), _among(real, samples, neighbours))


@dataclass(frozen=True)
class Figure:
    """One figure of a set of samples.

    Attributes:
        title: what it is called.
        meaning: what is computed, exactly.
        value: the figure.
        std: over splits or subsets; None = computed once.
    """

    title: str
    meaning: str
    value: float
    std: float | None = None


@dataclass(frozen=True)
class Scores:
    """All figures of a set of samples, and what they depend on.

    Attributes:
        figures: by a short name: fid, sfid, kid, inception_score, precision, recall; of other extractors than the
            published Inception frechet_distance and kernel_distance instead of fid and kid, and neither sfid nor
            inception_score.
        extractor: its name.
        samples: how many there are, those that were not finite included.
        broken: of how many some values were not finite; they are scored as they were stored.
        reference: name of the real images.
        reference_images: how many there are; None = not in their file.
        kept_images: of how many real images there are features, for kernel distance, precision and recall.
        warnings: about comparing the figures with others.
    """

    figures: dict[str, Figure]
    extractor: str
    samples: int
    broken: int
    reference: str
    reference_images: int | None
    kept_images: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values; the figures as {"title", "meaning", "value", "std"}."""
        return {
            **{name: value for name, value in vars(self).items() if name != "figures"},
            "warnings": list(self.warnings),
            "figures": {name: dict(vars(figure)) for name, figure in self.figures.items()},
        }


@tf32_products(False)
def score(
    samples: Extracted,
    reference: Reference,
    extractor: Extractor,
    broken: int = 0,
    device: torch.device | str = "cpu",
) -> Scores:
    """All figures that samples and reference allow; one process computes them.

    Args:
        samples: of all samples, their features kept.
        reference: of the same extractor.
        extractor: that both were made by.
        broken: number of samples with values that were not finite.
        device: of the nearest-neighbour search; 50,000 samples among each other keep a core of a CPU busy for minutes.

    Raises:
        ValueError: fewer than 2 samples, another extractor, or features that are not finite.
    """
    origin = reference.origin
    if origin.identity != extractor.identity:
        raise ValueError(
            f"the reference was made by {origin.extractor} ({origin.identity[:8]}), the samples by {extractor.name} "
            f"({extractor.identity[:8]}); expected one extractor."
        )
    inception = extractor.name == INCEPTION
    of = "" if inception else f" ({extractor.name})"
    real = f"{origin.source}: {_count(origin.count)} images"
    figures: dict[str, Figure] = {}
    figures["fid" if inception else "frechet_distance"] = Figure(
        "FID" if inception else f"Fréchet distance{of}",
        f"Fréchet distance of the pooled features of {extractor.name}, {samples.count:,} samples against {real}",
        frechet_distance(samples.pool.moments(), reference.pool),
    )
    if inception and samples.spatial is not None and reference.spatial is not None:
        figures["sfid"] = Figure(
            "sFID",
            "as FID, of the first 7 channels of Inception's tensor mixed_6/conv at all 17 x 17 places, as in ADM's "
            "evaluation",
            frechet_distance(samples.spatial.moments(), reference.spatial),
        )
    if inception and samples.kept.logits is not None and samples.count >= 10:
        figures["inception_score"] = Figure(
            "Inception Score",
            f"exp of the mean KL divergence of classes, {samples.count:,} samples in 10 splits; real images have no "
            "part in it, and it says little of sets that are not like ImageNet",
            *inception_score(samples.kept.logits),
        )
    vectors, kept = samples.kept.pool, reference.features
    if kept is not None:
        size = min(1000, len(vectors), len(kept))
        counts = f"{len(vectors):,} samples and {len(kept):,} real images"
        figures["kid" if inception else "kernel_distance"] = Figure(
            "KID" if inception else f"kernel distance{of}",
            f"unbiased squared MMD with the kernel (x . y / F + 1)^3, mean over 100 subsets of {size:,} of {counts}",
            *kernel_distance(vectors, kept),
        )
        if min(len(vectors), len(kept)) > _NEIGHBOURS:
            nearness = f"than that one's third nearest neighbour; {counts}, pooled features"
            precision, recall = precision_recall(vectors.to(device), kept.to(device))
            figures["precision"] = Figure(
                f"precision{of}", f"share of samples no farther from a real image {nearness}", precision
            )
            figures["recall"] = Figure(
                f"recall{of}", f"share of real images no farther from a sample {nearness}", recall
            )
    return Scores(
        figures=figures,
        extractor=extractor.name,
        samples=samples.count,
        broken=broken,
        reference=origin.source,
        reference_images=origin.count,
        kept_images=0 if kept is None else len(kept),
        warnings=tuple(_warnings(samples, reference, inception, broken)),
    )


def _warnings(samples: Extracted, reference: Reference, inception: bool, broken: int) -> list[str]:
    origin, features, found = reference.origin, len(reference.pool.mean), list[str]()
    for count, what in ((samples.count, "samples"), (origin.count, "real images")):
        if count is not None and count <= features:
            found.append(
                f"{count:,} {what} for {features:,} features: their covariance is singular, and the Fréchet distance "
                "is biased upwards; compare only at equal counts, or use the kernel distance (KID)"
            )
    if features < samples.count < PUBLISHED_SAMPLES:
        found.append(
            f"{samples.count:,} samples: published FIDs are of {PUBLISHED_SAMPLES:,}, and the fewer there are, the "
            "higher is a Fréchet distance; compare only at equal counts"
        )
    if broken:
        found.append(f"{broken:,} samples have values that are not finite; they are scored as stored")
    if origin.broken:
        found.append(
            f"{len(origin.broken):,} real images could not be read, and were replaced by their neighbours; the first: "
            f"{origin.broken[0]}"
        )
    if reference.features is None:
        found.append(f"{origin.source} holds no images: there is no kernel distance, no precision and no recall")
    elif min(len(samples.kept.pool), len(reference.features)) < 1000:
        found.append("fewer than 1,000 images of a kind: the kernel distance is of smaller subsets, and less certain")
    if origin.image_size is None:
        found.append(f"{origin.source} does not record the size of its images; figures compare at one size only")
    if origin.crop is None:
        found.append(f"{origin.source} does not record how its images were cropped; FID depends on it")
    if inception and samples.spatial is not None and reference.spatial is None:
        found.append(f"{origin.source} has no mu_s and sigma_s: there is no sFID")
    return found


def _among(points: Tensor, others: Tensor, neighbours: int) -> float:
    """Share of points (N, F) that are no farther from one of the others (M, F) than its k-th nearest neighbour is."""
    # One more, since the nearest to each is itself.
    radii = torch.cat([_nearest(rows, others, neighbours + 1) for rows in others.split(_ROWS)])
    inside = [(torch.cdist(rows, others) <= radii).any(dim=1) for rows in points.split(_ROWS)]
    return float(torch.cat(inside).float().mean())


def _nearest(rows: Tensor, others: Tensor, rank: int) -> Tensor:
    """(B,) distance from each row to the one of the others that is its nearest but for rank - 1."""
    return torch.cdist(rows, others).topk(rank, largest=False).values[:, -1]


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y.T).double() / x.shape[1] + 1) ** 3


def _spread(values: list[float]) -> Spread:
    return Spread(float(np.mean(values)), float(np.std(values)))


def _random() -> np.random.RandomState:
    return np.random.RandomState(_SEED)


def _count(images: int | None) -> str:
    return "an unknown number of" if images is None else f"{images:,}"
