"""How exactly `DiffusionDenoiser` maps our noise levels to a diffusion model's steps.

Run `python benchmarks/diffusion_mapping.py`; it needs no GPU and takes seconds. The data are Gaussian, so the ideal
prediction of the model and the true E[x_0 | x_t] are both known; the model is that of tests/ideal_diffusion.py.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from ideal_diffusion import PREDICTIONS, SCHEDULES, mapping_error, sigmas

COUNT = 20_000


def mapping_table() -> Table:
    """One row a schedule and prediction type: the largest error over 20,000 levels of a range."""
    table = Table(title="Largest error of the clean estimate, in standard deviations of the data")
    for column in ("schedule", "noise levels", "prediction"):
        table.add_column(column)
    for column in ("float64, whole range", "float32, 0.01 to 1", "float32, whole range"):
        table.add_column(column, justify="right")
    for schedule in SCHEDULES:
        table_of_levels = sigmas(DDPMScheduler(1000, beta_schedule=schedule))
        low, high = float(table_of_levels[0]), float(table_of_levels[-1])
        whole = spread(low, high)
        usual = spread(max(low, 0.01), 1.0)
        for prediction in PREDICTIONS:
            errors = (
                mapping_error(schedule, prediction, levels, dtype)
                for levels, dtype in ((whole, torch.float64), (usual, torch.float32), (whole, torch.float32))
            )
            table.add_row(schedule, f"{low:.4g} to {high:.4g}", prediction, *(f"{error:.1e}" for error in errors))
    return table


def spread(low: float, high: float) -> torch.Tensor:
    """Levels evenly spaced in log t, both ends included."""
    return torch.linspace(math.log(low), math.log(high), COUNT, dtype=torch.float64).exp()


def main() -> None:
    """Print the table."""
    Console(width=140).print(mapping_table())


if __name__ == "__main__":
    main()
