"""The manifest of a data set that `prepare` or `encode_dataset` has made: its files, and what they depend on.

Training opens such a set only if its files are those of the manifest, which is cheap to see by their sizes and ends.
Whether their bytes are, too, the command that made them sees by their SHA-256 when it is run again.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from msgspec import Meta

from itarflow.data.codes import CARD, PREPARED, CodesCard, find_card, folder_of_cards
from itarflow.data.context import ContextCard
from itarflow.data.identity import DataIdentity
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import open_regular
from itarflow.runtime.json_file import parse_json, read_json
from itarflow.runtime.text import listed, printable

_KEY = b"itarflow"
_Count = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True)
class StoredFile:
    """One parquet file of the set.

    Attributes:
        name: of the file.
        split: that it belongs to.
        first: row of the source with which it begins.
        stop: and before which it ends.
        rows: images in it: as many, but for broken ones.
        num_bytes: its size.
        sha256: of its bytes.
    """

    name: str
    split: str
    first: _Count
    stop: _Count
    rows: _Count
    num_bytes: _Count
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the files depend on, and, once all are written, what they are.

    Attributes:
        itarflow: version that began the set.
        settings: of the command.
        source: what it was made of.
        shards: number of the files.
        finished: whether all of them are there.
        card: of codes.
        context: of captions.
        images: by split.
        broken: number of images that were left out, by split.
        files: () until all are written.
    """

    itarflow: str
    settings: dict[str, Any]
    source: DataIdentity
    shards: _Count
    finished: bool = False
    card: CodesCard | None = None
    context: ContextCard | None = None
    images: dict[str, _Count] = field(default_factory=dict)
    broken: dict[str, _Count] = field(default_factory=dict)
    files: tuple[StoredFile, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Footer:
    """What a parquet file says of itself, at its end.

    Attributes:
        made_by: SHA-256 of all that the set depends on: equal in all of its files.
        split: that it belongs to.
        first: row of the source with which it begins.
        stop: and before which it ends.
        broken: "name: reason" of each image that was left out.
        notes: what its writer had to say besides.
    """

    made_by: str
    split: str
    first: _Count
    stop: _Count
    broken: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def to_metadata(self) -> dict[bytes, str]:
        """For `ParquetWriter.add_key_value_metadata`."""
        return {_KEY: json.dumps(asdict(self))}


def read_footer(path: Path) -> tuple[Footer, int]:
    """What a parquet file of a made set says of itself, and its number of rows.

    Raises:
        DataError: it is damaged, or no file of a made set.
    """
    try:
        with open_regular(path) as file:
            metadata = pq.read_metadata(file)
        text = (metadata.metadata or {})[_KEY]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{printable(str(path))} is damaged, or not of this command; delete it, and run the command again"
        ) from error
    return parse_json(text, Footer, str(path)), metadata.num_rows


def check_made(path: str) -> None:
    """Refuse files of a prepared set, or of codes, that are not as its manifest says; others are not looked at.

    Args:
        path: as of `DataConfig.path`: a folder, a parquet file, or a glob, which stands for all files of the manifest
            that it matches. The digits and data sets on the Hub are no files.

    Raises:
        DataError: the set is unfinished; a file is missing, foreign, or another one; or the manifest is damaged.
    """
    place = Path(path).expanduser()
    if path == "digits" or not (place.exists() or glob.has_magic(path) or place.suffix == ".parquet"):
        return
    folder = place if place.is_dir() else place.parent
    manifest = next((folder / name for name in (PREPARED, CARD) if (folder / name).is_file()), None)
    if manifest is None:
        return
    stored = read_json(manifest, _Opened)
    if stored.finished is False or (stored.card is not None and not stored.card.finished):
        raise DataError(
            f"{printable(str(folder))} is not finished, as its {manifest.name} says: files are missing; run the "
            "command that began it again"
        )
    if not stored.files:  # of an earlier version, which did not list them
        return
    pattern = "*" if place.is_dir() else glob.escape(place.name) if place.exists() else place.name
    wanted = {file.name: file for file in stored.files if fnmatch(file.name, pattern)}
    found = {
        str(file.relative_to(folder)): file
        for file in (folder.rglob("*.parquet") if place.is_dir() else folder.glob(pattern))
        if not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    }
    if problems := list(_problems(found, wanted)):
        raise DataError(
            f"the files in {printable(str(folder))} are not those of its {manifest.name}: {listed(problems)}. Copy "
            "them again, or make the set again: delete the wrong ones, and run the command that made it"
        )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What opening a set needs of its manifest, which earlier versions wrote without the files."""

    finished: bool | None = None
    card: CodesCard | None = None
    files: tuple[StoredFile, ...] = ()


def _problems(found: Mapping[str, Path], wanted: Mapping[str, StoredFile]) -> Iterator[str]:
    """What is wrong with the files found, of those wanted, by name."""
    for name in sorted({*found, *wanted}):
        shown = printable(name)
        if name not in found:
            yield f"{shown} is missing"
        elif name not in wanted:
            yield f"{shown} does not belong there"
        elif (size := found[name].stat().st_size) != wanted[name].num_bytes:
            yield f"{shown} has {size:,} bytes, expected {wanted[name].num_bytes:,}"
        elif said := _not_as(wanted[name], found[name]):
            yield f"{shown} {said}"


def _not_as(wanted: StoredFile, path: Path) -> str | None:
    """How the end of a file belies what is stored of it."""
    try:
        footer, rows = read_footer(path)
    except DataError:
        return "is damaged"
    if (footer.split, footer.first, footer.stop, rows) == (wanted.split, wanted.first, wanted.stop, wanted.rows):
        return None
    return f"holds rows {footer.first:,} to {footer.stop:,} of {printable(footer.split)}: it is another one's copy"


def shape_of_made(path: str) -> tuple[int | None, int | None]:
    """(side, channels) of codes or prepared images; None where no card tells."""
    if codes := find_card(path):
        return codes.shape[1], codes.shape[0]
    folder = folder_of_cards(path)
    file = None if folder is None else folder / PREPARED
    settings = {} if file is None or not file.is_file() else read_json(file, Manifest).settings
    return settings.get("size"), settings.get("in_channels")
