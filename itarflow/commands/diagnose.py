"""`itarflow diagnose`: which samples fail, how often, and where their blur begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.commands.class_labels import check_seed
from itarflow.commands.console import say
from itarflow.data.images import Crop
from itarflow.data.load import DataConfig, load_data
from itarflow.evaluation.diagnosis.diagnose import FEW_IN_COMMON, Diagnosis, diagnose
from itarflow.evaluation.diagnosis.failures import Onset
from itarflow.evaluation.diagnosis.rates import KINDS, Difference, Rate, RealImages
from itarflow.evaluation.metrics.extractors import load_extractor
from itarflow.evaluation.samples.files import open_samples
from itarflow.runtime.devices import usable_device
from itarflow.runtime.files import check_writable


@dataclass(frozen=True)
class Diagnose:
    """Find collapsed backgrounds and blur in samples, by measures that are compared with real images.

    Example: itarflow diagnose runs/cifar10/evaluation/iterative --reference cifar10 --output diagnosis

    An image fails if it has a darker background, less contrast in it, or somewhere less fine detail than nearly all
    real images have: 99 of 100, unless --nominal-rate says otherwise. Blur is found if it fills a window of half the
    image's side; residual noise hides it. Other real images are measured by the same thresholds;
    the excess over their rate is the model's failure. Name several sets, such as of a model with and one without
    --model.learned-first-token, to see them side by side, with the differences to the first.
    """

    samples: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SAMPLES")]
    """A denoising variant's folder of `itarflow evaluate`, folders of images, or .npz files; all of one size. Come
    first."""
    reference: Annotated[str, tyro.conf.arg(aliases=["--data"])]
    """A data set of real images, as --data.path in training; no file of statistics, as `itarflow evaluate` takes."""
    output: Path = Path("diagnosis")
    """Folder for report.json; failures.json, the numbers of the failed images; the worst images of each kind; and
    detail.png, detail along the tokens."""
    split: str = "train"
    """Split of the real images."""
    crop: Crop = "center"
    """How real images become square, as in training."""
    image_column: str | None = None
    """Column with the real images. None finds it."""
    reference_images: int = 10_000
    """How many real images are measured, at most: evenly from all of them."""
    nominal_rate: float = 0.01
    """Share of real images that each measure counts as failed."""
    patch_size: int | None = None
    """Side in pixels of the cells in which detail is compared: that of the flow's patches, for its tokens. None = at
    most 8 x 8 cells."""
    extractor: str | None = None
    """Also give the Fréchet distance to the real images with and without those that fail, by the features of this
    network: inception-v3-compat for FID, or another one that `itarflow evaluate` knows. None = leave it out."""
    features: Path | None = None
    """Local file with the extractor's weights. None = those of its package, which may be downloaded."""
    worst: int = 24
    """Failed images in each contact sheet, at most."""
    batch_size: int = 64
    """Images that are read and measured at a time."""
    seed: int = 0
    """Draws as many samples as do not fail, for --extractor."""
    device: str | None = None
    """Where the extractor computes, such as cuda or cpu. None = a GPU if there is one."""

    def run(self) -> None:
        """Carry the command out."""
        check_seed(self.seed)
        check_writable(self.output)
        if not self.samples:
            raise ValueError("no samples are named; expected folders such as runs/NAME/evaluation/iterative.")
        if self.reference_images < 1:
            raise ValueError(f"--reference-images is {self.reference_images}; expected a number >= 1.")
        names = telling_names(self.samples)
        samples = {name: open_samples(path) for name, path in zip(names, self.samples, strict=True)}
        channels, _, width = next(iter(samples.values())).image_shape
        config = DataConfig(
            path=self.reference, split=self.split, held_out_images=0, crop=self.crop, image_column=self.image_column
        )
        real = load_data(config, image_size=width, in_channels=channels).train
        extractor = None
        if self.extractor is not None:
            extractor = load_extractor(self.extractor, self.features, usable_device(self.device))
        diagnosis = diagnose(
            samples,
            RealImages(self.reference, real, self.reference_images),
            output=self.output,
            nominal_rate=self.nominal_rate,
            patch_size=self.patch_size,
            extractor=extractor,
            worst=self.worst,
            batch_size=self.batch_size,
            seed=self.seed,
            console=Console(stderr=True),
        )
        console = Console()
        console.print(_diagnosis_table(diagnosis))
        for note in diagnosis.notes:
            console.print(f"[yellow]Note:[/] {escape(note)}.", soft_wrap=True, highlight=False)
        for line in _lines(diagnosis):
            say(line)
        say(f"figures, numbers of the failed images, contact sheets and the diagram in {self.output}/")


def telling_names(paths: Sequence[Path]) -> list[str]:
    """A name for each path, fit for a folder: what its parts have that the others' lack, or its last part.

    a/evaluation/iterative and b/evaluation/iterative are "a" and "b".

    Raises:
        ValueError: a path is named twice.
    """
    split = [path.absolute().parts for path in paths]
    if len(set(split)) < len(split):
        twice = next(path for path in paths if split.count(path.absolute().parts) > 1)
        raise ValueError(f"{twice} is named twice; name each set of samples once.")
    shared = set.intersection(*(set(parts) for parts in split))
    telling = ["-".join(part for part in parts if part not in shared) or parts[-1] for parts in split]
    names = [re.sub(r"[^\w.-]+", "-", name).strip("-.") or "samples" for name in telling]
    return [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names, 1)]


_TITLES = {
    "black": "black background",
    "flat": "flat background",
    "blurred": "blurred",
    "collapsed": "black or flat",
    "any": "any of these",
}
"""Of kinds of failures."""


def _tested(diagnosis: Diagnosis) -> list[str]:
    """The kinds of failures that some measure can detect."""
    return [kind for kind, parts in KINDS.items() if any(diagnosis.measures[part]["threshold"] for part in parts)]


def _diagnosis_table(diagnosis: Diagnosis) -> Table:
    """A section for each set, a row for each kind of failure."""
    table = Table(title="Images that fail", title_justify="left")
    for title in ("", "share", "95 %", "over real", "95 %"):
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title))
    real = diagnosis.reference["failures"]
    table.add_row(f"[bold]real images[/] ({real['any'].total:,})")
    for kind in _tested(diagnosis):
        table.add_row(_TITLES[kind], *_rate(real[kind]))
    for name, findings in diagnosis.samples.items():
        table.add_section()
        table.add_row(f"[bold]{escape(name)}[/] ({findings.images:,})")
        table.add_row("not finite", *_rate(findings.broken))
        for kind in _tested(diagnosis):
            failure = findings.failures[kind]
            table.add_row(_TITLES[kind], *_rate(failure.rate), *_difference(failure.excess))
    return table


def _lines(diagnosis: Diagnosis) -> list[str]:
    """What the table does not hold."""
    lines = [
        f"{_TITLES[name]}: {part['title']} below {part['threshold']:.3g}; {part['meaning']}."
        for name, part in diagnosis.measures.items()
        if part["threshold"] is not None
    ]
    for name, findings in diagnosis.samples.items():
        seen, blurred = findings.images - findings.broken.count, findings.failures["blurred"].rate.count
        for whose, count, onset in (
            ("all images", seen, findings.onset),
            ("the blurred images", blurred, findings.onset_of_blurred),
        ):
            if count >= FEW_IN_COMMON:  # fewer tell nothing
                lines.append(f"{name}: {_onset(whose, onset)}.")
        if (apart := findings.distances) is not None:
            lines.append(
                f"{name}: {apart.title} {apart.distance:.2f} of {apart.images:,} images; {apart.without:.2f} of the "
                f"{apart.kept:,} that do not fail, {apart.as_many:.2f} of as many drawn at random. Only distances of "
                f"as many images compare."
            )
    if unreadable := diagnosis.reference["unreadable"]:
        named = "; ".join(unreadable[:3])
        lines.append(
            f"Unreadable real images, left out: {len(unreadable):,}, such as {named}. All are in report.json."
        )
    first = next(iter(diagnosis.samples))
    for name, kinds in diagnosis.differences.items():
        parts = (f"{_TITLES[kind]} {' '.join(_difference(kinds[kind]))}" for kind in _tested(diagnosis))
        lines.append(f"{name} less {first}: {'; '.join(parts)}.")
    return [*lines, "Intervals are of 95 % confidence: Wilson's of shares, Newcombe's of their differences."]


def _rate(value: Rate) -> tuple[str, str]:
    return f"{100 * value.value:.1f} %", f"({100 * value.low:.1f} to {100 * value.high:.1f})"


def _difference(value: Difference) -> tuple[str, str]:
    return f"{100 * value.value:+.1f} %", f"({100 * value.low:+.1f} to {100 * value.high:+.1f})"


def _onset(whose: str, onset: Onset | None) -> str:
    if onset is None:
        return f"no token was found from which on, or up to which, {whose} have blur in common"
    where = f"from token {onset.token} on" if onset.order == "raster" else f"up to token {onset.token}"
    return (
        f"{whose} have blur in common {where}: {onset.blurred:.2g} times the fine energy of real images, elsewhere "
        f"{onset.others:.2g} times"
    )
