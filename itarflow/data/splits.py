"""Names of splits: which words mean one, and which split of a data set is meant by a name.

The usual spellings (train or training; val, valid, validation or dev; test or testing; in any case) mean the same
split as long as a data set has only one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from itarflow.runtime.errors import DataError
from itarflow.runtime.text import printable

_GROUPS = (
    ("train", "training"),
    ("val", "valid", "validation", "dev"),
    ("test", "testing"),
    ("eval", "evaluation"),
)
_GROUP = {word: number for number, words in enumerate(_GROUPS) for word in words}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def is_split(name: str) -> bool:
    """Whether a folder of this name is one of a split: train, Test, validation, ..."""
    return name.casefold() in _GROUP


def several(names: Iterable[str]) -> bool:
    """Whether some of the names are of splits, and of two at least: train and Val, but not dev and val."""
    return len({_GROUP[name.casefold()] for name in names if is_split(name)}) > 1


def bare_names(expression: str) -> list[str]:
    """Names in a split expression, each once: "train[:50%]+extra" asks for train and extra."""
    return list(dict.fromkeys(part.split("[")[0].strip() for part in expression.split("+")))


def split_of_file(file: Path, root: Path | None) -> str:
    """Split that a file's name or its folders below `root` tell; "" = none.

    These are train-00000-of-00002, mnist_test, val/part0, flowers-train-00000-of-00001, and extra-00000-of-00002: the
    part in front of a shard's number is the name of a split even if it isn't a usual one.
    """
    shard = _SHARD.fullmatch(file.stem)
    if shard and re.fullmatch(r"\w+", shard[1]):
        return shard[1]
    folders = file.relative_to(root).parts[:-1] if root else ()
    return next(filter(None, map(_told, (shard[1] if shard else file.stem, *reversed(folders)))), "")


def _told(text: str) -> str:
    """The one word in a name that means a split, as it is written there; "" if there is none, or there are several."""
    words = dict.fromkeys(word for word in re.split(r"[-._ 0-9]+", text) if is_split(word))
    return next(iter(words)) if len(words) == 1 else ""


def match_splits(path: str, wanted: Sequence[str], known: Iterable[Any], notes: Sequence[str] = ()) -> dict[str, str]:
    """The name in the data set of each split that is wanted: {"validation": "Val"}.

    Args:
        path: the data set, for messages.
        wanted: names as they were asked for.
        known: names that the data set has.
        notes: what was left out, for the message that a split is missing.

    Raises:
        DataError: a split is missing, or two names mean the same one.
    """
    names = sorted(map(str, known))
    found = {name: _match(name, names) for name in wanted}
    for name, matches in found.items():
        if len(matches) != 1:
            problem = f"has no split {name!r}" if not matches else f"has several splits that {name!r} may mean"
            names = [printable(known_name) for known_name in matches or names]
            raise DataError(
                f"path {path!r} {problem}; use one of {', '.join(names)} for data.split and "
                "data.held_out_split (None sets images of data.split aside)"
                + (f". Left out: {'; '.join(notes)}" if notes else "")
            )
    meant = {name: matches[0] for name, matches in found.items()}
    for name, other in meant.items():
        if double := [second for second in meant if second != name and meant[second] == other]:
            raise DataError(f"splits {name!r} and {double[0]!r} are one, {other!r} of {path!r}: name another")
    return meant


def _match(name: str, known: Sequence[str]) -> list[str]:
    if name in known:
        return [name]
    same_letters = [other for other in known if other.casefold() == name.casefold()]
    if same_letters or not is_split(name):
        return same_letters

    def same_group(spell: Callable[[str], str]) -> list[str]:
        return [other for other in known if _GROUP.get(spell(other).casefold()) == _GROUP[name.casefold()]]

    return same_group(str) or same_group(_told)  # flowers_train is meant if there is nothing nearer
