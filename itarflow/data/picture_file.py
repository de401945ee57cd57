"""Files of pictures that may be anybody's: only regular files are read, only formats that decode without a program."""

from __future__ import annotations

import glob
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile

import datasets
from huggingface_hub import constants
from PIL import Image, UnidentifiedImageError

from itarflow.runtime.errors import DataError
from itarflow.runtime.files import open_regular
from itarflow.runtime.text import human_bytes, printable

# Pillow gives PostScript to Ghostscript, an interpreter of programs, whatever the file's name says; of the others that
# it knows, most are no pictures of 8 or 16 bits. HEIF is there once a plug-in such as pillow-heif is registered.
PICTURE_FORMATS = (
    "JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "HEIF", "ICO", "PSD", "QOI", "DDS",
    "PCX", "SGI", "TGA",
)  # fmt: skip
"""Names that Pillow has for the formats that are read."""
LARGEST_FILE = 2**30
"""Bytes of the largest file that is read; Pillow's own limit is that of a picture's pixels."""


def open_picture(source: str | Path | bytes) -> Image.Image:
    """Open an encoded picture of one of `PICTURE_FORMATS`; as by `Image.open`, its pixels are not decoded yet.

    Args:
        source: path of a regular file of at most `LARGEST_FILE` bytes, or the bytes themselves.

    Raises:
        OSError: the file can't be opened.
        DataError: it is no regular file, too large, empty, of no known format, or damaged, or the picture has more
            pixels than Pillow's limit. Damage behind the header shows when it is decoded, as any exception.
    """
    data = source if isinstance(source, bytes) else read_picture_file(source)
    if not data:
        raise DataError("it is empty; expected a picture")
    Image.init()  # else formats that are seldom used are not known
    formats = tuple(name for name in PICTURE_FORMATS if name in Image.OPEN)
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:  # whose message names a buffer in memory
        raise DataError("it is no image of a known format, or its header is damaged") from error
    except MemoryError:
        raise
    except Exception as error:  # nearly anything, by damaged headers; DecompressionBombError, too
        raise DataError(f"it can't be opened: {printable(str(error)) or type(error).__name__}") from error


def read_picture_file(path: str | Path) -> bytes:
    """The bytes of a regular file that has at most `LARGEST_FILE`; errors as of `open_picture`."""
    with open_regular(Path(path)) as file:
        return read_limited(file)


def read_limited(file: IO[bytes]) -> bytes:
    """All bytes of a stream.

    Raises:
        DataError: there are more than `LARGEST_FILE`.
    """
    data = bytearray()
    while block := file.read(2**20):  # in blocks, as memory for the limit would be reserved at every call
        data += block
        if len(data) > LARGEST_FILE:
            raise DataError(f"it is too large for a picture; expected at most {human_bytes(LARGEST_FILE)}")
    return bytes(data)


@dataclass(frozen=True)
class OwnPlace:
    """Where the pictures of a data set may lie: its tables may be anybody's, and must not name other files.

    Attributes:
        folders: absolute paths of folders; relative names are relative to the first.
    """

    folders: tuple[str, ...]

    def file(self, name: str) -> str:
        """Path of the file that a table names.

        Raises:
            DataError: it is an address, or lies elsewhere.
        """
        path = os.path.join(self.folders[0], name)
        inside = any(path.startswith(os.path.join(folder, "")) for folder in self.folders)
        if not inside or "://" in name or "\0" in name or os.pardir in re.split(r"[/\\]", name):
            raise DataError(
                f"its row names the file {printable(name)!r}, which is not in the folder of the data set; expected "
                "the picture itself: put the files there, or write their bytes into the table"
            )
        return path

    def read(self, name: str) -> bytes:
        """The bytes of a picture that a table names: of a file, or of one in an archive, zip://a.png::train.zip.

        Raises:
            OSError: it can't be read.
            DataError: it lies elsewhere, is no regular file, or is too large.
        """
        inner, _, archive = name.partition("::")
        if not (inner.startswith("zip://") and archive):
            return read_picture_file(self.file(name))
        with open_regular(Path(self.file(archive))) as file:
            try:
                with ZipFile(file) as packed, packed.open(inner.removeprefix("zip://")) as member:
                    return read_limited(member)
            except (BadZipFile, KeyError, RuntimeError, NotImplementedError) as error:  # RuntimeError: a password
                raise DataError(f"it can't be read from its archive: {printable(str(error))}") from error


def own_place(path: str) -> OwnPlace:
    """Where the pictures of a data set may lie, by what `DataConfig.path` names: beside it, or in the Hub's caches."""
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        return _below(place)
    if glob.has_magic(place):
        parts = place.split(os.sep)
        fixed = parts[: next(number for number, part in enumerate(parts) if glob.has_magic(part))]
        return _below(os.sep.join(fixed) or (os.sep if place.startswith(os.sep) else "."))
    if os.path.exists(place) or place.endswith(".parquet"):
        return _below(os.path.dirname(os.path.abspath(place)))
    caches = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    return _below(*(os.path.expanduser(folder) for folder in caches))


def _below(*folders: str | Path) -> OwnPlace:
    """Below these folders, by the names that they were given, or where they are linked to."""
    found = [str(absolute(folder)) for absolute in (os.path.abspath, os.path.realpath) for folder in folders]
    return OwnPlace(tuple(dict.fromkeys(found)))
