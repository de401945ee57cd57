"""The command `itarflow`: sample from checkpoints, compare, measure, speed up and convert them, and prepare images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from diffusers.utils.logging import disable_progress_bar
from rich.console import Console

from itarflow.commands.bpd import Bpd
from itarflow.commands.compare import Compare
from itarflow.commands.convert import Convert
from itarflow.commands.diagnose import Diagnose
from itarflow.commands.evaluate import Evaluate
from itarflow.commands.info import Info
from itarflow.commands.plot import Plot
from itarflow.commands.prepare import Prepare
from itarflow.commands.profile import Profile
from itarflow.commands.sample import Sample
from itarflow.commands.sweep import Sweep
from itarflow.runtime.errors import CheckpointError, RunError
from itarflow.runtime.processes import refuse

Command = (
    Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Bpd, tyro.conf.subcommand("bpd")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
)


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 and a message where something is wrong.

    Args:
        args: the words after `itarflow`; None = the process's.
    """
    disable_progress_bar()  # diffusers' own, for the loading of files; that of sampling stays
    command: Any = tyro.cli(
        Command,
        prog="itarflow",
        description="Normalizing flows that generate images. Training is started by the files in recipes/.",
        args=args,
    )
    try:
        command.run()
    except (CheckpointError, ImportError, OSError, RunError, ValueError) as error:
        refuse(error)
    except KeyboardInterrupt:
        Console(stderr=True).print("[yellow]Stopped.")
        sys.exit(130)
