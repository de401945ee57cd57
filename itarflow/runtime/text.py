"""Names, numbers and nested settings as text."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many there are if that is not all.

    Example:
        >>> listed("abc", limit=2)
        'a, b, ... (3 in all)'
    """
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def counted(number: int, thing: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "step"), counted(2000, "step")
        ('1 step', '2,000 steps')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    r"""Text of foreign origin as it can be shown: characters that a terminal would obey or can't encode are escaped.

    Example:
        >>> printable("\x1b]0;a title\x07")
        '\\x1b]0;a title\\x07'
    """
    return "".join(
        character if character in "\n\t" or character.isprintable() else _escaped(character) for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def display_name(path: str) -> str:
    """A public name of a VAE or a data set: of a local path the last part only, of the Hub all of it."""
    place = os.path.expanduser(path)
    local = path.startswith((".", "/", "~")) or path.endswith(".parquet") or glob.has_magic(path)
    return os.path.basename(os.path.abspath(place)) if local or os.path.exists(place) else path


def short_names(paths: Sequence[str]) -> list[str]:
    """A short name for each path or Hub id, fit for a file name; no two alike.

    runs/digits/pipeline is "digits", runs/decoder/vae "decoder". Of equal names the second becomes NAME-2, and so on.
    """
    names: list[str] = []
    for path in paths:
        telling = [part for part in Path(path).parts if part not in ("pipeline", "vae", "..", "/")]
        base = (file_name(telling[-1]) if telling else "") or "pipeline"
        candidates = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
        names.append(next(name for name in candidates if name not in names))
    return names


def file_name(text: str) -> str:
    """The text as the name of a file."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def without_folders(report: str, source: str) -> str:
    """A "name: reason" that names no folder of this machine, of an image of the data set at `source`."""
    root = f"{os.path.abspath(os.path.expanduser(source))}{os.sep}"
    name, colon, reason = report.replace(root, "").partition(": ")
    inner = name.split("::")[0]  # of a file in an archive, which comes second
    short = os.path.basename(inner) if os.path.isabs(inner) else inner
    return short + colon + reason.replace(name, short)


def human_bytes(count: float) -> str:
    """Such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "B" and count < 999.5 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def human_number(count: float) -> str:
    """Such as "417M" or "1.5T"."""
    for unit in ("", "K", "M", "G"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, named like "train.epochs"."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
