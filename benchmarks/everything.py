"""All paths one after another in a single call, for machines that are there for minutes only."""

from __future__ import annotations

import math
import time
import traceback
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from measure import measure
from paths import Bench, Inverse, Sample, Score, Train
from rich.console import Console
from subject import Options


@dataclass(frozen=True, kw_only=True)
class Everything(Options):
    """Inverse, scores, sampling and training, a JSON file each; what fails is told, and the rest goes on.

    --dtype is that of the inverse; training is in bf16, and scores come in both.
    """

    out: Path = Path("figures")
    """Folder for the JSON files; --json plays no part."""
    minutes: float | None = None
    """Time for all of it, split between the paths: repetitions, then cases are left out. None = as long as it takes,
    which with a peer is more than twenty for a model of the papers' sizes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes is {self.minutes}; expected a number > 0, or None.")

    def run(self, command: str, console: Console) -> None:
        """Measure all; raises ValueError in the end if something failed."""
        shared = {field.name: getattr(self, field.name) for field in fields(Options)}
        benches: list[Bench] = [Inverse(**shared), Score(**shared), Sample(**shared, steps=30), Train(**shared)]
        end = math.inf if self.minutes is None else time.monotonic() + 60 * self.minutes
        failed = []
        for done, bench in enumerate(benches):
            dtype = "bf16" if isinstance(bench, Train) else self.dtype
            now = time.monotonic()
            until = now + max(0.0, end - now) / (len(benches) - done)
            try:
                measure(replace(bench, dtype=dtype, json=self.out / f"{bench.name}.json"), command, console, until)
            except Exception:  # whatever it is, the other paths' figures are worth having
                failed.append(bench.name)
                console.print(traceback.format_exc(), markup=False)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if failed:
            raise ValueError(
                f"of {', '.join(failed)} not all could be measured; see above. What could is in {self.out}/."
            )
