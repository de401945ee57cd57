"""How far our results are from those of the official code, case by case.

Run `python benchmarks/golden_deviation.py`; it needs no GPU and takes seconds. The comparisons are those of
tests/flow/test_golden.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from golden_cases import Comparison, compare, golden_calls


def by_case() -> dict[str, list[Comparison]]:
    """All comparisons, grouped by the name of the case."""
    groups: dict[str, list[Comparison]] = {}
    for case, call in golden_calls():
        groups.setdefault(case.name, []).extend(compare(case, call))
    return groups


def deviation_table(groups: dict[str, list[Comparison]]) -> Table:
    """One row a case: the largest absolute deviation, and the largest in units of a tensor's largest value."""
    table = Table(title="Deviation from the official code, float32 on the CPU")
    table.add_column("case", overflow="fold")
    table.add_column("tensors", justify="right", overflow="fold")
    for measure in ("absolute", "relative to max"):
        table.add_column(f"largest {measure}", justify="right", overflow="fold")
        table.add_column("of tensor", overflow="fold")
    for name, comparisons in groups.items():
        absolute = max(comparisons, key=lambda comparison: comparison.absolute)
        relative = max(comparisons, key=lambda comparison: comparison.relative)
        table.add_row(
            name,
            str(len(comparisons)),
            f"{absolute.absolute:.1e}",
            f"{absolute.call}.{absolute.tensor}",
            f"{relative.relative:.1e}",
            f"{relative.call}.{relative.tensor}",
        )
    return table


def main() -> None:
    """Print the table."""
    Console(width=110).print(deviation_table(by_case()))


if __name__ == "__main__":
    main()
