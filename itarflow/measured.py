"""Sets of images, measured: what the tests for failures are made on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from itarflow.dataset import ImageDataset
from itarflow.failures import MEASURES, fine_energy, spectrum
from itarflow.proportions import Rate, rate
from itarflow.samples import Samples, batches

KINDS: Mapping[str, tuple[str, ...]] = {
    **{measure.name: (measure.name,) for measure in MEASURES},
    "collapsed": ("black", "flat"),
    "any": tuple(measure.name for measure in MEASURES),
}
"""Kinds of failures, and the measures of which one at least must be too low."""


@dataclass(frozen=True)
class RealImages:
    """So many images from all over a data set, as `Samples`."""

    name: str
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
        """None of them: the data set replaces unreadable images."""
        return torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return min(self.count, len(self.dataset))

    def read(self, start: int, stop: int) -> Tensor:
        """uint8 (stop - start, C, H, W)."""
        numbers = (index * len(self.dataset) // len(self) for index in range(start, stop))
        return torch.stack([self.dataset[number].image for number in numbers])


@dataclass(frozen=True)
class Measured:
    """What has been measured of the images of a set that are not broken."""

    numbers: Tensor
    """(n,) int64: which they are."""
    values: Mapping[str, Tensor]
    """(n,) by the names of the measures."""
    energy: Tensor
    """(n, N) `fine_energy`, token by token in raster order."""
    spectrum: Tensor
    """(S - 1,) mean over the images."""

    def below(self, thresholds: Mapping[str, float | None], kind: str) -> Tensor:
        """Which images fail so, (n,) bool; what has no threshold fails nobody."""
        fails = torch.zeros(len(self.numbers), dtype=torch.bool)
        for name in KINDS[kind]:
            if (limit := thresholds[name]) is not None:
                fails |= self.values[name] < limit
        return fails

    def rates(self, thresholds: Mapping[str, float | None]) -> dict[str, Rate]:
        """How many fail, by kind."""
        return {kind: rate(int(self.below(thresholds, kind).sum()), len(self.numbers)) for kind in KINDS}

    def medians(self) -> dict[str, float]:
        """Of the measures."""
        return {name: float(value.median()) for name, value in self.values.items()}

    def every_other(self, first: int) -> Measured:
        """Half of the images, from the first (0) or the second (1) on; the spectrum stays that of all."""
        half = slice(first, None, 2)
        values = {name: value[half] for name, value in self.values.items()}
        return Measured(self.numbers[half], values, self.energy[half], self.spectrum)


def measure(pictures: Samples, patch: int, batch_size: int, count: Callable[[int], None]) -> Measured:
    """Measure all images of a set that are not broken, batch by batch.

    Args:
        pictures: the set.
        patch: side of the cells of `fine_energy`.
        batch_size: images at a time.
        count: called with the number of images done.

    Raises:
        ValueError: all images are broken.
    """
    whole = torch.ones(len(pictures), dtype=torch.bool)
    whole[pictures.broken] = False
    if not whole.any():
        raise ValueError(f"all {len(pictures)} images of {pictures.name} are broken; there is nothing to measure.")
    values: dict[str, list[Tensor]] = {part.name: [] for part in MEASURES}
    energy, power, start = [], torch.zeros(()), 0
    for images in batches(pictures, batch_size):
        kept = images[whole[start : start + len(images)]]
        start += len(images)
        count(len(images))
        if len(kept) == 0:
            continue
        for part in MEASURES:
            values[part.name].append(part.measure(kept))
        energy.append(fine_energy(kept, patch).flatten(1))
        power = power + spectrum(kept).sum(dim=0)
    joined = {name: torch.cat(parts) for name, parts in values.items()}
    return Measured(whole.nonzero().flatten(), joined, torch.cat(energy), power / int(whole.sum()))
