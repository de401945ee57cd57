"""Shared by commands: processes and messages."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import datasets
import tyro
from accelerate import PartialState
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.runtime.devices import check_own_gpu, is_out_of_memory
from itarflow.runtime.errors import DataError, RunError, TrainingError
from itarflow.runtime.launch import end, joined
from itarflow.runtime.processes import after_main, crash, refuse, say_once
from itarflow.runtime.signals import Interrupted

Form = TypeVar("Form")


def parsed(form: type[Form], **options: Any) -> Form:
    """As tyro.cli; of several processes the main one says what is wrong, and none ends before it has."""
    others = io.StringIO()  # tyro's console_outputs=False leaves some of its messages in
    try:
        with ExitStack() as silent:
            if not PartialState().is_main_process:
                silent.enter_context(redirect_stdout(others))
                silent.enter_context(redirect_stderr(others))
            return tyro.cli(form, **options)
    except SystemExit:
        after_main("options")
        raise


@contextmanager
def plain_output() -> Iterator[None]:
    """Context of a command: warnings in its own words alone, and no bars of libraries beside its own."""
    disable_diffusers_bar()
    datasets.disable_progress_bars()
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    usual = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *place: Any) -> str:
        return f"Warning: {message}\n" if category is UserWarning else usual(message, category, *place)

    warnings.formatwarning = plain  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = usual


def say(text: str) -> None:
    """Print a line as it stands, so that a path in it can be copied."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def resumable(out: Path | None) -> Iterator[None]:
    """Context of work that the same command can continue: on Ctrl-C it says so, once, and exits with 130.

    Args:
        out: the folder; None = nothing is kept.
    """
    try:
        yield
    except KeyboardInterrupt:
        kept = (
            f"The same command goes on with {escape(str(out))} later." if out else "Without --output nothing is kept."
        )
        say_once("stopped", lambda: Console(stderr=True).print(f"[yellow]Stopped.[/] {kept}", soft_wrap=True))
        end("stopped by Ctrl-C", 130)


def print_table(title: str, values: Mapping[str, Any]) -> None:
    """Print a row for each name and value; nothing if there is none."""
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in values.items():
        table.add_row(escape(key), escape(_short(value)))
    if values:
        Console().print(table)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        items = (
            (name, f"({_short(item)})" if isinstance(item, dict) else _short(item)) for name, item in value.items()
        )
        return "  ".join(f"{name}={item}" for name, item in items)
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@contextmanager
def reporting(console: Console, advice: str, *, device: str | None = None) -> Iterator[None]:
    """Context of a command of one or several processes: errors are printed once, and become its exit status.

    Args:
        console: for messages that are no errors.
        advice: what to try when memory runs out.
        device: that was asked for; None = that of the process, which is tried first.
    """
    try:
        state = joined(timedelta(hours=2))  # in which the slowest process samples its share of a grid
        if device is None and state.num_processes == 1:  # of several each has been tried
            check_own_gpu(state)
        with plain_output():
            yield
    except (DataError, ImportError, OSError, RunError, TrainingError, ValueError) as error:
        refuse(error)
    except KeyboardInterrupt:
        Console(stderr=True).print("[yellow]Stopped at once; nothing was saved beyond what the run's folder holds.")
        end("stopped by Ctrl-C", 130)
    except Interrupted as stop:
        if PartialState().is_main_process:
            console.print(f"[yellow]{escape(str(stop))}", soft_wrap=True)
        sys.exit(stop.exit_code)
    except Exception as error:
        if not is_out_of_memory(error):
            crash(error)
        said = str(error).partition("\n")[0]  # CUDA's advice on debugging comes after it
        refuse(RuntimeError(f"the memory ran out: {said or 'MemoryError'}\n{advice}"))
