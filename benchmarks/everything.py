"""All paths one after another in a single call, for machines that are there for minutes only."""

from __future__ import annotations

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

    def run(self, command: str, console: Console) -> None:
        """Measure all; raises ValueError in the end if something failed."""
        shared = {field.name: getattr(self, field.name) for field in fields(Options)}
        benches: list[Bench] = [Inverse(**shared), Score(**shared), Sample(**shared, steps=30), Train(**shared)]
        failed = []
        for bench in benches:
            dtype = "bf16" if isinstance(bench, Train) else self.dtype
            try:
                measure(replace(bench, dtype=dtype, json=self.out / f"{bench.name}.json"), command, console)
            except (RuntimeError, ValueError):
                failed.append(bench.name)
                console.print(traceback.format_exc(), markup=False)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if failed:
            raise ValueError(f"{', '.join(failed)} could not be measured; see above. The others are in {self.out}/.")
