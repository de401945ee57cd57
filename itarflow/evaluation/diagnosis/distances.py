"""The Fréchet distance of samples to real images with and without those that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from itarflow.evaluation.metrics.extractors import INCEPTION, Extractor
from itarflow.evaluation.metrics.features import Sums, extract, frechet_distance
from itarflow.evaluation.samples.files import Samples, batches


@dataclass(frozen=True)
class Distances:
    """Of one set of samples to real images; smaller is nearer.

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


def distances(
    extractor: Extractor,
    reference: tuple[Samples, Tensor],
    sets: Mapping[str, tuple[Samples, Tensor, Tensor]],
    batch_size: int,
    seed: int,
    count: Callable[[int], object],
) -> dict[str, Distances | None]:
    """Distances of sets of samples with and without failures; None where fewer than two do not fail.

    Args:
        extractor: makes the features; those of one set at a time are in memory.
        reference: real images, and which of them are not broken: (m,) numbers.
        sets: by name: samples, which of them are not broken, (n,) numbers, and which of these fail, (n,) bool.
        batch_size: images at a time.
        seed: draws as many as do not fail.
        count: called with the number of images done.

    Raises:
        ValueError: fewer than two real images.
    """
    pictures, numbers = reference
    images = _numbered(pictures, numbers, batch_size)
    real = extract(extractor, images, len(numbers), keep=1, count=count).pool.moments()
    title = "FID" if extractor.name == INCEPTION else f"Fréchet distance ({extractor.name})"

    def distance(features: Tensor) -> float:
        return frechet_distance(Sums.of(features).moments(), real)

    result: dict[str, Distances | None] = dict.fromkeys(sets)
    for name, (pictures, numbers, fails) in sets.items():
        if (kept := int((~fails).sum())) < 2:
            continue
        images = _numbered(pictures, numbers, batch_size)
        features = extract(extractor, images, len(numbers), count=count).kept.pool
        drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:kept].sort().values
        result[name] = Distances(
            title=title,
            images=len(features),
            distance=distance(features),
            kept=kept,
            without=distance(features[~fails]),
            as_many=distance(features[drawn]),
        )
    return result


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
