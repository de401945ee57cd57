"""The Fréchet distance of samples to real images with and without those that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from itarflow.evaluation.metrics.extractors import INCEPTION, Extractor
from itarflow.evaluation.metrics.features import Moments, Sums, extract, frechet_distance
from itarflow.evaluation.samples.files import Samples, batches


@dataclass(frozen=True)
class Without:
    """Distances of one set of samples to real images, smaller is nearer.

    They grow as images get fewer. So what the failures cost is `as_many` less `without`, at equal numbers.
    """

    title: str
    """FID of the published Inception's features only."""
    images: int
    """All that are not broken."""
    distance: float
    """Of all these."""
    kept: int
    """How many do not fail."""
    without: float
    """Of those that do not fail."""
    as_many: float
    """Of so many drawn at random from all."""


def real_moments(
    extractor: Extractor, reference: Samples, numbers: Tensor, batch_size: int, count: Callable[[int], None]
) -> Moments:
    """Moments of the features of real images; `numbers` (n,) = which of them are not broken.

    Raises:
        ValueError: fewer than two images.
    """
    images = _numbered(reference, numbers, batch_size)
    return extract(extractor, images, len(numbers), keep=1, count=count).pool.moments()


def distances_without(
    extractor: Extractor,
    pictures: Samples,
    numbers: Tensor,
    fails: Tensor,
    real: Moments,
    batch_size: int,
    generator: torch.Generator,
    count: Callable[[int], None],
) -> Without | None:
    """Distances of samples with and without failures; None if fewer than two do not fail.

    Args:
        extractor: that `real` was made by.
        pictures: the samples; the features of all are in memory.
        numbers: (n,) which of them are not broken.
        fails: (n,) bool, which of these fail.
        real: from `real_moments`.
        batch_size: images at a time.
        generator: draws as many as do not fail.
        count: called with the number of images done.
    """
    if int((~fails).sum()) < 2:
        return None
    features = extract(extractor, _numbered(pictures, numbers, batch_size), len(numbers), count=count).kept.pool
    kept = int((~fails).sum())
    drawn = torch.randperm(len(features), generator=generator)[:kept].sort().values

    def distance(chosen: Tensor) -> float:
        return frechet_distance(Sums.of(chosen).moments(), real)

    return Without(
        title="FID" if extractor.name == INCEPTION else f"Fréchet distance ({extractor.name})",
        images=len(features),
        distance=distance(features),
        kept=kept,
        without=distance(features[~fails]),
        as_many=distance(features[drawn]),
    )


def _numbered(pictures: Samples, numbers: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Those with these numbers (n,), ascending, counted anew from 0 on."""
    whole = torch.zeros(len(pictures), dtype=torch.bool)
    whole[numbers] = True
    start = done = 0
    for images in batches(pictures, size):
        kept = images[whole[start : start + len(images)]]
        start += len(images)
        if len(kept) > 0:
            yield torch.arange(done, done + len(kept)), kept
        done += len(kept)
