"""One runner for all figures of speed and memory: a subcommand a path.

python benchmarks/run.py inverse recipes/cifar10.py --batch-sizes 1 16 --peer ../ml-itarflow --json out.json
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from diffusers.utils.logging import disable_progress_bar
from everything import Everything
from floors import Costs, Floor
from loading import Loader
from measure import measure
from paths import Bench, Inverse, Sample, Score, Train
from rich.console import Console
from rich.markup import escape

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Inverse, tyro.conf.subcommand("inverse")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Everything, tyro.conf.subcommand("everything")]
    | Annotated[Loader, tyro.conf.subcommand("loader")]
    | Annotated[Floor, tyro.conf.subcommand("floor")]
    | Annotated[Costs, tyro.conf.subcommand("costs")]
)


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 and a message where something is wrong.

    Args:
        args: the words after the script's name; None = the process's.
    """
    words = sys.argv[1:] if args is None else list(args)
    command = shlex.join(["python", "benchmarks/run.py", *words])
    disable_progress_bar()  # diffusers' own, for the loading of files
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        chosen: Any = tyro.cli(Command, prog="benchmarks/run.py", description=__doc__, args=words)
        if isinstance(chosen, Bench):
            measure(chosen, command, console)
        else:
            chosen.run(command, console)
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
