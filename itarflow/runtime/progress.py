"""Progress bars: of a training, and of work on images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Show = Callable[[int, float | None, float], None]
"""show(step, loss or None, images a second)"""


@contextmanager
def training_progress(console: Console, name: str, total_steps: int, first_step: int) -> Iterator[Show]:
    """A live line: bar, step, loss, images a second, time gone and time left."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]:.0f} images/s"),
        TimeElapsedColumn(),
        TextColumn("elapsed"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total_steps, completed=first_step, loss="-", speed=0.0)

        def show(step: int, loss: float | None, speed: float) -> None:
            progress.update(task, completed=step, speed=speed)
            if loss is not None:
                progress.update(task, loss=f"{loss:.4f}")

        yield show


class _TimeLeft(ProgressColumn):
    """By the mean speed from the start: a file of images may take longer than the window of rich's own column."""

    def render(self, task: Task) -> Text:
        made, elapsed, left = task.fields["made"], task.elapsed, task.remaining
        if left and (not made or elapsed is None):
            return Text("-:--:--")
        return Text(str(timedelta(seconds=round((left or 0) * (elapsed or 0) / max(made, 1)))))


@contextmanager
def image_progress(console: Console | None, title: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A live line that counts images: bar, images a second, time left; no console, no line.

    Yields:
        A function to call with the number of images done since its last call. `done` does not count for the speed.
    """
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} images/s"),
        _TimeLeft(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task(title, total=total, completed=done, speed=0.0, made=0)
        start, count = time.monotonic(), 0

        def show(more: int) -> None:
            nonlocal count
            count += more
            progress.update(task, advance=more, made=count, speed=count / max(time.monotonic() - start, 1e-3))

        yield show
