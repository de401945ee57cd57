"""`itarflow table`: the evaluations of several checkpoints, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from itarflow.commands.score_table import print_note, print_scores, score_table
from itarflow.evaluation.metrics.scores import Scores
from itarflow.runtime.errors import DataError
from itarflow.runtime.json_file import as_type, read_json
from itarflow.runtime.text import printable


class _Report(TypedDict):
    """What is read of evaluation.json."""

    checkpoint: str
    ways: dict[str, Scores]


@dataclass(frozen=True)
class Table:
    """Show the figures of several evaluations in one table.

    Example: itarflow table runs/first/evaluation runs/second/evaluation

    Figures compare where the real images, the number of samples and the protocol are the same; where they are not, it
    is said.
    """

    evaluations: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="EVALUATION")]
    """Folders of `itarflow evaluate`, such as runs/NAME/evaluation, or their evaluation.json."""

    def run(self) -> None:
        """Carry the command out."""
        if not self.evaluations:
            raise ValueError("no evaluation is named; expected folders such as runs/NAME/evaluation.")
        rows: dict[tuple[str, ...], Scores] = {}
        against: dict[str, list[str]] = {}
        for place in self.evaluations:
            path = place / "evaluation.json" if place.is_dir() else place
            try:
                raw = read_json(path, dict[str, Any])
            except FileNotFoundError as error:
                raise DataError(f"{path} is not there; make it by `itarflow evaluate`.") from error
            report = as_type(raw, _Report, str(path))
            name = str(path.parent.parent if path.parent.name == "evaluation" else path.parent)
            for way, scores in report["ways"].items():
                rows[printable(name), printable(way)] = scores
                what = f"{scores.samples:,} samples against {scores.reference}, by {scores.extractor}"
                against.setdefault(f"{what}; {raw.get('conversion', 'rounded')}", []).append(name)
        if not rows:
            raise DataError("the evaluations hold no figures; make them by `itarflow evaluate`.")
        print_scores(score_table(("checkpoint", "samples"), rows, alike=len(against) == 1), rows)
        if len(against) > 1:
            for what, names in against.items():
                print_note(f"{', '.join(dict.fromkeys(names))}: {what}")
