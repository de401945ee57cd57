"""What the images of a table are, as a hash: the same wherever the files lie, another one when pictures are replaced.

Of all images the sizes in bytes count, and the names of those that are files of their own; of some of them, from all
over the table, the first bytes, too, as pictures without compression, and codes, are all of one size. Times of change
do not count: most ways to copy files to another machine change them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from itarflow.data.images import spread_over
from itarflow.data.parquet import ParquetRows
from itarflow.data.picture_file import OwnPlace
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import open_regular

_SAMPLE = 256  # images of which the first bytes count
_FIRST = 2**16  # so many of each
_THREADS, _CHUNK = 16, 1000  # that ask for sizes, each of so many files: elsewhere, it is all latency


def content_of(rows: datasets.Dataset | ParquetRows, columns: Sequence[str], place: OwnPlace | None = None) -> str:
    """SHA-256 of what these columns of a table hold, after what it is of, "rows:0a1b..."; no image is decoded.

    It is of the rows; or, if parquet files are read in place, of the "files"; or, if these are elsewhere, of what
    their server says of them, "remote". The same images have others of another kind.
    """
    digest = hashlib.sha256()
    if isinstance(rows, ParquetRows):
        for part in rows.contents():
            digest.update(part)
        return f"{'remote' if rows.remote else 'files'}:{digest.hexdigest()}"
    table = rows.select_columns(list(columns)).with_format("arrow")[:]
    for name in columns:
        for part in _parts_of(table[name], place):
            digest.update(part)
    return f"rows:{digest.hexdigest()}"


def paths_of(values: pa.ChunkedArray) -> Iterator[str]:
    """Paths of the images that are files of their own, of a column of images."""
    for chunk in values.chunks:
        outside = pc.is_null(pc.struct_field(chunk, "bytes"))
        yield from filter(None, pc.struct_field(chunk, "path").filter(outside).to_pylist())


def _parts_of(values: pa.ChunkedArray, place: OwnPlace | None) -> Iterator[bytes]:
    """Of a column: sizes, names and sizes of files, first bytes of some rows."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):  # captions: all of each
        texts = values.to_pylist()
        yield b"".join(b"%d:%b" % (len(text), text) for text in ((text or "").encode() for text in texts))
        return
    picture = pa.types.is_struct(values.type)
    fields = {field.name for field in values.type} if picture else set()
    for chunk in values.chunks:
        inner = pc.struct_field(chunk, "bytes") if picture else chunk
        yield pc.binary_length(inner).fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
    paths = list(paths_of(values)) if {"bytes", "path"} <= fields else []
    if place is not None:
        paths = [path if "://" in path else os.path.join(place.folders[0], path) for path in paths]
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(_sizes, (paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)))
    yield b"\n".join(os.fsencode(name) for name in _relative(paths))
    for row in spread_over(len(values), min(len(values), _SAMPLE)):
        value = values[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path") and place is not None:
            data = _first_bytes(value["path"], place)
        yield hashlib.sha256((data or b"")[:_FIRST]).digest()


def _relative(paths: Sequence[str]) -> Iterator[str]:
    """Paths without the folder that they share; of a file in an archive ("zip://a.png::/cache/x") its name there."""
    if any("::" in path and "://" in path for path in paths):
        paths = ["::".join(part if "://" in part else os.path.basename(part) for part in path.split("::"))
                 for path in paths]  # fmt: skip
    shared = os.path.commonprefix(paths).rfind(os.sep) + 1  # noqa: RUF071  (cut at a separator)
    return (path[shared:].replace(os.sep, "/") for path in paths)


def _sizes(paths: Sequence[str]) -> bytes:
    return np.array([_size(path) for path in paths], "<i8").tobytes()


def _size(path: str) -> int:
    """Bytes of a file; -1 if it is missing, or in an archive."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def _first_bytes(path: str, place: OwnPlace) -> bytes:
    try:
        with open_regular(Path(place.file(path))) as file:
            return file.read(_FIRST)
    except (OSError, ValueError, DataError):  # it will be named when it is read as a picture
        return b""
