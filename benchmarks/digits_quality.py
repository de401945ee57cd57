"""How good are the digits? Class accuracy by an SVC, novelty by nearest neighbours, the course of the held-out NLL.

python benchmarks/digits_quality.py --pipeline runs/digits/pipeline
python benchmarks/digits_quality.py --pipeline runs/digits_text/pipeline    # by prompts: "a photo of a seven"
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from digits_text import NAMES
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from itarflow import ITARFlowPipeline

console = Console(width=110)


@dataclass
class Options:
    """Score a pipeline that recipes/digits.py or recipes/digits_text.py has trained."""

    pipeline: Path = Path("runs/digits/pipeline")
    """The pipeline."""
    per_class: int = 100
    """Generated images of each class."""
    seed: int = 1
    """Seed of the generated images."""
    prompt: str = "a photo of a {}"
    """Of a model of captions: what it is asked for, {} is zero, one, ... nine."""


def main(options: Options) -> None:
    """Print the three tables."""
    digits = load_digits()
    real = np.round(digits.images * 255 / 16).reshape(len(digits.images), -1)
    judge = SVC(C=10).fit(real, digits.target)
    own = cross_val_score(SVC(C=10), real, digits.target, cv=10).mean()

    pipe = ITARFlowPipeline.from_pretrained(options.pipeline)
    labels = [label for label in range(10) for _ in range(options.per_class)]
    began = time.perf_counter()
    # Folders called zero ... nine are classes in another order.
    by_name = set(pipe.class_names) == set(NAMES)
    asked: dict[str, Any] = {"class_labels": [NAMES[label] for label in labels] if by_name else labels}
    if pipe.takes_prompts:
        asked = {"prompt": [options.prompt.format(NAMES[label]) for label in labels]}
    images = pipe(**asked, generator=torch.Generator().manual_seed(options.seed)).images
    seconds = time.perf_counter() - began
    generated = np.stack([np.asarray(image, dtype=np.float64) for image in images]).reshape(len(images), -1)
    right = judge.predict(generated) == np.array(labels)

    what = "prompt" if pipe.takes_prompts else "class"
    table = Table(title=f"Recognised as the requested {what}", title_justify="left")
    for column in ("images", "recognised", "worst class", "SVC on real digits, 10-fold", "sampling"):
        table.add_column(column)
    by_class = right.reshape(10, -1).mean(axis=1)
    worst = int(by_class.argmin())
    table.add_row(
        str(len(labels)), f"{right.mean():.1%}", f"{worst}: {by_class[worst]:.1%}", f"{own:.1%}",
        f"{len(labels) / seconds:.0f} images/s",
    )  # fmt: skip
    console.print(table)

    console.print(_novelty(generated / 127.5, real / 127.5))
    _course(options.pipeline.parent / "metrics.jsonl")


def _novelty(generated: np.ndarray, real: np.ndarray) -> Table:
    """Distances to the nearest real digit, next to those from each real digit to the nearest other one."""
    real_tensor, generated_tensor = torch.from_numpy(real), torch.from_numpy(generated)
    between = torch.cdist(real_tensor, real_tensor)
    between.fill_diagonal_(float("inf"))
    table = Table(title="L2 distance to the nearest real digit (pixels in [-1, 1])", title_justify="left")
    for column in ("", "smallest", "1 %", "median", "99 %"):
        table.add_column(column)
    distances = {
        "generated to real": torch.cdist(generated_tensor, real_tensor).min(dim=1).values,
        "real to other real": between.min(dim=1).values,
    }
    for name, values in distances.items():
        quantiles = torch.quantile(values, torch.tensor([0.0, 0.01, 0.5, 0.99], dtype=values.dtype))
        table.add_row(name, *(f"{value:.2f}" for value in quantiles.tolist()))
    return table


def _course(metrics: Path) -> None:
    """The held-out NLL at each evaluation, and whether it still falls at the end."""
    if not metrics.exists():
        console.print(f"[yellow]No {metrics}: the course of the held-out NLL is not shown.")
        return
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluations = {line["step"]: line["held_out"]["nll"] for line in lines if "held_out" in line}
    levels = list(next(iter(evaluations.values())))
    table = Table(title="Held-out NLL, nats/dim", title_justify="left")
    for column in ("step", *(f"t={level}" for level in levels)):
        table.add_column(column)
    for step, values in evaluations.items():
        table.add_row(str(step), *(f"{values[level]:.4f}" for level in levels))
    console.print(table)
    *_, before, last = evaluations.values()
    falling = [level for level in levels if last[level] < before[level]]
    console.print(f"Still falling at the last evaluation: {len(falling)} of {len(levels)} noise levels.")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
