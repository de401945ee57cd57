"""Where along the tokens blur begins, with an interval and few false alarms: what `itarflow diagnose` leaves out.

    python experiments/blur_onset.py runs/cifar10/evaluation/iterative --reference cifar10 --patch-size 4

`itarflow diagnose` splits the median curve of detail in two, and leaves it to the reader whether chance did. Here the
curves of all images are compared with what chance does to groups of real ones, and the images are resampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from torch import Tensor

from itarflow.data import DataConfig, load_data
from itarflow.evaluation.diagnosis.failures import STEP, Onset
from itarflow.evaluation.diagnosis.rates import RealImages, measure_images
from itarflow.evaluation.samples.files import open_samples
from itarflow.runtime.progress import image_progress

FALSE_ALARMS = 0.05
"""Share of groups of real images in which a beginning is found though there is none."""
RESAMPLES = 200
"""Of the images, for the interval."""


@dataclass(frozen=True)
class Options:
    """Samples, and what they are compared with; as in `itarflow diagnose`."""

    samples: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SAMPLES")]
    reference: str
    split: str = "train"
    reference_images: int = 10_000
    patch_size: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Normal:
    """The detail of real images, place by place."""

    mean: Tensor
    """(N,) log2 of squared grey levels."""
    std: Tensor
    """(N,)"""
    limit: float
    """Strength of the two-level fit that 95 % of real images stay below: their objects have levels too."""
    count: int
    """m: how many real images these are taken from."""


def normal_detail(energy: Tensor) -> Normal:
    """What is normal, of the fine energy (m, N) of two real images or more."""
    mean, std = energy.mean(dim=0), energy.std(dim=0).clamp(min=1e-3)
    strongest = strengths((energy - mean) / std).abs().amax(dim=1)
    return Normal(mean, std, float(strongest.quantile(1 - FALSE_ALARMS)), len(energy))


def strengths(curves: Tensor) -> Tensor:
    """Two-level fits to curves (n, N), (n, N - 1): with the second level from token 1, 2, .. on.

    The square root of what the fit takes off the sum of squares, positive where the curve falls.
    """
    total = curves.shape[1]
    before = torch.arange(1, total)
    sums = curves.cumsum(dim=1)
    left, right = sums[:, :-1], sums[:, -1:] - sums[:, :-1]
    return (before * (total - before) / total).sqrt() * (left / before - right / (total - before))


def onset_with_interval(energy: Tensor, normal: Normal, generator: torch.Generator) -> tuple[Onset, int, int] | None:
    """Where blur begins in images that have it in common, and between which tokens with 95 % confidence.

    None if no place stands out. The strength of the fit to the mean curve must exceed `normal.limit` * sqrt(1 / n +
    1 / m), which the mean of n real images does in about 5 of 100 cases: what it differs by from that of the m other
    ones is chance in both. The lower level must be below that of real images, and have half the energy of the other.

    Args:
        energy: fine energy (n, N) of the images, n >= 1, N >= 2.
        normal: of real images.
        generator: resamples the images for the interval, which is widened by what chance does to `normal.mean`.
    """
    relative = energy - normal.mean
    curves, ratios = relative / normal.std, relative.mean(dim=0)
    found = strengths(curves.mean(dim=0, keepdim=True))[0]
    split, strength = int(found.abs().argmax()) + 1, float(found[found.abs().argmax()])
    before, after = (2.0 ** float(part.mean()) for part in (ratios[:split], ratios[split:]))
    blurred, others = (after, before) if strength > 0 else (before, after)
    limit = normal.limit * math.sqrt(1 / len(curves) + 1 / normal.count)
    if abs(strength) <= limit or blurred >= 1 or others < STEP * blurred:
        return None
    draws = torch.randint(len(curves), (RESAMPLES, len(curves)), generator=generator)
    weights = torch.zeros(RESAMPLES, len(curves)).scatter_add_(1, draws, torch.ones(draws.shape)) / len(curves)
    mean = curves.mean(dim=0)
    # The real images that they are compared with vary as they do: that adds n / m to the variance.
    means = mean + (weights @ curves - mean) * math.sqrt(1 + len(curves) / normal.count)
    splits = (strengths(means) * math.copysign(1, strength)).argmax(dim=1) + 1
    low, high = splits.float().quantile(torch.tensor([0.025, 0.975]), interpolation="nearest").int().tolist()
    if strength > 0:
        return Onset(split, "raster", blurred, others), low, high
    return Onset(split - 1, "reverse", blurred, others), low - 1, high - 1


def main(options: Options) -> None:
    """Print what is found."""
    samples = open_samples(options.samples)
    channels, _, width = samples.image_shape
    config = DataConfig(path=options.reference, split=options.split, held_out_images=0)
    dataset = load_data(config, image_size=width, in_channels=channels).train
    reference = RealImages(options.reference, dataset, options.reference_images)
    with image_progress(Console(stderr=True), "measuring", len(reference) + len(samples), 0) as count:
        normal = normal_detail(measure_images(reference, options.patch_size, 64, count).energy)
        energy = measure_images(samples, options.patch_size, 64, count).energy
    found = onset_with_interval(energy, normal, torch.Generator().manual_seed(options.seed))
    if found is None:
        print("no token was found from which on, or up to which, the images have blur in common")
        return
    onset, low, high = found
    where = "from token {} on" if onset.order == "raster" else "up to token {}"
    print(
        f"blurred {where.format(f'{onset.token} ({low} to {high})')}: {onset.blurred:.2g} times the fine energy of "
        f"real images, elsewhere {onset.others:.2g} times"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
