"""Files that describe the pictures of a folder: metadata.csv, .jsonl or .parquet, and dataset.json of EDM's tools."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
import msgspec
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.csv as csv  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from itarflow.data.folders import LABELS, Listing, Parts, counted
from itarflow.data.parquet_schema import stated_features
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import open_regular
from itarflow.runtime.json_file import as_type, parse_json, read_bytes, read_json
from itarflow.runtime.text import listed, printable

_Label = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_LARGEST = 2**30  # bytes of a description
_NAME = "file_name"


@dataclass(frozen=True)
class Described:
    """Pictures that descriptions list, in their order, and what these say of them.

    Attributes:
        files: each picture once, relative to the folder that was listed.
        columns: a row for each.
        notes: what was left out, as sentences.
    """

    files: Sequence[Parts]
    columns: pa.Table
    notes: tuple[str, ...] = ()


def descriptions_of(listing: Listing, root: Parts) -> list[Parts]:
    """Descriptions that may speak of pictures below `root`: those below it and those above it, nearest first."""
    near = [file for file in listing.descriptions if file[:-1][: len(root)] == root[: len(file) - 1]]
    return sorted(near, key=lambda file: (-len(file), file))


def describe(listing: Listing, root: Parts, descriptions: Sequence[Parts]) -> Described | None:
    """What the descriptions say of the pictures below `root`; None if they name none of them.

    Raises:
        DataError: a description is damaged, or two of them don't agree in the types of their columns.
    """
    there = {
        _key("/".join((*home, name))): (*home, name)
        for home, names in listing.pictures.items()
        if home[: len(root)] == root
        for name in names
    }
    files: dict[Parts, None] = {}
    tables, notes = list[pa.Table](), list[str]()
    for description in descriptions:
        names, table = _read(listing, description)
        kept, absent, again = list[int](), list[str](), list[str]()
        for number, name in enumerate(names):
            place = posixpath.normpath(posixpath.join(*description[:-1], name))
            file = there.get(_key(place)) or there.get(_key(place.replace("\\", "/")))
            if file is None:
                if tuple(place.split("/"))[: len(root)] == root:  # else it is of another split
                    absent.append(place)
            elif file in files:
                again.append(place)
            else:
                files[file] = None
                kept.append(number)
        tables.append(table.take(pa.array(kept, pa.int64())))
        show = listing.show(description)
        for entries, kind in ((absent, "without a picture"), (again, "that describe a picture again")):
            if entries:
                notes.append(counted(len(entries), "line", f"of {show} {kind}", printable(entries[0])))
    if not files:
        return None
    shown = " and ".join(map(listing.show, descriptions))
    if missing := [file for file in there.values() if file not in files]:
        notes.append(
            counted(
                len(missing), "picture", f"of {len(there):,} that {shown} says nothing of", listing.show(missing[0])
            )
        )
    try:
        columns = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"columns of {shown} don't agree: {printable(str(error))}; write them alike") from error
    if other := [field.name for field in columns.schema if not _is_plain(field.type)]:
        notes.append(f"columns of {shown} without texts or numbers: {printable(listed(other))}")
    return Described(list(files), columns.drop_columns(other), tuple(notes))


def edm_labels(file: Path) -> list[tuple[str, int]] | None:
    """Labels of EDM's dataset.json by file name; None if it says that there are none.

    Raises:
        DataError: it can't be read, is damaged, or its labels are no whole numbers from 0 on.
    """
    try:
        values = read_json(file, dict[str, Any], limit=_LARGEST)
    except OSError as error:
        raise DataError(f"{str(file)!r} can't be read: {error.strerror}; repair or remove it") from error
    if "labels" not in values:
        raise DataError(
            f'{printable(str(file))} has no "labels", as the dataset tools of StyleGAN and EDM write them; '
            "rename the file if it is another one"
        )
    return as_type(values["labels"], list[tuple[str, _Label]] | None, f"{file}: labels")  # type: ignore[arg-type]


def _read(listing: Listing, description: Parts) -> tuple[list[str], pa.Table]:
    """The names of the pictures that a description lists, and its other columns."""
    file = Path(listing.root, *description)
    if description[-1] == LABELS:
        pairs = edm_labels(file) or []
        return [name for name, _ in pairs], pa.table({"label": pa.array([label for _, label in pairs], pa.int64())})
    try:
        table = _read_table(file)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{printable(str(file))} can't be read: {printable(str(error))}; repair or remove it"
        ) from error
    columns = table.column_names
    if columns.count(_NAME) != 1 or len(set(columns)) < len(columns):
        raise DataError(
            f"{printable(str(file))} has the columns {printable(', '.join(columns))}; expected one {_NAME} with the "
            "pictures' names, relative to its folder, and others of different names: repair or remove it"
        )
    names = table[_NAME].to_pylist()
    if wrong := [number for number, name in enumerate(names) if not isinstance(name, str)]:
        raise DataError(f"{printable(str(file))}: {_NAME} {names[wrong[0]]!r} in row {wrong[0]} is no text; repair it")
    return names, table.select([name for name in columns if name not in (_NAME, "image")])


def _read_table(file: Path) -> pa.Table:
    if file.suffix == ".jsonl":
        lines = read_bytes(file, _LARGEST).splitlines()
        rows = [
            parse_json(line, dict[str, Any], f"{file}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        return pa.Table.from_pylist(rows, _schema(rows))
    with open_regular(file) as stream:
        if file.suffix == ".parquet":
            return _named_classes(pq.read_table(stream), str(file))
        text = csv.ConvertOptions(column_types={_NAME: pa.string()})
        return csv.read_csv(stream, convert_options=text, parse_options=csv.ParseOptions(newlines_in_values=True))


def _named_classes(table: pa.Table, file: str) -> pa.Table:
    """The table with names in place of the numbers of classes, where its schema states them."""
    for index, (name, feature) in enumerate(stated_features(table.schema, file).items()):
        if isinstance(feature, datasets.ClassLabel):
            values = table[name].to_pylist()
            if wrong := [value for value in values if value is not None and not -1 <= value < feature.num_classes]:
                raise DataError(
                    f"{printable(file)}: column {name!r} holds {wrong[0]} of {feature.num_classes} classes"
                )
            names = [feature.names[value] if value not in (None, -1) else None for value in values]
            table = table.set_column(index, name, pa.array(names, pa.string()))
    return table.replace_schema_metadata(None)


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        check(kind)
        for check in (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    )


def _schema(rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """Types of all fields, as the first row may lack some."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])


def _key(place: str) -> str:
    """A path as it is compared: the same letters may be stored composed or not."""
    return unicodedata.normalize("NFC", place)


def class_folder(name: str) -> str:
    """The class that a folder's name means: composed letters, so that one class is not two."""
    return unicodedata.normalize("NFC", os.fspath(name))
