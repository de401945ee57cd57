"""Data sets larger than the disk: parquet files read row group by row group.

A row group is the smallest part of a parquet file that can be read alone: a hundred or a thousand images, as a rule.
"""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

import datasets
import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import track

from itarflow.data.context import CONTEXT
from itarflow.data.parquet_schema import check_class_names, stated_features
from itarflow.runtime.errors import DataError
from itarflow.runtime.text import printable

STREAMS = 8
"""At most so many places of a data set are read at a time; a divisor of the batch, so that processes share them."""

_LARGE_GROUP = 10**9  # bytes, from which on a warning says that memory may not suffice
_MOST_ROWS = 2**31  # of a row group, from which on its footer is taken for damaged
_BLOCKS, _BLOCK = 16, 2**12  # how much of the bytes of a file tell it from others of the same size
_MANY_FILES = 20  # from which on a progress bar is shown
_CONNECTIONS = 16  # files that are read at a time, before training: on the Hub, it is all latency

# Consecutive rows of a table that lie in one row group: rows first .. first + rows - 1 of the group_rows rows which
# its file has from row group_start on.
_Piece = np.dtype([(name, np.int64) for name in ("file", "group", "group_start", "group_rows", "first", "rows")])
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class DamagedRowError(DataError):
    """A row that cannot be read; the message is "file, row: reason"."""


class ParquetRows:
    """Table of parquet files, here or elsewhere, whose rows are read row group by row group.

    The row groups used last are kept, their images still encoded. No file stays open, and a pickle holds no rows.
    Made by `open_parquet`.
    """

    def __init__(self, files: Sequence[str], features: datasets.Features, pieces: np.ndarray) -> None:
        self._files, self._features, self._pieces = tuple(files), features, pieces
        self._ends = np.cumsum(pieces["rows"])
        self._kept_rows = 0
        self._groups: OrderedDict[tuple[str, int], pa.Table | str] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_groups": OrderedDict()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` in 0..N-1: its values by column, bytes as {"bytes": ..., "path": None}.

        Raises:
            IndexError: the index is out of range.
            DamagedRowError: the row group cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table with {len(self)} rows")
        piece, row = self._find(index)
        file = self._files[piece["file"]]
        group = self._group(file, int(piece["group"]))
        if isinstance(group, str):
            raise DamagedRowError(f"{self.place(index)}: {group}")
        values = {name: group[name][row].as_py() for name in self._features}
        return {
            name: {"bytes": value, "path": None} if isinstance(value, bytes) else value
            for name, value in values.items()
        }

    def place(self, index: int) -> str:
        """Of row `index` the file, and which row it is there."""
        piece, row = self._find(index)
        return f"{self._files[piece['file']]}, row {piece['group_start'] + row}"

    def _find(self, index: int) -> tuple[Any, int]:
        """The piece that a row lies in, and which row of its row group it is."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        piece = self._pieces[number]
        return piece, int(piece["first"] + piece["rows"] + index - self._ends[number])

    @property
    def features(self) -> datasets.Features:
        """The columns and their types."""
        return self._features

    @property
    def remote(self) -> bool:
        """Whether files are elsewhere, at addresses."""
        return any("://" in file for file in self._files)

    @property
    def group_starts(self) -> np.ndarray:
        """(G + 1,) int64: the row at which each row group begins, and the number of all rows."""
        return np.concatenate([[0], self._ends])

    @property
    def largest_group(self) -> int:
        """Rows of the largest row group."""
        return int(self._pieces["group_rows"].max(initial=0))

    @property
    def resident(self) -> tuple[int, int]:
        """How many row groups are in memory now, and how many rows they have."""
        tables = [group for group in self._groups.values() if isinstance(group, pa.Table)]
        return len(tables), sum(table.num_rows for table in tables)

    def states(self) -> Iterator[str]:
        """Of each file its address, size and time of change, or ETag; then the rows: equal as long as all is."""
        for file in self._files:
            system, path = fsspec.core.url_to_fs(file)
            info = system.info(path)
            yield f"{file} {[info.get(key) for key in ('size', 'mtime', 'blob_id', 'ETag')]}\n"
        yield f"{self._pieces.tolist()}\n"

    def contents(self) -> list[bytes]:
        """What the rows are, wherever their files lie: of each file its size, its footer, which says where all lies,
        and some of its bytes, or of those elsewhere what their server says of their content; then the rows.

        Raises:
            DataError: a file is not there any more; the message names it.
        """
        parts = _in_parallel(_content, self._files, f"looking at {len(self._files):,} parquet files")
        return [*parts, f"{self._pieces.tolist()}\n".encode()]

    def select(self, rows: range) -> ParquetRows:
        """The consecutive rows start..stop-1 of this table."""
        ends, pieces = self._ends, self._pieces.copy()
        begins = ends - pieces["rows"]
        first, stop = np.clip(begins, rows.start, rows.stop), np.clip(ends, rows.start, rows.stop)
        pieces["first"] += first - begins
        pieces["rows"] = stop - first
        return ParquetRows(self._files, self._features, pieces[stop > first])

    def select_columns(self, names: Sequence[str]) -> ParquetRows:
        """The same rows with these columns only; others are not read."""
        features = datasets.Features({name: self._features[name] for name in names})
        return ParquetRows(self._files, features, self._pieces)

    def keeping(self, rows: int) -> ParquetRows:
        """The same table, which keeps the row groups used last while they have at most this many rows in all.

        Without, and if a single one has more, it is one row group.
        """
        result = copy.copy(self)
        result._kept_rows, result._groups = rows, OrderedDict()
        return result

    def column(self, name: str) -> pa.ChunkedArray:
        """All values of one column; of other columns nothing is read.

        Raises:
            DataError: a file cannot be read; the message names it.
        """
        kind = self._features.arrow_schema.field(name).type

        def read(pieces: np.ndarray) -> pa.ChunkedArray:
            file = self._files[pieces["file"][0]]
            try:
                with _open(file) as stream:
                    parquet = pq.ParquetFile(stream)
                    tables = [
                        parquet.read_row_group(int(piece["group"]), [name], use_threads=False).slice(
                            int(piece["first"]), int(piece["rows"])
                        )
                        for piece in pieces
                    ]
                found = pa.concat_tables(tables)[name].cast(kind)
                if len(found) != pieces["rows"].sum():
                    raise ValueError(f"it has {len(found)} rows, but its footer says {pieces['rows'].sum()}")
                return found
            except Exception as error:  # file systems elsewhere have no common kind
                raise DataError(f"column {name!r} of {file!r} cannot be read: {_reason(error)}. Replace it") from error

        by_file = np.split(self._pieces, np.flatnonzero(np.diff(self._pieces["file"])) + 1)
        arrays = _in_parallel(read, by_file, f"reading {name!r} of {len(by_file):,} parquet files")
        return pa.chunked_array([chunk for array in arrays for chunk in array.chunks], kind)

    def _group(self, file: str, number: int) -> pa.Table | str:
        """A row group, or the reason why it can't be read."""
        key = (file, number)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        try:
            with _open(file) as stream:
                # Equal vectors of captions are held once; of codes and images, none are equal.
                once = [name for name in self._features if name == CONTEXT]
                parquet = pq.ParquetFile(stream, page_checksum_verification=True, read_dictionary=once)
                group: pa.Table | str = parquet.read_row_group(number, list(self._features), use_threads=False)
        # Damage and file systems make for nearly any exception. Nothing is hidden: the reason is reported.
        except Exception as error:
            group = _reason(error)
        self._groups[key] = group
        while len(self._groups) > 1 and self.resident[1] > self._kept_rows:
            self._groups.popitem(last=False)
        return group


def open_parquet(files: Sequence[str], features: datasets.Features | None = None) -> ParquetRows:
    """Table of all rows of parquet files, in their order. Only the ends of the files are read.

    Args:
        files: paths, or addresses that fsspec knows, such as hf://datasets/owner/name/train.parquet.
        features: types of the columns; None takes those that the first file states.

    Raises:
        DataError: a file is damaged, cut short, or has other columns or names of classes; the message names it.
    """

    def read(file: str) -> tuple[pa.Schema, list[int], int]:
        try:
            with _open(file) as stream:
                parquet = pq.ParquetFile(stream)
                metadata = parquet.metadata
                groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
                largest = max((group.total_byte_size for group in groups), default=0)
                if not all(0 <= group.num_rows < _MOST_ROWS for group in groups):
                    raise ValueError(f"row groups of {[group.num_rows for group in groups]} rows")
                return parquet.schema_arrow, [group.num_rows for group in groups], largest
        except Exception as error:  # file systems elsewhere have no common kind
            raise DataError(f"{file!r} is not a readable parquet file: {_reason(error)}. Replace it") from error

    ends = _in_parallel(read, files, f"reading the ends of {len(files):,} parquet files")
    check_class_names({file: schema for file, (schema, _, _) in zip(files, ends, strict=True)})
    features = features or stated_features(ends[0][0], files[0])
    for file, (schema, _, size) in zip(files, ends, strict=True):
        if missing := [name for name in features if name not in schema.names]:
            raise DataError(f"{file!r} has no column {missing[0]!r}, only {schema.names}: leave this file out")
        if size > _LARGE_GROUP:
            warnings.warn(
                f"{file!r} has row groups of up to {size / 1e9:.1f} GB, and up to {2 * STREAMS} of them are in memory "
                "at a time; write the files with row groups of some hundred images if that is too much",
                stacklevel=2,
            )
    pieces = [
        (number, group, stop - rows, rows, 0, rows)
        for number, (_, groups, _) in enumerate(ends)
        for group, (rows, stop) in enumerate(zip(groups, itertools.accumulate(groups), strict=True))
        if rows > 0
    ]
    return ParquetRows(files, features, np.array(pieces, dtype=_Piece))


def concatenate(tables: Sequence[ParquetRows]) -> ParquetRows:
    """One table with the rows of several, in their order.

    Raises:
        DataError: their columns differ.
    """
    for table in tables:
        if table.features != tables[0].features:
            raise DataError(f"parts of a split differ in their columns: {tables[0].features} and {table.features}")
    files: list[str] = []
    pieces = []
    for table in tables:
        moved = table._pieces.copy()
        moved["file"] += len(files)
        pieces.append(moved)
        files += table._files
    return ParquetRows(files, tables[0].features, np.concatenate(pieces))


def _open(file: str) -> IO[bytes]:
    if "://" not in file:
        return open(file, "rb")
    system, path = fsspec.core.url_to_fs(file)
    # Uncached: what is read of a file lies far apart, and reading ahead would fetch the images along with the labels.
    return system.open(path, "rb", cache_type="none")


def _content(file: str) -> bytes:
    try:
        if "://" in file:
            system, path = fsspec.core.url_to_fs(file)
            info = system.info(path)
            return f"{[info.get(key) for key in ('size', 'blob_id', 'ETag')]}\n".encode()
        with _open(file) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(size - 8, 0))
            footer = 8 + int.from_bytes(stream.read(4), "little")
            blocks = [(place * size // _BLOCKS, _BLOCK) for place in range(_BLOCKS)]
            found = [f"{size}\n".encode()]
            for start, length in (*blocks, (max(size - footer, 0), footer)):
                stream.seek(start)
                found.append(stream.read(length))
        return b"".join(found)
    except Exception as error:  # file systems elsewhere have no common kind
        raise DataError(f"{printable(file)!r} cannot be read: {_reason(error)}. Replace it") from error


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    return printable(" ".join(str(error).split()).rstrip(". ")) or type(error).__name__


def _in_parallel(read: Callable[[_Item], _Result], items: Iterable[_Item], title: str) -> list[_Result]:
    """Results in the order of the items; with a bar, one a machine, if there are many."""
    items = list(items)
    silent = len(items) < _MANY_FILES or os.environ.get("LOCAL_RANK", "0") != "0"
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        results = pool.map(read, items)
        return list(track(results, title, total=len(items), console=Console(stderr=True), disable=silent))
