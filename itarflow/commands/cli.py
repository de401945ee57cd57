"""The command `itarflow`: the commands by group. A command is imported when it is called."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from itarflow import __version__
from itarflow.runtime.errors import CheckpointError, RunError
from itarflow.runtime.text import printable


class Command(NamedTuple):
    """A command, before it is imported.

    Attributes:
        group: under which it is listed.
        place: "module:name" within itarflow.commands, of a dataclass with a method `run`, or of a function of the
            words that follow.
        summary: what it does, in a line.
    """

    group: str
    place: str
    summary: str


COMMANDS = {
    "train": Command("Train", "recipe_file:run_file", "Train a flow by a recipe, on one device."),
    "plot": Command("Train", "plot:Plot", "Draw the curves of one run, or of several over one another."),
    "sample": Command("Sample", "sample:Sample", "Generate images with a checkpoint."),
    "profile": Command("Sample", "profile:Profile", "Find the fastest inverse of a checkpoint, and store it."),
    "evaluate": Command("Measure", "evaluate:Evaluate", "FID and other figures of a checkpoint's samples."),
    "sweep": Command("Measure", "sweep:Sweep", "The same over guidance, denoising steps, solvers and noise levels."),
    "table": Command("Measure", "table:Table", "The evaluations of several checkpoints, side by side."),
    "compare": Command("Measure", "compare:Compare", "Checkpoints and denoisers side by side, from the same noise."),
    "bpd": Command("Measure", "bpd:Bpd", "How likely images are: bits per dimension, nats by noise level."),
    "diagnose": Command("Measure", "diagnose:Diagnose", "Find collapsed and blurred samples, beside real images."),
    "prepare": Command("Data", "prepare:Prepare", "Crop and resize a data set once, into parquet files."),
    "info": Command("Share", "info:Info", "What a checkpoint is, and how it was trained."),
    "convert": Command("Share", "convert:Convert", "Official checkpoints into pipelines, and back."),
}


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 and a message where something is wrong, with 2 where the words are.

    Args:
        args: the words after `itarflow`; None = the process's.
    """
    words = list(sys.argv[1:] if args is None else args)
    if any(word.partition("=")[0] == "--plugins" for word in words):
        words = _load_plugins(words)
    if not words or words[0] in ("-h", "--help"):
        _print_help()
        sys.exit(0)
    if words[0] == "--version":
        print(f"itarflow {__version__}")  # noqa: T201
        sys.exit(0)
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, 1)
        advice = f"did you mean {near[0]}?" if near else "itarflow --help lists them."
        Console(stderr=True).print(Text(f"Error: {words[0]!r} is no command of itarflow; {advice}"), soft_wrap=True)
        sys.exit(2)
    _run(words[0], words[1:])


def _load_plugins(words: list[str]) -> list[str]:
    """Load the files that --plugins names, before any option is parsed, since options know their names."""
    from itarflow.plugins import load_named

    try:
        return load_named(words)
    except (OSError, ValueError) as error:
        _refuse(str(error))


def _run(name: str, words: list[str]) -> None:
    module, named = COMMANDS[name].place.split(":")
    command: Any = getattr(import_module(f"itarflow.commands.{module}"), named)
    if not isinstance(command, type):
        command(words)
        return

    import tyro

    from itarflow.commands.console import plain_output
    from itarflow.plugins import HELP
    from itarflow.runtime.devices import is_out_of_memory

    description = f"{inspect.getdoc(command)}\n\n{HELP}"
    try:
        form: Any = tyro.cli(command, prog=f"itarflow {name}", description=description, args=words)
        with plain_output():
            form.run()
    except (CheckpointError, ImportError, OSError, RunError, ValueError) as error:
        _refuse(str(error))
    except RecursionError as error:
        _refuse(f"a file is nested too deeply, or damaged ({error}); copy or make it again.")
    except OverflowError as error:
        _refuse(f"a number is too large ({error}), of an option or in a file that is damaged.")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0]  # CUDA's advice on debugging comes after it
        _refuse(f"memory ran out ({said}). Ask for less at a time; damaged files may claim any size, too.")
    except KeyboardInterrupt:
        Console(stderr=True).print("[yellow]Stopped.")
        sys.exit(130)


def _refuse(message: str) -> NoReturn:
    """Print what is wrong, with names of foreign origin as they can be shown, and exit with 1."""
    from itarflow.runtime.processes import refuse

    refuse(RuntimeError(printable(message)))


def _print_help() -> None:
    console = Console()
    console.print("usage: [bold]itarflow COMMAND[/] ...\n\nNormalizing flows that generate images.", highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    group = ""
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            table.add_row()
            table.add_row(f"[bold]{group}")
        table.add_row(f"  [cyan]{name}", command.summary)
    console.print(table)
    console.print(
        "\n[bold]itarflow COMMAND --help[/] explains a command and its options. First steps: itarflow train digits, "
        "and then\nitarflow sample runs/digits/pipeline.",
        highlight=False,
        soft_wrap=True,
    )
