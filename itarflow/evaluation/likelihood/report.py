"""The report of likelihoods, in memory and on disk: means over images, a table of all of them, and a curve."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypedDict

import numpy as np
import torch
from msgspec import Meta

from itarflow import __version__
from itarflow.evaluation.likelihood.bounds import Mean, Noise
from itarflow.runtime.errors import DataError, RunError
from itarflow.runtime.files import atomically, write_json, write_text
from itarflow.runtime.json_file import parse_json, read_json
from itarflow.runtime.pictures import blank_figure, save_figure

SUMMARY, TABLE, CURVE = "bpd.json", "images.csv", "nll.png"
"""What a folder of figures holds."""
PROGRESS = ".rows-*.jsonl"
"""What each process has measured, batch by batch; it stays, so that the same command has nothing left to do."""

Rows: TypeAlias = dict[int, dict[str, Any]]
"""What is known of an image, by its number: "label" and "values", or why it is "broken"."""


_Number = Annotated[str, Meta(pattern="^[0-9]{1,18}$")]
"""Of an image."""


class _Summary(TypedDict):
    """What is read of bpd.json."""

    settings: dict[str, Any]


class _Row(TypedDict, total=False):
    """What is known of an image."""

    label: int
    values: Annotated[list[list[float] | None], Meta(min_length=3, max_length=3)]
    broken: str


@dataclass(frozen=True)
class Figures:
    """The means over images with one kind of noise; what they mean is in `Noise` and `bounds.Likelihoods`."""

    noise: Noise
    nll: Mean
    bits: Mean | None
    bits_one_draw: Mean | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        means = {"nats/dim": self.nll, "bits/dim": self.bits, "bits/dim, one draw": self.bits_one_draw}
        values = {name: None if mean is None else mean._asdict() for name, mean in means.items()}
        return {"noise": self.noise.kind, "noise_level": self.noise.level, **values}


@dataclass(frozen=True)
class Report:
    """What has been measured."""

    settings: Mapping[str, Any]
    images: int
    broken: tuple[str, ...]
    """ "name: reason" of each image that could not be read, and is left out."""
    figures: tuple[Figures, ...]
    images_per_second: float | None
    """Of all processes; None if nothing was left to do."""


def open_report(folder: Path, settings: Mapping[str, Any]) -> Rows:
    """The rows measured so far, by image number; a new folder gets the settings.

    Raises:
        RunError: the folder holds figures of other settings, or a file in it is damaged.
    """
    summary = folder / SUMMARY
    if not summary.exists():
        if (folder / TABLE).exists() or any(folder.glob(PROGRESS)):
            raise RunError(f"{folder} holds figures, but {SUMMARY} is missing; choose another folder.")
        write_json(summary, {"settings": dict(settings)})
        return {}
    try:
        stored = read_json(summary, _Summary)["settings"]
    except DataError as error:
        raise RunError(f"{error}, or choose another folder.") from error
    wanted = json.loads(json.dumps(settings))  # as they are stored: tuples are lists
    changed = [f"{name}: {stored.get(name)} -> {value}" for name, value in wanted.items() if stored.get(name) != value]
    if changed:
        raise RunError(
            f"{folder} holds figures of other settings:\n  " + "\n  ".join(changed) + "\nChoose another folder."
        )
    rows: Rows = {}
    for path in sorted(folder.glob(PROGRESS)):
        *whole, torn = path.read_bytes().split(b"\n")
        for place, line in enumerate(whole, 1):
            try:
                read = parse_json(line, dict[_Number, _Row], f"line {place} of {path}")
                rows |= {int(number): dict(row) for number, row in read.items()}
            except DataError as error:
                raise RunError(
                    f"{error}; delete that line, and its images are measured again, or choose another folder."
                ) from error
        if torn:  # else the next line would be appended to it
            write_text(path, "".join(f"{line.decode()}\n" for line in whole))
    return rows


def append(folder: Path, process_index: int, rows: Rows) -> None:
    """Append a process's rows as one line, so that an interrupted write loses that line only."""
    path = folder / PROGRESS.replace("*", f"{process_index:05d}")
    with path.open("a") as file:
        file.write(json.dumps(rows) + "\n")


def write_report(folder: Path, report: Report, rows: Rows) -> None:
    """Write the figures of each image, the curve, and the report.

    Args:
        folder: as `open_report` has left it.
        report: of the rows.
        rows: by the numbers of the images, in order.

    Raises:
        OSError: the folder can't be written.
    """
    codes, noises = report.settings["codes"], [figures.noise for figures in report.figures]
    names = [f"{name}, {noise.title}" for name in ("nats/dim", "bits/dim", "bits/dim, one draw") for noise in noises]
    with atomically(folder / TABLE) as partial, partial.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", *names[: len(noises) if codes else len(names)]])
        for number, row in rows.items():
            if "values" in row:
                parts = [part for part in row["values"] if part is not None]
                table.writerow([number, row["label"], *(value for part in parts for value in part)])
    gaussian = [figures for figures in report.figures if figures.noise.kind == "gaussian"]
    if sum(figures.nll.mean is not None for figures in gaussian) > 1:
        with atomically(folder / CURVE) as partial:
            _draw(gaussian, report, partial)
    write_json(folder / SUMMARY, {
        "settings": dict(report.settings),
        "versions": {"itarflow": __version__, "torch": torch.__version__},
        "images": report.images,
        "broken": list(report.broken),
        "results": [figures.to_json() for figures in report.figures],
    })  # fmt: skip


def _draw(figures: Sequence[Figures], report: Report, path: Path) -> None:
    """Nats/dim over the noise level, beside the entropy of the noise, below which they can't be."""
    known = [(one.noise.level or math.nan, one.nll) for one in sorted(figures, key=lambda one: one.noise.level or 0.0)]
    drawn = [(level, mean.mean, mean.standard_error or 0.0) for level, mean in known if mean.mean is not None]
    levels, means, errors = zip(*drawn, strict=True)
    figure = blank_figure(6.0, 4.0)
    axis = figure.subplots()
    axis.errorbar(levels, means, errors, marker="o", markersize=4, capsize=3, label="noisy images")
    fine = np.linspace(levels[0], levels[-1], 200)
    entropy = [Noise("gaussian", float(level)).entropy for level in fine]
    axis.plot(fine, entropy, "--", color="grey", linewidth=1, label="entropy of the noise alone: the least")
    axis.set_xlabel("noise level t")
    axis.set_ylabel("nats/dim")
    axis.set_title(
        f"{report.settings['checkpoint']}: {report.images:,} images of {report.settings['data']}", fontsize=10
    )
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, path, 110)
