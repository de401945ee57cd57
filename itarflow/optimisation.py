"""The settings that every training on images has in its section `train`, and what is checked of them."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Optimisation:
    """A base of dataclasses, which give the settings defaults, help, and their order among those of their own."""

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
        shared = ("batch_size", "accumulation", "learning_rate", "log_every", "save_every", "keep_states")
        for name in (*shared, "max_bad_steps", *positive):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected a number > 0.")
        for name in ("weight_decay", "min_learning_rate", *not_negative):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected a number >= 0.")
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
