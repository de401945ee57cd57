"""Failures of sampled images, found by comparing them with real ones: how many, which, and where the blur begins.

Half of the real images set the thresholds of failures.py, the other half measures how often real images fail by them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from itarflow.codec import to_pil, to_pixels
from itarflow.evaluation.diagnosis.distances import Distances, distances
from itarflow.evaluation.diagnosis.failures import (
    MEASURES,
    SMALLEST,
    Measure,
    Onset,
    check_patch,
    default_patch,
    find_onset,
    quartiles,
    threshold,
)
from itarflow.evaluation.diagnosis.plots import Detail, draw_detail
from itarflow.evaluation.diagnosis.rates import (
    KINDS,
    Difference,
    Measurements,
    Rate,
    RealImages,
    difference,
    measure_images,
    rate,
)
from itarflow.evaluation.metrics.extractors import Extractor
from itarflow.evaluation.samples.files import Samples
from itarflow.runtime.files import check_writable, write_json
from itarflow.runtime.pictures import blank_figure, captioned_grid, save_picture
from itarflow.runtime.progress import image_progress

Thresholds = Mapping[str, float | None]
"""By measure; None = no threshold, because too many real images have the least value."""

FEW_IN_COMMON = 30
"""Where blur begins is not read off fewer images: their median steps up and down by chance."""
REFERENCE = "reference"
"""The name of the real images in files."""
MOST_CELLS = 1024
"""Cells of an image whose detail is kept, 4 bytes each."""
FEW_SAMPLES, FEW_BEYOND = 100, 10
"""Fewer samples, or fewer real images beyond a threshold, and a note says so."""
SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Found:
    """The failures of one kind in one set."""

    rate: Rate
    """Of the images that are not broken."""
    excess: Difference
    """Over the rate of real images."""


@dataclass(frozen=True)
class Findings:
    """What is wrong with one set of samples."""

    images: int
    broken: Rate
    """Images with values that were not finite. They are in no other figure."""
    failures: Mapping[str, Found]
    """By kind."""
    medians: Mapping[str, float]
    """Of the measures."""
    onset: Onset | None
    """Where blur begins that all images have in common; None = nowhere, or fewer than `FEW_IN_COMMON` of them."""
    onset_of_blurred: Onset | None
    """The same of the blurred images alone."""
    detail: list[list[float]]
    """Energy of fine structure relative to the median of real images: lower quartile, median and upper quartile of the
    images, each by token in raster order."""
    distances: Distances | None
    """Of all images and of those without any failure; None = no extractor, or nearly all fail."""


@dataclass(frozen=True)
class Diagnosis:
    """All that `diagnose` has found, as it is in report.json."""

    settings: Mapping[str, Any]
    measures: Mapping[str, Mapping[str, Any]]
    """What each measures, and its threshold; null = blind, because too many real images have the least value."""
    reference: Mapping[str, Any]
    """Rates of real images that set no threshold; medians and detail of all."""
    samples: Mapping[str, Findings]
    """By name."""
    differences: Mapping[str, Mapping[str, Difference]]
    """Rates less those of the first set: by name, by kind."""
    notes: tuple[str, ...]
    """What to keep in mind: few images, or a measure that does not apply to such images."""


def diagnose(
    samples: Mapping[str, Samples],
    reference: Samples,
    *,
    output: Path,
    nominal_rate: float = 0.01,
    patch_size: int | None = None,
    extractor: Extractor | None = None,
    worst: int = 24,
    batch_size: int = 64,
    seed: int = 0,
    console: Console | None = None,
) -> Diagnosis:
    """Find what fails in sets of samples, by thresholds from real images, and write a report.

    A measure's threshold is the value that a share `nominal_rate` of every other real image is below. The rates of
    the samples are reported beside those of the remaining real images, which did not set the threshold.

    Args:
        samples: by name, all of one shape, square, of 8 pixels a side or more. Differences are to the first one.
        reference: real images of that shape.
        output: folder for report.json; failures.json, the numbers of the images that fail by set and kind;
            detail.png; and NAME/KIND.png, the worst images that fail by each measure, also of the real ones. Made if
            needed; files of these names are replaced, or removed where nothing fails.
        nominal_rate: share of real images that each measure counts as failed.
        patch_size: side in pixels of the cells in which detail is compared, the patch size of the flow for instance,
            so that they are its tokens. None = at most 8 x 8 cells.
        extractor: of the features for the Fréchet distance without the failures; None = it is left out.
        worst: images in each contact sheet, at most.
        batch_size: images that are read and measured at a time.
        seed: draws as many samples as do not fail, for the distance of so many.
        console: where to show progress; None = nowhere.

    Raises:
        DataError: an image can't be read.
        ImportError: matplotlib is not installed.
        OSError: the folder can't be written.
        ValueError: sets that differ in shape, too few images, or settings out of range.
    """
    patch = _check(samples, reference, nominal_rate, patch_size, worst, batch_size)
    check_writable(output)
    blank_figure(1, 1)  # raises now, not at the end, if matplotlib is missing
    total = len(reference) + sum(map(len, samples.values()))
    with image_progress(console, "measuring", total, 0) as count:
        real = measure_images(reference, patch, batch_size, count)
        measured = {name: measure_images(given, patch, batch_size, count) for name, given in samples.items()}
    thresholds = {part.name: threshold(real.values[part.name][::2], nominal_rate) or None for part in MEASURES}
    real_rates = real.rates(thresholds, slice(1, None, 2))
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        output / "failures.json",
        {name: _numbers(samples[name], found, thresholds) for name, found in measured.items()},
    )
    apart: Mapping[str, Distances | None] = {}
    if extractor is not None:
        sets = {
            name: (samples[name], found.numbers, found.fails(thresholds, "any")) for name, found in measured.items()
        }
        total = len(real.numbers) + sum(len(found.numbers) for found in measured.values())
        with image_progress(console, f"features by {extractor.name}", total, 0) as count:
            apart = distances(extractor, (reference, real.numbers), sets, batch_size, seed, count)
    usual = quartiles(real.energy)[1]
    details = {name: _detail(found, usual, thresholds) for name, found in measured.items()}
    findings = {
        name: _findings(samples[name], found, details[name], thresholds, real_rates, apart.get(name))
        for name, found in measured.items()
    }
    first = next(iter(findings.values()))
    diagnosis = Diagnosis(
        settings={
            "nominal_rate": nominal_rate,
            "patch_size": patch,
            "image_shape": reference.image_shape,
            "seed": seed,
        },
        measures={
            part.name: {"title": part.title, "meaning": part.meaning, "threshold": thresholds[part.name]}
            for part in MEASURES
        },
        reference={
            "images": len(real.numbers),
            "unreadable": real.unreadable,
            "failures": real_rates,
            "medians": real.medians(),
            "detail": quartiles(real.energy - usual).exp2().tolist(),
        },
        samples=findings,
        differences={
            name: {kind: difference(other.failures[kind].rate, first.failures[kind].rate) for kind in KINDS}
            for name, other in list(findings.items())[1:]
        },
        notes=_notes(samples, reference, nominal_rate, thresholds),
    )
    write_json(output / "report.json", asdict(diagnosis))
    pictures = {REFERENCE: reference, **samples}
    for name, found in {REFERENCE: real, **measured}.items():
        for part in MEASURES:
            _save_sheet(output / name / f"{part.name}.png", pictures[name], found, part, thresholds, worst)
    draw_detail(real.energy - usual, details, output / "detail.png")
    return diagnosis


# -- what is decided --------------------------------------------------------------------------------------------


def _check(
    samples: Mapping[str, Samples],
    reference: Samples,
    nominal_rate: float,
    patch_size: int | None,
    worst: int,
    batch_size: int,
) -> int:
    """Refuse what can't be diagnosed; the patch size."""
    if not samples:
        raise ValueError("no samples are named; expected folders such as evaluation/iterative.")
    for name in samples:
        if name in ("", ".", "..", REFERENCE) or re.fullmatch(r"[\w.-]+", name) is None:
            raise ValueError(
                f"the name {name!r} of samples is not fit for a folder; use letters, digits, '_', '.', '-'."
            )
    shape = reference.image_shape
    for name, pictures in samples.items():
        if pictures.image_shape != shape:
            raise ValueError(
                f"images of {name} have the shape (C, H, W) {pictures.image_shape}, the real ones {shape}; only those "
                "of one shape can be compared. Diagnose each size on its own."
            )
        if len(pictures) == 0:
            raise ValueError(f"{name} has no images; expected some hundreds.")
    _, height, width = shape
    if height != width or width < SMALLEST:
        raise ValueError(
            f"images have {height} x {width} pixels; expected squares of {SMALLEST} x {SMALLEST} or more."
        )
    patch = default_patch(width) if patch_size is None else patch_size
    check_patch(width, patch)
    if (width // patch) ** 2 > MOST_CELLS:
        raise ValueError(
            f"patch_size {patch} makes {(width // patch) ** 2} cells of an image, expected at most {MOST_CELLS}; take "
            "a multiple of it."
        )
    for option, value in {"worst": worst, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{option} is {value}; expected a number >= 1.")
    if not 0 < nominal_rate < 0.5:
        raise ValueError(f"nominal_rate is {nominal_rate}; expected a share of real images between 0 and 0.5: 0.01.")
    if _beyond(reference, nominal_rate) < 1:
        raise ValueError(
            f"{len(reference)} real images are too few to tell a share of {nominal_rate:g}; expected "
            f"{math.ceil(2 / nominal_rate):,} or more: take more of them, or raise nominal_rate."
        )
    return patch


def _beyond(reference: Samples, share: float) -> int:
    """How many of the real images that set the thresholds lie beyond each of them."""
    return math.floor(share * (len(reference) // 2))


def _notes(
    samples: Mapping[str, Samples], reference: Samples, share: float, thresholds: Thresholds
) -> tuple[str, ...]:
    notes = [
        f"{name} has {len(pictures)} images: intervals are wide, and little can be told with fewer than {FEW_SAMPLES}"
        for name, pictures in samples.items()
        if len(pictures) < FEW_SAMPLES
    ]
    if (beyond := _beyond(reference, share)) < FEW_BEYOND:
        there = len(reference.dataset) if isinstance(reference, RealImages) else len(reference)
        enough = math.ceil(2 * FEW_BEYOND / share)
        more = f"; take {enough:,} or more" if there >= enough else f"; take all {there:,}"
        notes.append(
            f"of {len(reference):,} real images only {beyond} of the half that sets the thresholds lie beyond each of "
            "them, which is inexact" + (more if there > len(reference) else "")
        )
    notes += [
        f"{part.title} is 0 in more than {100 * share:.3g} % of the real images already, so it can't tell which "
        f"samples are {part.name}; that is left out"
        for part in MEASURES
        if thresholds[part.name] is None
    ]
    return tuple(notes)


def _findings(
    pictures: Samples,
    found: Measurements,
    detail: Detail,
    thresholds: Thresholds,
    real: Mapping[str, Rate],
    apart: Distances | None,
) -> Findings:
    failed = found.rates(thresholds)
    return Findings(
        images=len(pictures),
        broken=rate(len(pictures.broken), len(pictures)),
        failures={kind: Found(share, difference(share, real[kind])) for kind, share in failed.items()},
        medians=found.medians(),
        onset=detail.onset,
        onset_of_blurred=detail.onset_of_blurred,
        detail=quartiles(detail.relative).exp2().tolist(),
        distances=apart,
    )


def _detail(found: Measurements, usual: Tensor, thresholds: Thresholds) -> Detail:
    """Relative to the median (N,) of real images."""
    relative, blurred = found.energy - usual, found.fails(thresholds, "blurred")
    of_all, of_blurred = (
        find_onset(quartiles(energy)[1]) if len(energy) >= FEW_IN_COMMON else None
        for energy in (relative, relative[blurred])
    )
    return Detail(relative, blurred, of_all, of_blurred)


def _numbers(pictures: Samples, measured: Measurements, thresholds: Thresholds) -> dict[str, list[int]]:
    found = {kind: measured.numbers[measured.fails(thresholds, kind)].tolist() for kind in KINDS}
    return {"broken": pictures.broken.tolist()} | found


# -- what is shown ----------------------------------------------------------------------------------------------


def _save_sheet(
    path: Path, pictures: Samples, found: Measurements, part: Measure, thresholds: Thresholds, worst: int
) -> None:
    """The images that fail by a measure, lowest first, with number and value; if none does, no earlier sheet stays."""
    failed = found.fails(thresholds, part.name).nonzero().flatten()
    if len(failed) == 0:
        path.unlink(missing_ok=True)
        return
    lowest = failed[found.values[part.name][failed].argsort(stable=True)][:worst]
    numbers = found.numbers[lowest].tolist()
    values = found.values[part.name][lowest].tolist()
    images = [image for number in numbers for image in to_pil(to_pixels(pictures.read(number, number + 1)))]
    captions = [f"#{number}\n{value:.3g}" for number, value in zip(numbers, values, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(captioned_grid(images, captions, SHEET_COLUMNS), path)
