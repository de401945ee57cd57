"""Samples and other arrays in .npz files, which may be anybody's.

Nothing is allocated before a file is known to hold it.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from itarflow.runtime.errors import DataError
from itarflow.runtime.files import open_regular
from itarflow.runtime.text import printable

_DEFLATE = 1032
"""Bytes that a compressed one may stand for, at most, by the format that .npz files are in."""


@dataclass(frozen=True)
class ArraySamples:
    """Images in an array (N, H, W, C)."""

    name: str
    array: np.ndarray
    labels: Tensor | None
    broken: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @classmethod
    def open(cls, path: Path) -> ArraySamples:
        """arr_0 holds the images, arr_1 their labels if it is there, as in ADM's files."""
        headers = array_headers(path)
        shape, dtype = headers.get("arr_0", ((), None))
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
            found = "no arr_0" if dtype is None else f"arr_0 of {dtype}, shape {shape}"
            raise DataError(f"{path} has {found}; expected arr_0 of uint8, shape (N, H, W, 3).")
        given = None
        if "arr_1" in headers:
            labels = headers["arr_1"]
            if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
                raise DataError(
                    f"{path} has arr_1 of {labels.dtype}, shape {labels.shape}; expected a label, a whole number, for "
                    f"each of the {shape[0]:,} images of arr_0, or no arr_1: write the file again."
                )
            given = torch.from_numpy(read_array(path, "arr_1").astype(np.int64))
        array = read_array(path, "arr_0")
        return cls(path.name, array, given)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """See `files.Samples`."""
        _, height, width, channels = self.array.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> Tensor:
        """See `files.Samples`."""
        return torch.from_numpy(np.ascontiguousarray(self.array[start:stop].transpose(0, 3, 1, 2)))


class Header(NamedTuple):
    """Of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def array_headers(path: Path) -> dict[str, Header]:
    """Shape and type of each array of an .npz file; the arrays, gigabytes perhaps, are not read.

    Raises:
        DataError: it is no .npz file, is damaged or shorter than it claims, or holds Python objects.
        OSError: it can't be opened.
    """
    try:
        with open_regular(path) as opened, zipfile.ZipFile(opened) as archive:
            return {one.filename.removesuffix(".npy"): _header(archive, one) for one in archive.infolist()}
    except DataError as error:
        raise DataError(f"{printable(str(path))} can't be read: {error}") from error
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def read_array(path: Path, name: str) -> np.ndarray:
    """An array whose header was read by `array_headers`; errors as there."""
    try:
        with open_regular(path) as opened, np.load(opened, allow_pickle=False) as file:
            array: np.ndarray = file[name]
            return array
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, SyntaxError, OverflowError, MemoryError,
           NotImplementedError, RuntimeError, RecursionError, TypeError)  # fmt: skip


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Header:
    with archive.open(entry) as file:
        first = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        begins = file.tell()
    if dtype.hasobject:
        raise DataError(f"{printable(entry.filename)} holds Python objects; expected numbers")
    wanted = math.prod(shape) * dtype.itemsize
    there = min(entry.file_size - begins, entry.compress_size * (1 if entry.compress_type == 0 else _DEFLATE))
    if min(shape, default=0) < 0 or wanted > there:
        raise DataError(
            f"{printable(entry.filename)} claims to be {dtype} of shape {shape}, more than the file holds; copy or "
            "download it again"
        )
    return Header(shape, dtype)


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = printable(str(error)) or type(error).__name__
    return DataError(f"{printable(str(path))} can't be read: it is no whole .npz file ({reason}). Copy or download it "
                     "again.")  # fmt: skip
