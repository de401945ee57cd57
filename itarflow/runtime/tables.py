"""Tables of functions by name: what is in a table is a choice of options, is checked, and is what runs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Literal, TypeVar, cast

import tyro

from itarflow.runtime.ranges import shown

T = TypeVar("T")


class Table(Generic[T]):
    """Entries by name, to which plug-ins may add (`itarflow.plugins`).

    Args:
        what: the setting whose value the names are, for messages.
        default: the name that stands in for one that is not known here.
        entries: the package's own.
    """

    def __init__(self, what: str, default: str, entries: Mapping[str, T]) -> None:
        self.what, self.default = what, default
        self._own, self._entries = frozenset(entries), dict(entries)
        assert default in entries

    def __getitem__(self, name: str) -> T:
        """The entry; raises ValueError, not KeyError, for an unknown name of whatever type."""
        self.check(name)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """The names, the package's own first."""
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a name; False for what is no text."""
        return isinstance(name, str) and name in self._entries

    def check(self, name: Any) -> None:
        """Raise ValueError, with the known names, unless it is one of them."""
        if name not in self:
            raise ValueError(
                f"{self.what} is {shown(name)}; expected one of {', '.join(self)}, or a name of a plug-in, which "
                "--plugins FILE makes known."
            )

    def register(self, name: str, entry: T) -> None:
        """Add an entry.

        Raises:
            ValueError: the name is none that an option could have, or one of the package's own.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise ValueError(f"a {self.what} of a plug-in is called {shown(name)}; expected letters, digits, - and _.")
        if name in self._own:
            raise ValueError(f"the {self.what} {name!r} is itarflow's own; give that of the plug-in another name.")
        if name in self:
            warnings.warn(f"the {self.what} {name!r} was registered before; the new one is used.", stacklevel=3)
        self._entries[name] = entry


def with_known(stored: Mapping[str, Any], tables: Mapping[str, Table[Any]]) -> dict[str, Any]:
    """Stored settings, in which names that are not known here have become the defaults, each with a warning.

    So whoever has not the plug-in of a checkpoint can open it. What is no text is left for `Table.check` to refuse.

    Args:
        stored: settings, of which some hold names.
        tables: of these settings.
    """
    settings = dict(stored)
    for setting, table in tables.items():
        name = stored.get(setting)
        if isinstance(name, str) and name not in table:
            warnings.warn(
                f"{table.what} is {shown(name)}, which is not known here: {table.default!r}, the default, takes its "
                "place, and gives other results. If it is of a plug-in, give its file by --plugins FILE, or to "
                "itarflow.plugins.load.",
                stacklevel=1,  # one place for all, so that it is said once
            )
            settings[setting] = table.default
    return settings


def choices(table: Table[Any]) -> Any:
    """The metadata of a type `Annotated[str, ...]` whose values on the command line are the names of the table.

    They are looked up when the command line is read, so that those of plug-ins are among them.
    """
    return tyro.conf.arg(
        constructor_factory=lambda: cast(Any, Literal[tuple(table)]),
        help_behavior_hint=lambda default: "(default: " + default.strip("[']") + ")",  # tyro shows a list
    )
