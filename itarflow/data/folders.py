"""What lies in a folder: pictures, parquet files and descriptions of pictures, and all else that is not taken.

Each real folder is visited once, so that links to folders above end; of files only regular ones are taken, since a
named pipe is waited for, and a device gives bytes without end.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from itarflow.data.picture_file import PICTURE_FORMATS
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import open_regular
from itarflow.runtime.text import listed, printable

Parts: TypeAlias = tuple[str, ...]
"""A folder or file as the names on the way to it from the folder that was listed; () is that folder itself."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables that describe the pictures in their folder and below, as `datasets` has them."""
LABELS = "dataset.json"
"""Labels of the pictures in its folder and below, as the dataset tools of StyleGAN and EDM write them."""
# What operating systems and archives leave behind.
_JUNK = ("__MACOSX", "__pycache__", "lost+found", "Thumbs.db", "desktop.ini")


@dataclass
class Listing:
    """The content of a folder, as names relative to it; hidden files and folders are not looked at.

    Attributes:
        root: the folder, absolute.
        folders: all folders below it, itself included.
        pictures: names of the pictures by the folder that holds them, sorted.
        parquet: parquet files that are no metadata.
        descriptions: files called as in `METADATA` and `LABELS`.
        unknown: files that are neither.
        odd_names: pictures and parquet files whose names are no text.
        irregular: named pipes, devices, sockets.
        dangling: links that lead nowhere, unless they are called as pictures are.
        visited: links to folders that are, or lie in, what is listed already.
    """

    root: Path
    folders: list[Parts] = field(default_factory=list)
    pictures: dict[Parts, list[str]] = field(default_factory=dict)
    parquet: list[Parts] = field(default_factory=list)
    descriptions: list[Parts] = field(default_factory=list)
    unknown: list[Parts] = field(default_factory=list)
    odd_names: list[Parts] = field(default_factory=list)
    irregular: list[Parts] = field(default_factory=list)
    dangling: list[Parts] = field(default_factory=list)
    visited: list[Parts] = field(default_factory=list)

    def show(self, parts: Parts) -> str:
        """A name for messages, without the folders of this machine: flowers/rose/1.png."""
        return printable("/".join((self.root.name, *parts)))

    def left_out(self, besides: Container[str] = ()) -> tuple[str, ...]:
        """What was found and not taken, as sentences; of unknown files not those with the suffixes `besides`."""
        ends = [(parts, os.path.splitext(parts[-1])[1].lower()) for parts in self.unknown]
        unknown = [parts for parts, end in ends if end not in besides]
        kinds = Counter(end or "no suffix" for _, end in ends if end not in besides)
        counts = listed((f"{count:,} {printable(kind)}" for kind, count in kinds.most_common()), 3)
        return (
            *self._told(unknown, "file", f"of an unknown kind ({counts})"),
            *self._told(self.odd_names, "file", "with a name that is not UTF-8 (rename it)"),
            *self._told(self.irregular, "special file", "(pipe, device, socket)"),
            *self._told(self.dangling, "link", "to nowhere"),
            *self._told(self.visited, "link", "to what is there already"),
        )

    def _told(self, found: Sequence[Parts], what: str, kind: str) -> tuple[str, ...]:
        return (counted(len(found), what, f"{kind} in {self.show(())}/", self.show(found[0])),) if found else ()


def counted(count: int, what: str, kind: str, example: str) -> str:
    """Such as "24 files of an unknown kind in mixed/, such as mixed/a/0000.heic"."""
    return f"{count:,} {what}{'s' * (count != 1)} {kind}, such as {example}"


def list_folder(folder: Path) -> Listing:
    """List a folder and all below it, also through links.

    Raises:
        DataError: a folder can't be read: without it, all labels behind it would shift.
    """
    found = Listing(Path(os.path.abspath(folder)))
    real = os.path.realpath(folder)
    seen = {str(place) for place in Path(real).parents}
    folders, links = deque[tuple[Parts, str]]([((), real)]), deque[tuple[Parts, str]]()
    while folders or links:  # links last: a folder that is linked as well goes by its own name
        parts, real = folders.popleft() if folders else links.popleft()
        if real in seen:
            found.visited.append(parts)
            continue
        seen.add(real)
        place = os.path.join(found.root, *parts)
        try:
            with os.scandir(place) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"folder {place!r} can't be read: {error.strerror}; allow it to be read, or move it away"
            ) from error
        found.folders.append(parts)
        for entry in ordered:
            if entry.name.startswith(".") or entry.name in _JUNK:
                continue
            if not _is(entry, "dir"):
                _add_file(found, parts, entry)
            elif entry.is_symlink():
                links.append(((*parts, entry.name), os.path.realpath(entry.path)))
            else:
                folders.append(((*parts, entry.name), os.path.join(real, entry.name)))
    return found


def _add_file(found: Listing, parts: Parts, entry: os.DirEntry[str]) -> None:
    file, suffix = (*parts, entry.name), os.path.splitext(entry.name)[1].lower()
    nowhere = not os.path.exists(entry.path) if entry.is_symlink() else False
    if nowhere and suffix not in suffixes():  # else it is a picture that can't be read, and will be named
        found.dangling.append(file)
    elif not nowhere and not _is(entry, "file"):
        found.irregular.append(file)
    elif entry.name in METADATA or entry.name == LABELS:
        found.descriptions.append(file)
    elif suffix != ".parquet" and not (suffix in suffixes() or (suffix == "" and _starts_as_picture(entry))):
        found.unknown.append(file)
    elif not _is_text(entry.name):
        found.odd_names.append(file)
    elif suffix == ".parquet":
        found.parquet.append(file)
    else:
        found.pictures.setdefault(parts, []).append(entry.name)


_SUFFIXES: set[str] = set()


def suffixes() -> set[str]:
    """Suffixes, in lower case and with their dots, of the formats of pictures that are read."""
    if not _SUFFIXES:
        Image.init()  # else formats that are seldom used are not known
        _SUFFIXES.update(end for end, kind in Image.registered_extensions().items() if kind in PICTURE_FORMATS)
    return _SUFFIXES


def _starts_as_picture(entry: os.DirEntry[str]) -> bool:
    """Whether a file without a suffix begins as a picture does; one that can't be read, or has no size, doesn't."""
    try:
        if entry.stat().st_size == 0:  # also files of /proc, which may have to be waited for
            return False
        with open_regular(Path(entry.path)) as file:
            start = file.read(16)
    except (OSError, DataError):
        return False
    if len(start) < 16:  # for which some of the checks fail
        return False
    accepts = [Image.OPEN[kind][1] for kind in PICTURE_FORMATS if kind in Image.OPEN]
    return any(accept is not None and accept(start) is True for accept in accepts)


def _is(entry: os.DirEntry[str], kind: str) -> bool:
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:  # a link to itself
        return False


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 come as surrogates
        return False
    return True


def check_text(root: Path, folders: Iterable[Parts]) -> None:
    """Refuse folders whose names are no text: they can be no names of classes.

    Raises:
        DataError: naming the first.
    """
    for parts in folders:
        place = os.path.join(root, *parts)
        if not _is_text(place):
            raise DataError(f"the name of folder {place!r} is not UTF-8; rename it")


def without_pictures(listing: Listing, root: Parts) -> list[Parts]:
    """Folders directly below `root`, or links there that lead nowhere, with no picture in them or below."""
    depth = len(root)
    full = {home[: depth + 1] for home in listing.pictures if len(home) > depth and home[:depth] == root}
    below = [
        parts for parts in (*listing.folders, *listing.dangling) if len(parts) == depth + 1 and parts[:depth] == root
    ]
    return sorted(set(below) - full)


def homes_below(listing: Listing, root: Parts) -> Mapping[Parts, Sequence[str]]:
    """Pictures below `root`, by their folder relative to it."""
    depth = len(root)
    return {home[depth:]: names for home, names in listing.pictures.items() if home[:depth] == root}
