"""The common config of data sets made of another one, and the manifest in their folder that records it.

A manifest has sections: the settings, and what the source was like. A later call goes on only with the same.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from itarflow.data.dataset import ImageDataset
from itarflow.data.identity import DataIdentity
from itarflow.data.images import Crop
from itarflow.data.load import DataConfig, load_splits
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import LOCK, PARTIAL
from itarflow.runtime.text import display_name


@dataclass(frozen=True)
class SourceConfig:
    """Which images to read, and where to write."""

    source: str
    """Where the images are: digits, a folder, parquet files, or a data set on the Hugging Face Hub."""
    out: Path
    """Folder to write: a new or empty one, or one that the same command has begun."""
    size: int
    """Height and width of the images in pixels: the model's image_size."""
    crop: Crop = "center"
    """How images become square, as by --data.crop in training; those of the right size stay as they are. FID depends
    on the choice.
    center = as torchvision and the papers' code do; adm = as for ADM's and EDM's ImageNet; edm = EDM's center-crop;
    pad = the whole image on white, such as of a product."""
    split: tuple[str, ...] = ("train",)
    """Splits to read, such as train test. They keep their names, and share their classes."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    image_column: str | None = None
    """Column with the images. None finds it; of several it takes image, img, pixel_values, jpg or png."""
    label_column: str | None = None
    """Column with the class labels. None finds it, if there is one."""

    def open(self, in_channels: int) -> tuple[dict[str, ImageDataset], DataIdentity]:
        """All images of each split, and what was understood of the set: `load.load_splits` of these settings.

        Args:
            in_channels: 3 for RGB, 1 for grey.

        Raises:
            DataError: they or the data cannot be used; the message says what to change.
        """
        data = DataConfig(
            path=self.source,
            name=self.name,
            image_column=self.image_column,
            label_column=self.label_column,
            crop=self.crop,
        )
        return load_splits(data, self.split, image_size=self.size, in_channels=in_channels)

    def settings(self, without: Sequence[str]) -> dict[str, Any]:
        """The values of all fields but these and `out`, as JSON has them; of a local source, only its name.

        They may go to the Hub, so they name no local folders.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("out", *without)}
        return values | {"source": display_name(self.source), "split": list(self.split)}


def check_settings(config: SourceConfig, lowest: Mapping[str, int]) -> None:
    """Refuse settings below their lowest values (None = unset), and splits that are not plain names, each once.

    Raises:
        DataError: naming the first that is wrong.
    """
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise DataError(f"{name} is {value}; expected {low} or more")
    if not config.split or len(set(config.split)) < len(config.split):
        raise DataError(f"split is {config.split}; expected names of splits, each once")
    for split in config.split:
        if not re.fullmatch(r"\w+", split):
            raise DataError(
                f"split {split!r} is no plain name such as train; name whole splits, and take parts of them in "
                "training, by data.split"
            )


def check_output_folder(config: SourceConfig, manifest: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse a folder with other things in it than a call with the same manifest has begun.

    Args:
        config: names the folder to write, and the source, in which it must not lie.
        manifest: the file in the folder that holds the manifest.
        wanted: sections of this call's manifest, or some of them. The version, "itarflow", may differ.

    Raises:
        DataError: saying what is there, or what differs.
    """
    out, source = config.out, config.source
    place = Path(source).expanduser()
    if place.is_dir() and source != "digits" and out.resolve().is_relative_to(place.resolve()):
        raise DataError(f"{out} lies in {source}, and would be taken for a part of it; choose another folder")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; expected a new folder: choose another name")
    if not manifest.exists():
        if out.exists() and any(not file.name.startswith((LOCK, PARTIAL)) for file in out.iterdir()):
            raise DataError(f"{out} is a folder with other things in it; choose a new or empty one")
        return
    try:
        stored = json.loads(manifest.read_text(encoding="utf-8"))
        # Earlier versions stored it as it was typed.
        stored["settings"]["source"] = display_name(stored["settings"]["source"])
        changes = [
            change for section, values in wanted.items() for change in _changes(section, stored[section], values)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} is damaged, or of another program; choose a new folder") from error
    if changes:
        raise DataError(
            f"{out} was begun with other settings, or the source has changed:\n  "
            + "\n  ".join(changes)
            + f"\nRun the command that began it, choose another folder, or delete {out} to begin anew."
        )


def _changes(section: str, stored: Any, wanted: Any) -> list[str]:
    """Lines that say what differs in a section of the manifest; its version may."""
    if stored == wanted or section == "itarflow":
        return []
    if isinstance(wanted, list):
        old, new = next(pair for pair in itertools.zip_longest(stored, wanted) if pair[0] != pair[1])
        return [f"{section}: {len(stored)} there, {len(wanted)} now; the first to differ is {old} there, {new} now"]
    if not isinstance(wanted, dict):
        return [f"{section}: {stored} there, {wanted} now"]
    title = "" if section == "settings" else f"{section} in "
    return [f"{title}{key}: {stored[key]} there, {value} now" for key, value in wanted.items() if stored[key] != value]
