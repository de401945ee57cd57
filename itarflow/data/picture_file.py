"""Files of pictures that may be anybody's: only regular files are read, only formats that decode without a program."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

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


def read_limited(file: BinaryIO) -> bytes:
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
