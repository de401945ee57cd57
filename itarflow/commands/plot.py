"""`itarflow plot`: the curves of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from itarflow.commands.console import say
from itarflow.runtime.files import check_writable
from itarflow.training.curves import plot_runs


@dataclass(frozen=True)
class Plot:
    """Draw the curves of one training, or of several over one another.

    Example: itarflow plot runs/digits --output curves.png
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """Folders of runs, such as runs/digits."""
    output: Path = Path("curves.png")
    """Image file: .png, .svg or .pdf."""

    def run(self) -> None:
        """Carry the command out."""
        if not self.runs:
            raise ValueError("no run is named; expected folders such as runs/digits.")
        if self.output.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--output {self.output} has an unknown image format; use .png, .svg or .pdf.")
        check_writable(self.output.parent)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        plot_runs(self.runs, self.output)
        say(f"curves in {self.output}")
