"""JSON that may come from anybody: read within a size limit, and refused where it is not what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from itarflow.runtime.errors import DataError
from itarflow.runtime.files import open_regular
from itarflow.runtime.text import printable

T = TypeVar("T")
LIMIT = 64 * 2**20
"""Bytes of the largest JSON file that is read; a manifest of a million images has some twenty million."""


def read_json(path: Path, of: type[T], *, limit: int = LIMIT) -> T:
    """The content of a JSON file, as a dataclass, TypedDict, `dict[str, Any]`, ... with values of the declared types.

    Fields that a dataclass does not know are left out, so that files of newer versions can be read. Ranges are
    declared as `Annotated[int, msgspec.Meta(ge=1)]`, or checked in `__post_init__`.

    Args:
        path: a regular file.
        of: the type expected.
        limit: bytes of the largest file that is read.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no regular file, too large, no JSON, nested too deeply, or of another type.
        OSError: it can't be read.
    """
    return parse_json(read_bytes(path, limit), of, str(path))


def read_bytes(path: Path, limit: int) -> bytes:
    """All bytes of a regular file that has at most `limit`; errors as of `read_json`."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"{printable(str(path))} is too large; expected at most {limit:,} bytes: replace it")
    return content


def parse_json(text: str | bytes, of: type[T], name: str) -> T:
    """Parse JSON into a type.

    Args:
        text: the JSON.
        of: the type expected.
        name: where it is from, for messages: a file's name.

    Raises:
        DataError: it is no JSON, nested too deeply, or of another type.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError, too many digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{printable(name)} is damaged: {printable(reason)}; copy or make it again") from error
    return as_type(values, of, name)


def as_type(values: Any, of: type[T], name: str) -> T:
    """Plain values as a type; see `parse_json`.

    Raises:
        DataError: they are of another type, saying which entry is not as expected.
    """
    try:
        return msgspec.convert(values, of)
    except (msgspec.ValidationError, RecursionError, OverflowError, ValueError) as error:  # of __post_init__, too
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{printable(name)} is damaged: {printable(reason)}; copy or make it again") from error
