"""Settings that any training has, and how they are stored and compared with those of a stored run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from itarflow.data.load import DataConfig
from itarflow.runtime.files import write_json
from itarflow.runtime.text import flat

LARGEST = 10**9
"""No count of images, steps or epochs is above it: products of two of them are still exact."""
_SMALL, _LARGE = 1e-30, 1e30
"""Rates that float32 can hold, and products with them."""


class Optimisation:
    """Base of training configs: dataclasses that give these settings their defaults, help and order."""

    batch_size: int
    accumulation: int
    learning_rate: float
    min_learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float | None
    ema_decay: float | None
    seed: int
    log_every: int
    save_every: int
    keep_states: int
    max_bad_steps: int

    def check_numbers(self, *, positive: Sequence[str], not_negative: Sequence[str]) -> None:
        """Refuse numbers out of range.

        Args:
            positive: further settings that must be > 0.
            not_negative: further settings that must be >= 0.

        Raises:
            ValueError: naming the setting.
        """
        shared = ("batch_size", "accumulation", "log_every", "save_every", "keep_states", "max_bad_steps")
        ranges: list[tuple[str, str, float, float]]
        ranges = [(name, "> 0", _SMALL, LARGEST) for name in (*shared, *positive)]
        ranges += [(name, ">= 0", 0, LARGEST) for name in not_negative]
        ranges += [("learning_rate", "> 0", _SMALL, _LARGE)]
        ranges += [(name, ">= 0", 0, _LARGE) for name in ("weight_decay", "min_learning_rate")]
        for name, sign, low, high in ranges:
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"train.{name} is {value}; expected a number {sign}, at most {high:g}.")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"train.min_learning_rate {self.min_learning_rate} is above train.learning_rate {self.learning_rate}; "
                "lower one of them, or raise the other."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas is {self.betas}; expected two numbers in [0, 1).")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed is {self.seed}; expected a number from 0 to 2**32 - 1.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay is {self.ema_decay}; expected a number in [0, 1), or None.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"train.max_grad_norm is {self.max_grad_norm}; expected a number > 0, or None.")

    def check_share(self, num_processes: int) -> None:
        """Refuse a batch that the processes can't share evenly.

        Raises:
            ValueError: naming the settings.
        """
        share = num_processes * self.accumulation
        if self.batch_size % share:
            raise ValueError(
                f"train.batch_size {self.batch_size} can't be shared evenly by {num_processes} processes with "
                f"train.accumulation {self.accumulation}; expected a multiple of {share}."
            )


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate would leave out without a word, or does not know.

    Raises:
        ValueError: naming the tracker, and how to install it.
    """
    missing = {str(name.value) for name in LoggerType} - {str(name.value) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS and name != "all":
            raise ValueError(f"train.trackers has {name!r}; expected some of {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if name in missing - {"all"}:
            raise ValueError(
                f"train.trackers has {name!r}, which is not installed, so that nothing would be logged to it: "
                f"pip install {name}, or leave it out by --train.trackers with other names or none."
            )


class Settings(Protocol):
    """All settings of a run, a dataclass of plain values: a `Recipe`, or a `DecoderConfig`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def data(self) -> DataConfig:
        """The images."""

    @property
    def train(self) -> Optimisation:
        """The optimisation."""


def to_json(recipe: Settings) -> dict[str, Any]:
    """Plain values, tuples as lists: what recipe.json holds."""
    return json.loads(json.dumps(asdict(recipe)))


def write_recipe(recipe: Settings, path: Path) -> None:
    """Store the resolved recipe as JSON, whole or not at all."""
    write_json(path, to_json(recipe))


FREE = {
    "codec.vae", "codec.revision",  # another decoder, at most: see `with_identity`
    "text.encoder", "text.revision",
    "data.path", "data.num_workers", "data.in_memory", "data.max_broken", "train.log_every", "train.save_every",
    "train.keep_states", "train.trackers", "train.accumulation", "train.gradient_checkpointing", "train.shard",
    "train.compile", "train.evaluate_every_epochs", "train.sample_every_epochs", "train.max_bad_steps",
    "train.evaluate_every",
}  # fmt: skip
"""Settings that change neither weights nor losses, so that a run may go on with other values."""


def differences(stored: dict[str, Any], recipe: Settings) -> list[str]:
    """The settings on which a stored recipe and `recipe` disagree so that a run can't go on, "name: old -> new".

    A setting that did not exist yet when the run began counts as its default.
    """
    old, new = _defaults(recipe) | flat(stored), flat(to_json(recipe))
    names = sorted((old.keys() | new.keys()) - FREE)
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in names
        if not name.startswith("sampling.") and old.get(name) != new.get(name)
    ]


def _defaults(recipe: Settings) -> dict[str, Any]:
    """The defaults of all settings that have one, as `flat` of a stored recipe would give them."""
    sections = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    values = {
        name: {field.name: field.default for field in fields(section) if field.default is not MISSING}
        for name, section in sections.items()
        if is_dataclass(section)
    }
    return flat(json.loads(json.dumps(values)))


def learning_rate_factor(step: int, warmup: int, total: int, lowest: float) -> float:
    """The learning rate of step 0, 1, ... in units of the highest.

    Linear from `lowest` to 1 over `warmup` steps, then half a cosine back to `lowest` at `total`, and there it stays.
    """
    if step < warmup:
        return lowest + (1 - lowest) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
