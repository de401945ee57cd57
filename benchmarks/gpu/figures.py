"""What the steps of a check find, and the page that tells it. Nothing here needs PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One thing that was done, measured or compared."""

    what: str
    """Such as "inverse", "score" or "training step"."""
    case: str = ""
    """Which one of several."""
    dtype: str = ""
    """Of the products."""
    images: int = 0
    """At a time; 0 = it is not about images."""
    seconds: float | None = None
    """Of the whole batch, after the first call; the median, where there are several."""
    first_seconds: float | None = None
    """Of the first call, with all that is made once."""
    floor_seconds: float | None = None
    """The least that the device can do, see README.md."""
    flops: int | None = None
    """Counted, of the whole batch."""
    moved_bytes: int | None = None
    """Counted likewise."""
    peak_bytes: int | None = None
    """At the peak of the first call, beyond what lay there before."""
    estimated_bytes: int | None = None
    """What was to be expected of that."""
    peer_seconds: float | None = None
    """Of the official code, for the same."""
    error: float | None = None
    """Distance from what was expected, relative to it unless `more` says otherwise."""
    tolerance: float | None = None
    """Of `error`."""
    failed: str | None = None
    """Why there are no figures."""
    left_out: str | None = None
    """Why it was not tried, which is no deviation."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What is only told in the JSON file, and in the list of details."""

    @property
    def deviation(self) -> str | None:
        """What is wrong with it, in a line; None = nothing."""
        name = _named(self)
        if self.failed is not None:
            return f"{name}: {self.failed}"
        if self.error is not None and self.tolerance is not None and not self.error <= self.tolerance:
            return f"{name}: error {self.error:.2g}, expected at most {self.tolerance:.2g}"
        return None


@dataclass(kw_only=True)
class Done:
    """A step, as far as it came."""

    name: str
    seconds: float = 0.0
    failed: str | None = None
    """Why it did not come to its end."""
    figures: list[Figure] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Check:
    """All of a call."""

    command: str
    device: str
    """Its name, versions of PyTorch and driver."""
    dry: bool
    steps: list[Done]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"date": _today(), **asdict(self)}


def reason(error: BaseException) -> str:
    """An exception as a `failed`: its type and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def not_installed(package: str) -> str:
    """Why something is left out."""
    return f"the package {package} is not installed"


def missing_package(error: BaseException) -> str | None:
    """`not_installed` of the package for whose absence there is this exception; None = it has another reason."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            package = cause.name.partition(".")[0]
            # Of a package that is there, a module is missing: that is a fault.
            return not_installed(package) if find_spec(package) is None else None
        cause = cause.__cause__
    return None


def named_missing(output: str) -> str | None:
    """The same of a command, by what it has printed."""
    found = re.search(r"ModuleNotFoundError: No module named '(\w+)", output)
    return None if found is None or find_spec(found[1]) is not None else not_installed(found[1])


def page(check: Check, targets: Sequence[list[str]] = ()) -> str:
    """A section for RESULTS.md: tables of speed and of errors, and what deviated.

    Args:
        check: what has been found.
        targets: rows of `Target`.
    """
    told = "a dry run on a CPU with tiny sizes, whose figures mean nothing" if check.dry else check.device
    lines = [f"## Checked on {'a CPU' if check.dry else 'a GPU'} ({_today()})", "", f"`{check.command}`: {told}.", ""]
    figures = [figure for step in check.steps for figure in step.figures]
    speeds = [figure for figure in figures if figure.seconds is not None and figure.failed is None]
    for part in ([one for one in speeds if one.images], [one for one in speeds if not one.images]):
        if part:
            lines += [*_table(_HEADS, map(_speed, part)), ""]
    if targets:
        lines += [*_table(["target", "aimed at", "found", ""], targets), ""]
    compared = [figure for figure in figures if figure.error is not None]
    if compared:
        rows = [[_titled(f), f.dtype, _short(f.error), _short(f.tolerance)] for f in compared]
        lines += [*_table(["compared", "dtype", "error", "tolerance"], rows), ""]
    lines += [*_table(["step", "seconds", "figures", "end"], map(_step, check.steps)), ""]
    wrong = list(deviations(check))
    lines += ["**What deviated**", "", *(f"- {line}" for line in wrong)] if wrong else ["Nothing deviated."]
    left_out = [figure for figure in figures if figure.left_out is not None]
    if left_out:
        lines += ["", "**Left out**", "", *(f"- {_named(figure)}: {figure.left_out}" for figure in left_out)]
    details = [(figure, figure.more) for figure in figures if figure.more]
    if details:
        lines += ["", "**Details**", ""]
        lines += [f"- {_named(figure)}: {_mapping(more)}" for figure, more in details]
    return "\n".join(lines).rstrip() + "\n"


def deviations(check: Check) -> Iterator[str]:
    """What did not come to its end, or came out wrong, a line each."""
    for step in check.steps:
        if step.failed is not None:
            yield f"step {step.name}: {step.failed}"
        yield from (line for figure in step.figures if (line := figure.deviation) is not None)


_HEADS = ["what", "dtype", "images", "time", "an image", "first call", "TFLOP/s", "GB/s", "over floor",
          "official code", "peak GiB (expected)"]  # fmt: skip


def _speed(figure: Figure) -> list[str]:
    seconds = figure.seconds or 0.0
    # Both rates are of what the count asks for: what is read twice does not count.
    flops = None if figure.flops is None or not seconds else figure.flops / seconds / 1e12
    moved = None if figure.moved_bytes is None or not seconds else figure.moved_bytes / seconds / 1e9
    floor = None if figure.floor_seconds is None else seconds / figure.floor_seconds
    peer = None if figure.peer_seconds is None or not seconds else figure.peer_seconds / seconds
    memory = "" if figure.peak_bytes is None else _short(figure.peak_bytes / 2**30)
    if figure.peak_bytes is not None and figure.estimated_bytes is not None:
        memory += f" ({_short(figure.estimated_bytes / 2**30)})"
    return [
        _titled(figure), figure.dtype, str(figure.images or ""), _time(seconds),
        _time(seconds / figure.images) if figure.images else "", _time(figure.first_seconds), _short(flops),
        _short(moved), _short(floor), "" if peer is None else f"{_short(peer)} x as fast", memory,
    ]  # fmt: skip


def _step(step: Done) -> list[str]:
    done = [figure for figure in step.figures if figure.left_out is None]
    whole = "whole" if len(done) == len(step.figures) else "in part" if done else "left out"
    return [step.name, f"{step.seconds:.1f}", str(len(done)), whole if step.failed is None else step.failed]


def _table(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Markdown, without the columns that are empty everywhere."""
    found = list(rows)
    wanted = [index for index in range(len(heads)) if any(row[index] for row in found)]
    return [
        f"| {' | '.join(_escaped(row[index]) for index in wanted)} |" for row in (heads, ["---"] * len(heads), *found)
    ]


def _titled(figure: Figure) -> str:
    return ", ".join(part for part in (figure.what, figure.case) if part)


def _named(figure: Figure) -> str:
    return ", ".join(part for part in (_titled(figure), figure.dtype, _images(figure.images)) if part)


def _mapping(more: Mapping[str, Any]) -> str:
    words = (f"{name} {_short(value) if isinstance(value, float) else value}".strip() for name, value in more.items())
    return "; ".join(words)


def _images(number: int) -> str:
    return "" if not number else "1 image" if number == 1 else f"{number} images"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    unit, size = next(((unit, size) for unit, size in (("s", 1), ("ms", 1e-3)) if seconds >= size), ("us", 1e-6))
    return f"{_short(seconds / size)} {unit}"


def _short(value: float | None) -> str:
    """Three digits, but no fewer than there are before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
