"""Failures of sampled images, found by comparing them with real ones: how many, which, and where the blur begins.

Half of the real images set the thresholds of failures.py, the other half tells how often real images fail by them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from torch import Tensor

from itarflow.codec import to_pil, to_pixels
from itarflow.evaluation.diagnosis.distances import Without, distances_without, real_moments
from itarflow.evaluation.diagnosis.failures import MEASURES, SMALLEST, Measure, check_patch, default_patch, threshold
from itarflow.evaluation.diagnosis.onset import Normal, Onset, find_onset, normal_detail
from itarflow.evaluation.diagnosis.plots import Detail, draw_detail, draw_spectra
from itarflow.evaluation.diagnosis.rates import (
    KINDS,
    Difference,
    Measured,
    Rate,
    RealImages,
    difference,
    measure,
    rate,
)
from itarflow.evaluation.metrics.extractors import Extractor
from itarflow.evaluation.samples.files import Samples
from itarflow.runtime.files import check_writable
from itarflow.runtime.pictures import blank_figure, captioned_grid
from itarflow.runtime.progress import image_progress

REFERENCE = "reference"
"""The name of the real images in files."""
MOST_CELLS = 1024
"""Places a picture at which detail is kept, 4 bytes each."""
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
    """Where blur begins that all images have in common; None = nowhere."""
    onset_of_blurred: Onset | None
    """The same of the blurred images alone; None = nowhere, or fewer than two of them."""
    detail: list[list[float]]
    """Energy of fine structure relative to real images, geometric mean of the images, by row and column of tokens."""
    detail_error: list[list[float]]
    """Its standard error from the finite number of samples, in powers of two."""
    spectrum: list[float]
    distances: Without | None
    """Of all images and of those without any failure; None = not asked for, or nearly all fail."""


@dataclass(frozen=True)
class Diagnosis:
    """All that `diagnose` has found, as it is in report.json."""

    settings: Mapping[str, Any]
    measures: Mapping[str, Mapping[str, Any]]
    """What each measures, and its threshold; null = blind, because too many real images have the least value."""
    reference: Mapping[str, Any]
    """Rates of real images that set no threshold, medians and spectrum."""
    samples: Mapping[str, Findings]
    """By name."""
    differences: Mapping[str, Mapping[str, Difference]]
    """Rates less those of the first set: by name, by kind."""
    notes: tuple[str, ...]
    """What to keep in mind: that there are few images, or that a measure can't tell anything of such images."""


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
    """Find what fails in sets of samples, by thresholds that real images give, and write what is found.

    A measure's threshold is the value that a share `nominal_rate` of every other real image is below. The rates of
    the samples stand beside the rate of the remaining real images, which it was not chosen by.

    Args:
        samples: by name, all of one shape, square, of 8 pixels a side or more. Differences are to the first one.
        reference: real images of that shape.
        output: folder for report.json; failures.json, the numbers of the images that fail by set and kind;
            detail.png and spectrum.png; and NAME/KIND.png, the worst images of each measure that any fails by, also
            of the real ones. Made if needed; files of these names are replaced, or removed where nothing fails.
        nominal_rate: share of real images that each measure counts as failed.
        patch_size: side in pixels of the cells in which detail is compared, the patch size of the flow for instance,
            so that they are its tokens. None = at most 8 x 8 cells.
        extractor: makes the features for the Fréchet distance without the failures; None = it is left out.
        worst: images in each contact sheet.
        batch_size: images that are read and measured at a time.
        seed: of what is drawn at random: the resampling that gives the interval of where blur begins, and as many
            samples as do not fail.
        console: where to show progress; None = nowhere.

    Raises:
        DataError: an image can't be read.
        ImportError: matplotlib is not installed.
        OSError: the folder can't be written.
        ValueError: sets that differ in shape, too few images, or settings out of range.
    """
    patch = _check(samples, reference, nominal_rate, patch_size, worst, batch_size)
    check_writable(output)
    blank_figure(1, 1)  # which needs matplotlib: now and not in the end
    total = len(reference) + sum(map(len, samples.values()))
    with image_progress(console, "measuring", total, 0) as count:
        real = measure(reference, patch, batch_size, count)
        measured = {name: measure(given, patch, batch_size, count) for name, given in samples.items()}
    setting, checking = real.every_other(0), real.every_other(1)
    thresholds = {part.name: _threshold(setting.values[part.name], nominal_rate) for part in MEASURES}
    real_rates = checking.rates(thresholds)
    normal = normal_detail(setting.energy)
    output.mkdir(parents=True, exist_ok=True)
    _write_json(
        output / "failures.json",
        {name: _numbers(samples[name], found, thresholds) for name, found in measured.items()},
    )
    distances = _distances(samples, reference, real, measured, thresholds, extractor, batch_size, seed, console)
    findings = {
        name: _findings(samples[name], found, thresholds, real_rates, normal, seed, distances[name])
        for name, found in measured.items()
    }
    first, *others = findings
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
            "spectrum": real.spectrum.tolist(),
        },
        samples=findings,
        differences={
            name: {
                kind: difference(findings[name].failures[kind].rate, findings[first].failures[kind].rate)
                for kind in KINDS
            }
            for name in others
        },
        notes=_notes(samples, reference, nominal_rate, thresholds),
    )
    _write_json(output / "report.json", asdict(diagnosis))
    pictures = {REFERENCE: reference, **samples}
    for name, found in {REFERENCE: real, **measured}.items():
        for part in MEASURES:
            path = output / name / f"{part.name}.png"
            _save_sheet(path, pictures[name], found, part, thresholds[part.name], worst)
    spectra = {"real images": real.spectrum} | {name: found.spectrum for name, found in measured.items()}
    draw_spectra(spectra, output / "spectrum.png")
    draw_detail(
        {
            name: Detail(found.energy - normal.mean, found.below(thresholds, "blurred"), findings[name].onset)
            for name, found in measured.items()
        },
        reference.image_shape[2] // patch,
        output / "detail.png",
    )
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


def _threshold(values: Tensor, share: float) -> float | None:
    """None = blind."""
    limit = threshold(values, share)
    return limit if limit > 0 else None


def _notes(
    samples: Mapping[str, Samples], reference: Samples, share: float, thresholds: Mapping[str, float | None]
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
    measured: Measured,
    thresholds: Mapping[str, float | None],
    real: Mapping[str, Rate],
    normal: Normal,
    seed: int,
    distances: Without | None,
) -> Findings:
    generator = torch.Generator().manual_seed(seed)
    side = math.isqrt(measured.energy.shape[1])
    blurred = measured.energy[measured.below(thresholds, "blurred")]
    ratio = (measured.energy.mean(dim=0) - normal.mean).exp2()
    error = measured.energy.std(dim=0, correction=0) / len(measured.energy) ** 0.5
    return Findings(
        images=len(pictures),
        broken=rate(len(pictures.broken), len(pictures)),
        failures={
            kind: Found(found, difference(found, real[kind])) for kind, found in measured.rates(thresholds).items()
        },
        medians=measured.medians(),
        onset=find_onset(measured.energy, normal, generator),
        onset_of_blurred=find_onset(blurred, normal, generator) if len(blurred) > 1 else None,
        detail=ratio.view(side, side).tolist(),
        detail_error=error.view(side, side).tolist(),
        spectrum=measured.spectrum.tolist(),
        distances=distances,
    )


def _distances(
    samples: Mapping[str, Samples],
    reference: Samples,
    real: Measured,
    measured: Mapping[str, Measured],
    thresholds: Mapping[str, float | None],
    extractor: Extractor | None,
    batch_size: int,
    seed: int,
    console: Console | None,
) -> dict[str, Without | None]:
    if extractor is None:
        return dict.fromkeys(samples)
    total = len(real.numbers) + sum(len(found.numbers) for found in measured.values())
    with image_progress(console, f"features by {extractor.name}", total, 0) as count:
        moments = real_moments(extractor, reference, real.numbers, batch_size, count)
        return {
            name: distances_without(
                extractor,
                samples[name],
                found.numbers,
                found.below(thresholds, "any"),
                moments,
                batch_size,
                torch.Generator().manual_seed(seed),
                count,
            )
            for name, found in measured.items()
        }


def _numbers(pictures: Samples, measured: Measured, thresholds: Mapping[str, float | None]) -> dict[str, list[int]]:
    found = {kind: measured.numbers[measured.below(thresholds, kind)].tolist() for kind in KINDS}
    return {"broken": pictures.broken.tolist()} | found


# -- what is shown ----------------------------------------------------------------------------------------------


def _save_sheet(
    path: Path, pictures: Samples, measured: Measured, part: Measure, limit: float | None, worst: int
) -> None:
    """The images with the lowest values, with number and value; none where nothing fails, not even an earlier one."""
    values = measured.values[part.name]
    if limit is None or not (values < limit).any():
        path.unlink(missing_ok=True)
        return
    lowest = values.argsort(stable=True)[:worst]
    images, captions = [], []
    for index in lowest.tolist():
        number, value = int(measured.numbers[index]), float(values[index])
        images += to_pil(to_pixels(pictures.read(number, number + 1)))
        captions.append(f"#{number}\n" + (f"{value:.3g}" if value < limit else f"({value:.3g})"))
    title = f"{part.title}, lowest first; failed: below {limit:.3g}; in parentheses: not failed"
    path.parent.mkdir(parents=True, exist_ok=True)
    _titled(captioned_grid(images, captions, SHEET_COLUMNS), title).save(path)


def _titled(sheet: Image.Image, title: str) -> Image.Image:
    """A sheet with a line above it."""
    font, top = ImageFont.load_default(13), 26
    page = Image.new(
        sheet.mode, (max(sheet.width, math.ceil(font.getlength(title)) + 12), sheet.height + top), "white"
    )
    page.paste(sheet, (0, top))
    ImageDraw.Draw(page).text((6, top / 2), title, "black", font, anchor="lm")
    return page


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
