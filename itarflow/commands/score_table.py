"""Tables of figures, of `evaluate`, `sweep` and `table`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.evaluation.metrics.scores import Figure, Scores
from itarflow.runtime.text import printable


def score_table(
    heads: tuple[str, ...],
    scores: Mapping[tuple[str, ...], Scores],
    best: Mapping[str, tuple[str, ...]] | None = None,
    *,
    alike: bool = True,
) -> Table:
    """A row for each set of samples, a column for each figure.

    Args:
        heads: of the first columns.
        scores: by the texts of these columns; where all but the last change, a line is drawn.
        best: by the short name of a figure the row that gets a star. None = no stars, but spreads.
        alike: whether all are of as many samples against the same real images, which the title then names.
    """
    first = next(iter(scores.values()))
    title = f"{first.samples:,} samples against {first.reference}, by {first.extractor}"
    title = escape(title) if alike else "figures that do not compare: see below"
    table = Table(title=title + ("" if best is None else "; * = best"), title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if best is None else "right")
    titles = {name: figure.title for one in scores.values() for name, figure in one.figures.items()}
    for title in titles.values():
        table.add_column(escape(title.removesuffix(f" ({first.extractor})")), justify="right")
    broken = any(one.broken for one in scores.values())
    if broken:
        table.add_column("not finite", justify="right")
    before: tuple[str, ...] | None = None
    for row, one in scores.items():
        if before is not None and row[:-1] != before[:-1]:
            table.add_section()
        texts = {name: figure_text(figure, spread=best is None) for name, figure in one.figures.items()}
        if best is not None:
            stars = {name for name, starred in best.items() if starred == row}
            texts = {key: f"[bold green]{text} *[/]" if key in stars else f"{text}  " for key, text in texts.items()}
        table.add_row(*row, *(texts.get(name, "-") for name in titles), *([f"{one.broken:,}"] if broken else []))
        before = row
    return table


def print_scores(table: Table, scores: Mapping[Any, Scores]) -> None:
    """Print a table of scores, and the warnings about comparing them."""
    console = Console()
    console.print(table)
    for warning in dict.fromkeys(warning for one in scores.values() for warning in one.warnings):
        print_note(warning)


def print_note(text: str) -> None:
    """Print what to keep in mind."""
    Console().print(f"[yellow]Note:[/] {escape(printable(text))}.", soft_wrap=True, highlight=False)


def figure_text(figure: Figure, spread: bool = True) -> str:
    """A figure to four digits, with its spread if it has one and `spread` is set."""
    return f"{figure.value:.4g}" + (f" ± {figure.std:.2g}" if spread and figure.std is not None else "")
