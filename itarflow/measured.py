"""Sets of images, measured: what the tests for failures are made on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from itarflow.data.dataset import ImageDataset
from itarflow.failures import MEASURES, fine_energy, spectrum
from itarflow.proportions import Rate, rate
from itarflow.runtime.text import without_folders
from itarflow.samples import Samples

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
        numbers = (index * len(self.dataset) // len(self) for index in range(start, stop))
        found = [self.dataset[number] for number in numbers]
        return [(one.image, one.broken and without_folders(one.broken, self.name)) for one in found]


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
    unreadable: tuple[str, ...] = ()
    """ "name: reason" of each real image that could not be read, and is left out."""

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
        return replace(self, numbers=self.numbers[half], values=values, energy=self.energy[half])


def measure(pictures: Samples, patch: int, batch_size: int, count: Callable[[int], None]) -> Measured:
    """Measure all images of a set that are not broken and can be read, batch by batch.

    Args:
        pictures: the set.
        patch: side of the cells of `fine_energy`.
        batch_size: images at a time.
        count: called with the number of images done.

    Raises:
        ValueError: all images are broken, or can't be read.
    """
    whole = torch.ones(len(pictures), dtype=torch.bool)
    whole[pictures.broken] = False
    values: dict[str, list[Tensor]] = {part.name: [] for part in MEASURES}
    energy, power, unreadable = list[Tensor](), torch.zeros(()), list[str]()
    for start in range(0, len(pictures), batch_size):
        stop = min(start + batch_size, len(pictures))
        images, reports = _read(pictures, start, stop)
        whole[torch.tensor([*reports], dtype=torch.int64) + start] = False
        unreadable += reports.values()
        kept = images[whole[start:stop]]
        count(len(images))
        if len(kept) == 0:
            continue
        for part in MEASURES:
            values[part.name].append(part.measure(kept))
        energy.append(fine_energy(kept, patch).flatten(1))
        power = power + spectrum(kept).sum(dim=0)
    if not energy:
        raise ValueError(f"all {len(pictures)} images of {pictures.name} are broken; there is nothing to measure.")
    joined = {name: torch.cat(parts) for name, parts in values.items()}
    return Measured(whole.nonzero().flatten(), joined, torch.cat(energy), power / int(whole.sum()), tuple(unreadable))


def _read(pictures: Samples, start: int, stop: int) -> tuple[Tensor, dict[int, str]]:
    """Images, and by its place among them "name: reason" of each that could not be read."""
    if not isinstance(pictures, RealImages):
        return pictures.read(start, stop), {}
    images, reports = zip(*pictures.examples(start, stop), strict=True)
    return torch.stack(images), {place: report for place, report in enumerate(reports) if report is not None}
