"""What a measurement gives: records, as JSON and as a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from itarflow.runtime.text import human_bytes


@dataclass(frozen=True, kw_only=True)
class Record:
    """One variant of one case."""

    path: str
    """Subcommand."""
    case: str
    variant: str
    model: str
    sizes: dict[str, Any]
    """Of the model."""
    parameters: int
    batch_size: int
    dtype: str
    device: str
    threads: int
    torch_version: str
    repeats: int
    seconds: float
    """Median."""
    lower_quartile: float
    upper_quartile: float
    images_per_second: float
    peak_bytes: int | None
    """Working memory beside weights and inputs; None = not measured."""
    reference: str | None
    """The variant that this one is compared with: the peer, or without one the first; None for itself."""
    times_as_fast: float | None
    """Median seconds of the reference in units of one's own."""
    times_the_memory: float | None
    """Peak bytes in units of the reference's."""
    largest_difference: float | None
    """Of the result from the reference's; None for itself, and where one of them is not finite."""
    finite: bool
    """Whether the result is."""
    floor_seconds: float
    """The least that the device at hand can do, see README.md."""
    times_floor: float
    peak_flops_per_second: float
    """Of the device at hand, measured in the same run, in this precision."""
    peak_bytes_per_second: float
    date: str
    command: str


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high


def write_json(records: Sequence[Any], path: Path) -> None:
    """A list of dataclasses; the folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(record) for record in records], indent=2, allow_nan=False) + "\n")


def print_table(records: Sequence[Record], console: Console) -> None:
    """All records of a run."""
    first = records[0]
    table = Table(
        title=f"{first.model}, {first.parameters / 1e6:.1f}M parameters; {first.device}, {first.threads} threads, "
        f"PyTorch {first.torch_version}; medians of {first.repeats} (quartiles)",
        title_justify="left",
    )
    for column in ("case", "variant", "dtype"):
        table.add_column(column)
    for column in ("batch", "seconds", "images/s", "times as fast", "difference", "memory", "floor", "over floor"):
        table.add_column(column, justify="right")
    for record in records:
        table.add_row(
            record.case, record.variant, record.dtype, str(record.batch_size),
            f"{record.seconds:.3g} ({record.lower_quartile:.3g}, {record.upper_quartile:.3g})",
            f"{record.images_per_second:.4g}", _times(record), _difference(record), _memory(record),
            f"{record.floor_seconds:.3g}", f"{record.times_floor:.3g}",
        )  # fmt: skip
    console.print(table)


def _times(record: Record) -> str:
    return "" if record.times_as_fast is None else f"{record.times_as_fast:.2f} x {record.reference}"


def _difference(record: Record) -> str:
    if not record.finite:
        return "not finite"
    if record.largest_difference is None:
        return ""
    # Images have values from -1 to 1.
    levels = "" if record.path == "train" else f" ({record.largest_difference * 127.5:.2g} of 255)"
    return f"{record.largest_difference:.1e}{levels}"


def _memory(record: Record) -> str:
    if record.peak_bytes is None:
        return ""
    times = "" if record.times_the_memory is None else f" ({record.times_the_memory:.2f} x)"
    return f"{human_bytes(record.peak_bytes)}{times}"
