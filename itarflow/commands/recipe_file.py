"""`itarflow train`: the file of a recipe, run. Until it runs nothing large is imported."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape


def run_file(words: Sequence[str]) -> None:
    """`itarflow train RECIPE [OPTIONS]`: run the file of a recipe, as `python recipes/NAME.py` does.

    Exits with 1 and a message if there is no such file.

    Args:
        words: a recipe, by its file or by its name in the folder recipes/, and its options.
    """
    if not words or words[0].startswith("-"):
        print(_USAGE)  # noqa: T201
        sys.exit(0 if words and words[0] in ("-h", "--help") else 2)
    file = next((path for path in (Path("recipes") / f"{words[0]}.py", Path(words[0])) if path.is_file()), None)
    if file is None:
        known = ", ".join(sorted(path.stem for path in Path("recipes").glob("*.py")))
        message = (
            f"there is no recipe {words[0]!r}; expected a file such as recipes/digits.py, or a name of the folder "
            + (f"recipes/: {known}." if known else "recipes/, which is not here: change to the clone of itarflow.")
        )
        Console(stderr=True).print(f"[red]Error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    given, sys.argv = sys.argv, [str(file), *words[1:]]
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv = given


_USAGE = """usage: itarflow train RECIPE [OPTIONS]

Train a flow by a recipe, in one process: a file such as recipes/digits.py, or its name, digits. For several processes
a launcher starts the file, with the same options: accelerate launch recipes/digits.py.

  itarflow train digits                       train
  itarflow train digits --dry-run             check settings and data, print parameters, FLOPs and memory
  itarflow train digits --resume              go on with a run that was stopped
  itarflow train digits --help                all settings of the recipe"""
