"""Labels of the images of a data set, and the classes that its parts share.

A column states classes in one of three ways: numbers with names (`datasets.ClassLabel`), numbers that are counted from
0, or the names themselves as text.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from torch import Tensor

from itarflow.data.parquet import ParquetRows
from itarflow.runtime.errors import DataError
from itarflow.runtime.text import listed, printable

_MOST_CLASSES = 10**6
_LOOKED_AT = 10**6  # first rows that show whether values are classes


@dataclass(frozen=True)
class Labels:
    """Labels of the parts of a data set.

    Attributes:
        classes: by part (N,) int64 the class of each image, -1 = none.
        names: of the classes; () = unlabelled.
        order: by part (N,) int64 values that are equal for images of one class, even where these are no classes.
        refused: why the column does not give classes; "" = it does, or there is none.
    """

    classes: Mapping[str, Tensor]
    names: tuple[str, ...]
    order: Mapping[str, Tensor]
    refused: str = ""


def read_labels(tables: Mapping[str, datasets.Dataset | ParquetRows], column: str | None, *, wanted: bool) -> Labels:
    """Labels of the parts of a data set, whose classes are those of all of them together.

    Numbers that are no classes, but ids, and text that is no class, but says something else of each image, are
    refused if the column is wanted by name; else the images are unlabelled, with a warning.

    Args:
        tables: by what a message may call the part, such as "split 'train'".
        column: with labels; None = unlabelled.
        wanted: whether the column was named, not found.

    Raises:
        DataError: a label is not among the classes of its column, or classes of one part are unknown in the first.
    """
    if column is None:
        none = {part: torch.full((len(rows),), -1, dtype=torch.int64) for part, rows in tables.items()}
        return Labels(none, (), none)
    kinds = {part: _kind(part, rows, column) for part, rows in tables.items()}
    first, kind = next(iter(kinds.items()))
    for part, other in kinds.items():
        if other != kind:
            raise DataError(
                f"label_column {column!r} holds {other} in {part}, but {kind} in {first}; expected the same: write "
                "both alike, or open one only"
            )
    values = {part: column_values(rows, column) for part, rows in tables.items()}
    if kind == "names":
        return _named(tables, column, values)
    found = _texts(column, values) if kind == "text" else _numbers(tables, column, values)
    if found.refused and wanted:
        raise DataError(found.refused)
    if found.refused:
        warnings.warn(f"images are unlabelled: {found.refused}", stacklevel=3)
    return found


def _kind(part: str, rows: datasets.Dataset | ParquetRows, column: str) -> str:
    if column not in rows.features:
        names = printable(listed(map(str, rows.features), 20))
        raise DataError(f"{part} has no column {column!r} with labels, only [{names}]; expected it in all parts")
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return "names"
    return "text" if "string" in str(getattr(feature, "dtype", "")) else "numbers"


def column_values(rows: datasets.Dataset | ParquetRows, column: str) -> pa.ChunkedArray:
    """All values of a column, of which nothing else is read."""
    if isinstance(rows, ParquetRows):
        return rows.column(column)
    return rows.select_columns([column]).with_format("arrow")[:][column]


def _named(
    tables: Mapping[str, datasets.Dataset | ParquetRows], column: str, values: Mapping[str, pa.ChunkedArray]
) -> Labels:
    """Of numbers with names: those of the first part, others are found by their names."""
    names: dict[str, int] = {}
    classes = {}
    for part, rows in tables.items():
        own = rows.features[column].names or []
        numbers = _integers(values[part])
        wrong = np.flatnonzero((numbers < -1) | (numbers >= len(own)))
        if len(wrong):
            raise DataError(
                f"label_column {column!r} holds {numbers[wrong[0]]} in {_place(part, rows, int(wrong[0]))}, but its "
                f"ClassLabel has {len(own)} names (0 .. {len(own) - 1}); repair the labels, or the names"
            )
        if not names:
            names = {name: number for number, name in enumerate(own)}
            if len(names) < len(own):
                double = next(name for number, name in enumerate(own) if names[name] != number)
                raise DataError(f"label_column {column!r} of {part} has two classes {printable(double)!r}; rename one")
        used = np.unique(numbers[numbers >= 0])
        if unknown := [own[number] for number in used if own[number] not in names]:
            raise DataError(
                f"{part} has classes that {next(iter(tables))} doesn't know: {printable(listed(unknown))}; expected "
                "the same classes: name another split, or write both with the same ClassLabel names"
            )
        order = np.array([*(names.get(name, -1) for name in own), -1], np.int64)
        classes[part] = torch.from_numpy(order[numbers])
    return Labels(classes, tuple(names), classes)


def _numbers(
    tables: Mapping[str, datasets.Dataset | ParquetRows], column: str, values: Mapping[str, pa.ChunkedArray]
) -> Labels:
    """Of numbers: classes 0 to the largest, if they are classes."""
    order = {part: torch.from_numpy(_integers(value)) for part, value in values.items()}
    bounds = [pc.min_max(value) for value in values.values()]
    known = [bound for bound in bounds if bound["max"].as_py() is not None]
    if not known:
        return Labels(order, (), order)
    low, high = min(bound["min"].as_py() for bound in known), max(bound["max"].as_py() for bound in known)
    distinct, at_least = _distinct(values, low, high)
    if max(high, -low) >= min(100 * distinct + 1000, _MOST_CLASSES):
        refused = (
            f"label_column {column!r} holds {at_least}{distinct:,} different value{'s' if distinct > 1 else ''}, "
            f"{low} to {high} ({_place_of(high, tables, values)}), which are no classes 0, 1, ...: renumber them"
        )
        none = {part: torch.full_like(labels, -1) for part, labels in order.items()}
        return Labels(none, (), order, refused)
    if low < 0:
        raise DataError(
            f"label_column {column!r} holds {low} in {_place_of(low, tables, values)}; expected 0, 1, ...: renumber "
            "the classes"
        )
    return Labels(order, tuple(str(label) for label in range(high + 1)), order)


def _distinct(values: Mapping[str, pa.ChunkedArray], low: int, high: int) -> tuple[int, str]:
    """How many different values there are; of large ones, which are refused anyway, only of the first rows."""
    chunks = [chunk.drop_null().to_numpy(zero_copy_only=False) for part in values.values() for chunk in part.chunks]
    if max(high, -low) < _MOST_CLASSES:
        there = np.zeros(high - low + 1, bool)
        for chunk in chunks:
            there[chunk.astype(np.int64) - low] = True
        return int(there.sum()), ""
    together = np.concatenate([chunk[:_LOOKED_AT] for chunk in chunks])
    cut = sum(map(len, chunks)) > _LOOKED_AT
    return len(np.unique(together[:_LOOKED_AT])), "at least " if cut else ""


def _texts(column: str, values: Mapping[str, pa.ChunkedArray]) -> Labels:
    """Of text: each is a class of this name, in their order; "" is none."""
    none = {part: torch.full((len(value),), -1, dtype=torch.int64) for part, value in values.items()}
    first = next(iter(values.values())).slice(0, _LOOKED_AT)
    distinct = pc.count_distinct(first).as_py()
    if distinct > 1000 and 2 * distinct > len(first):
        refused = (
            f"label_column {column!r} holds {distinct:,} different texts in {len(first):,} images, which are no "
            "classes; write what is one into a column of its own"
        )
        return Labels(none, (), none, refused)
    names = sorted({text for part in values.values() for text in pc.unique(part).to_pylist()} - {None, ""})
    known = pa.array(names, pa.large_string())
    classes = {
        part: torch.from_numpy(_integers(pc.index_in(value.cast(pa.large_string()), known)))
        for part, value in values.items()
    }
    return Labels(classes, tuple(names), classes)


def _integers(values: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64; -1 where there is no value."""
    numbers = values.cast(pa.int64(), safe=False)  # of what exceeds it, the range was looked at before
    return np.array(numbers.fill_null(-1).to_numpy())


def _place_of(
    value: int, tables: Mapping[str, datasets.Dataset | ParquetRows], values: Mapping[str, pa.ChunkedArray]
) -> str:
    """Where a value is first."""
    for part, column in values.items():
        row = pc.index(column, pa.scalar(value, column.type)).as_py()
        if row >= 0:
            return _place(part, tables[part], row)
    raise ValueError(f"{value} is nowhere")


def _place(part: str, rows: datasets.Dataset | ParquetRows, row: int) -> str:
    return printable(rows.place(row)) if isinstance(rows, ParquetRows) else f"row {row} of {part}"
