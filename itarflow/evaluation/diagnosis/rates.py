"""Measures of whole sets of images, and rates of failures with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

from itarflow.data.dataset import ImageDataset
from itarflow.data.images import spread_over
from itarflow.evaluation.diagnosis.failures import MEASURES, fine_energy
from itarflow.evaluation.samples.files import Samples
from itarflow.runtime.text import without_folders

KINDS: Mapping[str, tuple[str, ...]] = {
    **{measure.name: (measure.name,) for measure in MEASURES},
    "collapsed": ("black", "flat"),
    "any": tuple(measure.name for measure in MEASURES),
}
"""Kinds of failures, and the measures of which one at least must be too low."""


@dataclass(frozen=True)
class Rate:
    """So many of so many, and the interval (Wilson, 1927) in which the true share lies with 95 % confidence."""

    count: int
    total: int
    value: float
    """count / total."""
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One rate less another, and its interval of 95 % confidence (Newcombe, 1998, method 10)."""

    value: float
    low: float
    high: float


def rate(count: int, total: int) -> Rate:
    """`count` of `total` with Wilson's score interval, which stays in [0, 1] and has a width even if count is 0.

    Raises:
        ValueError: not 0 <= count <= total, or total is 0.
    """
    if not 0 <= count <= total or total == 0:
        raise ValueError(f"{count} of {total} is no rate; expected 0 <= count <= total, and total > 0.")
    interval = binomtest(count, total).proportion_ci(0.95, "wilson")
    return Rate(count, total, count / total, float(interval.low), float(interval.high))


def difference(first: Rate, second: Rate) -> Difference:
    """first - second, of independent images: the hybrid of both of Wilson's intervals."""
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Difference(value, value - below, value + above)


@dataclass(frozen=True)
class RealImages:
    """So many images from all over a data set, as `Samples`."""

    name: str
    """The data set's, or its path."""
    dataset: ImageDataset
    count: int
    labels: None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.dataset[0].image.shape
        return channels, height, width

    @property
    def broken(self) -> Tensor:
        """None that are known before they are read; see `examples`."""
        return torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return min(self.count, len(self.dataset))

    def read(self, start: int, stop: int) -> Tensor:
        """uint8 (stop - start, C, H, W)."""
        return torch.stack([image for image, _ in self.examples(start, stop)])

    def examples(self, start: int, stop: int) -> list[tuple[Tensor, str | None]]:
        """Images as of `read`, and "name: reason" of those that another one stands for, as they can't be read."""
        numbers = spread_over(len(self.dataset), len(self))[start:stop]
        found = [self.dataset[number] for number in numbers]
        return [(one.image, one.broken and without_folders(one.broken, self.name)) for one in found]


@dataclass(frozen=True)
class Measurements:
    """Of the n images of a set that are neither broken nor unreadable."""

    numbers: Tensor
    """(n,) int64: which they are."""
    values: Mapping[str, Tensor]
    """(n,) by the names of the measures."""
    energy: Tensor
    """(n, N) `fine_energy`, token by token in raster order."""
    unreadable: tuple[str, ...] = ()
    """ "name: reason" of each real image that could not be read."""

    def fails(self, thresholds: Mapping[str, float | None], kind: str) -> Tensor:
        """Which images fail so, (n,) bool; a measure without a threshold fails none."""
        failed = torch.zeros(len(self.numbers), dtype=torch.bool)
        for name in KINDS[kind]:
            if (limit := thresholds[name]) is not None:
                failed |= self.values[name] < limit
        return failed

    def rates(self, thresholds: Mapping[str, float | None], of: slice = slice(None)) -> dict[str, Rate]:
        """How many of some of the images fail, by kind."""
        failed = {kind: self.fails(thresholds, kind)[of] for kind in KINDS}
        return {kind: rate(int(some.sum()), len(some)) for kind, some in failed.items()}

    def medians(self) -> dict[str, float]:
        """Of the measures."""
        return {name: float(value.median()) for name, value in self.values.items()}


def measure_images(samples: Samples, patch: int, batch_size: int, count: Callable[[int], None]) -> Measurements:
    """Measure all images of a set that are not broken and can be read, batch by batch.

    Args:
        samples: the set.
        patch: side of the cells of `fine_energy`.
        batch_size: images at a time.
        count: called with the number of images done.

    Raises:
        ValueError: all images are broken, or can't be read.
    """
    whole = torch.ones(len(samples), dtype=torch.bool)
    whole[samples.broken] = False
    values: dict[str, list[Tensor]] = {part.name: [] for part in MEASURES}
    energy, unreadable = list[Tensor](), list[str]()
    for start in range(0, len(samples), batch_size):
        stop = min(start + batch_size, len(samples))
        images, reports = _read(samples, start, stop)
        whole[torch.tensor([*reports], dtype=torch.int64) + start] = False
        unreadable += reports.values()
        kept = images[whole[start:stop]]
        count(len(images))
        if len(kept) == 0:
            continue
        for part in MEASURES:
            values[part.name].append(part.measure(kept))
        energy.append(fine_energy(kept, patch).flatten(1))
    if not energy:
        raise ValueError(f"all {len(samples)} images of {samples.name} are broken; there is nothing to measure.")
    joined = {name: torch.cat(parts) for name, parts in values.items()}
    return Measurements(whole.nonzero().flatten(), joined, torch.cat(energy), tuple(unreadable))


def _read(samples: Samples, start: int, stop: int) -> tuple[Tensor, dict[int, str]]:
    """Images, and by its place among them "name: reason" of each that could not be read."""
    if not isinstance(samples, RealImages):
        return samples.read(start, stop), {}
    images, reports = zip(*samples.examples(start, stop), strict=True)
    return torch.stack(images), {place: report for place, report in enumerate(reports) if report is not None}
