"""The common config of data sets made of another one, and the manifest in their folder that records it.

A later call goes on only with the same settings, and only if the source is what it was.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from itarflow.data.codes import find_card
from itarflow.data.identity import DataIdentity, described
from itarflow.data.images import Crop
from itarflow.data.load import DataConfig, Splits, load_splits
from itarflow.data.made import Manifest
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import LOCK, PARTIAL, remove_partial
from itarflow.runtime.json_file import as_type, read_json
from itarflow.runtime.text import display_name, human_bytes, printable

TRIAL = ".itarflow-"
"""Prefix of what `files.check_writable` makes to see whether it can, and leaves if it is killed meanwhile."""


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
    captions: str | None = None
    """Store captions beside the images, for flows that take text: a column of texts, also of a metadata file beside
    pictures; or a template with {} for the name of the class, such as "a photo of a {}"."""
    empty_captions: bool = False
    """Take the empty caption, which stands for no condition, where a caption is missing, instead of refusing."""
    text_encoder: str = "google/flan-t5-xl"
    """What makes vectors of the captions: a T5 of transformers, in a folder or on the Hub."""
    text_encoder_revision: str | None = None
    """Branch, tag or commit of a text encoder on the Hub."""
    context_tokens: int = 128
    """Tokens of a caption, at most: the model's context_tokens. Longer ones are cut."""

    def open(self, in_channels: int) -> Splits:
        """All images of each split, and what was understood of the set: `load.load_splits` of these settings.

        Args:
            in_channels: 3 for RGB, 1 for grey.

        Raises:
            DataError: they or the data cannot be used; the message says what to change.
        """
        if find_card(self.source) is not None:
            raise DataError(f"{self.source} holds codes already; expected images: name the source that they are of")
        data = DataConfig(
            path=self.source,
            name=self.name,
            image_column=self.image_column,
            label_column=self.label_column,
            crop=self.crop,
        )
        return load_splits(
            data,
            self.split,
            image_size=self.size,
            in_channels=in_channels,
            captions=self.captions,
            empty_captions=self.empty_captions,
        )

    def settings(self, without: Sequence[str]) -> dict[str, Any]:
        """The values of all fields but these, `out`, and the text encoder, which has a card of its own, as JSON has
        them; of a local source, only its name.

        They may go to the Hub, so they name no local folders.
        """
        without = ("out", "text_encoder", "text_encoder_revision", *without)
        if self.captions is None:
            without = (*without, *_OF_CAPTIONS)
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in without}
        return values | {"source": display_name(self.source), "split": list(self.split)}


_OF_CAPTIONS = ("captions", "empty_captions", "context_tokens")


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


def say_understood(console: Console | None, source: DataIdentity) -> None:
    """Print what was understood of a source; None = nowhere."""
    if console is not None:
        console.print("\n".join(described(source)), markup=False, highlight=False, soft_wrap=True)


def stored_manifest(config: SourceConfig, name: str) -> Manifest | None:
    """The manifest of the folder to write; None if there is none yet.

    Args:
        config: names the folder, and the source, in which it must not lie.
        name: of the file with the manifest.

    Raises:
        DataError: the folder has other things in it, or the manifest is damaged, or of an earlier version.
    """
    out, source = config.out, config.source
    place = Path(source).expanduser()
    if place.is_dir() and source != "digits" and out.resolve().is_relative_to(place.resolve()):
        what = "is" if out.resolve() == place.resolve() else "lies in"
        raise DataError(f"{out} {what} {source}, and would be taken for a part of it; choose another folder")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; expected a new folder: choose another name")
    if (out / name).exists():
        values = read_json(out / name, dict[str, Any])
        if "source" not in values and {"itarflow", "settings"} <= values.keys():
            raise DataError(
                f"{out} was made by an earlier version, which this one can't go on with: if it is finished, train on "
                "it as it is, or choose another folder"
            )
        return as_type(values, Manifest, str(out / name))
    if out.exists() and any(not file.name.startswith((LOCK, PARTIAL, TRIAL)) for file in out.iterdir()):
        raise DataError(f"{out} is a folder with other things in it; choose a new or empty one")
    return None


def check_settings_there(out: Path, stored: Manifest | None, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a folder was begun with.

    Raises:
        DataError: saying what differs.
    """
    if stored is not None:
        there = stored.settings
        changes = [
            printable(f"{key}: {there.get(key)} there, {settings.get(key)} now")
            for key in {**settings, **{key: None for key in there if key in _OF_CAPTIONS}}
            if key not in there or key not in settings or there[key] != settings[key]
        ]
        refuse_changes(out, "other settings", changes)


def check_source_there(out: Path, stored: Manifest | None, wanted: Manifest) -> None:
    """Refuse to go on if the source has changed since a folder was begun.

    Raises:
        DataError: saying what differs.
    """
    if stored is not None:
        changes = stored.source.differences(wanted.source)
        if not changes and stored.shards != wanted.shards:
            changes = [f"shards: {stored.shards} there, {wanted.shards} now"]
        refuse_changes(out, "another source, or the source has changed", changes)


def refuse_changes(out: Path, what: str, changes: Sequence[str]) -> None:
    """Refuse to go on with a folder if there are changes; `what` it was begun with."""
    if changes:
        raise DataError(
            f"{out} was begun with {what}:\n  "
            + "\n  ".join(changes)
            + f"\nRun the command that began it, choose another folder, or delete {out} to begin anew."
        )


def check_room(out: Path, needed: float, what: str, advice: str = "") -> None:
    """Refuse to begin if the disk has less room than is needed.

    Args:
        out: the folder to write.
        needed: bytes.
        what: they are for, such as "the codes of 10 images".
        advice: what else would help.

    Raises:
        OSError: saying how much is missing.
    """
    existing = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"{what} need {human_bytes(needed)}, but only {human_bytes(free)} are free in {existing}; make room, "
            f"choose another folder{advice}."
        )


def clear_leftovers(out: Path) -> None:
    """Remove what killed calls have left of files that they were writing, or of their trial whether they may."""
    remove_partial(out)
    for left in out.glob(f"{TRIAL}*"):
        with suppress(OSError):  # a folder with something in it is somebody's
            left.rmdir() if left.is_dir() else left.unlink()
