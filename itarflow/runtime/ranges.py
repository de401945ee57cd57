"""Numbers in their ranges, whatever they come from: a call, an option, or a JSON file of others."""

from __future__ import annotations

import reprlib
from numbers import Integral, Real
from typing import Any

LEAST, LARGEST = 1e-18, 1e18
"""Positive numbers between these keep their squares finite, and above 0, in float32."""


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raise ValueError unless the value is a whole number from `least` to `most`; True and 1.0 are none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ValueError(f"{name} is {shown(value)}; expected a whole number from {least:,} to {most:,}.")


def check_number(name: str, value: Any, least: float = LEAST, most: float = LARGEST, hint: str = "") -> None:
    """Raise ValueError unless the value is a number from `least` to `most`, so neither NaN nor a text."""
    real: Any = value if isinstance(value, Real) and not isinstance(value, bool) else None
    if real is None or not least <= real <= most:
        raise ValueError(f"{name} is {shown(value)}; expected a finite number from {least:g} to {most:g}{hint}.")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless the value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; expected True or False.")


def shown(value: Any) -> str:
    """A value of any size in a message: long ones are shortened, and what a terminal would obey is escaped."""
    return reprlib.repr(value)
