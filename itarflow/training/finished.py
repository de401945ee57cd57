"""The result of a step and of a training, whatever was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from itarflow.training.held_out import Evaluation
from itarflow.training.run_folder import RunDir


class StepOutput(Protocol):
    """What `Loop.step` returns; a subclass of `Loop` adds its own fields."""

    @property
    def loss(self) -> Tensor:
        """(), of this process's images."""

    @property
    def grad_norm(self) -> float:
        """Of all processes; not finite if the step was skipped."""


StepOutputT = TypeVar("StepOutputT", bound=StepOutput)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The result of every finished training."""

    run: RunDir
    steps: int
    total_steps: int
    """Of the whole training; more than `steps` if `max_steps` ended it before."""
    seconds: float
    """Of training, over all resumed parts."""
    images_per_second: float
    bad_steps: int
    unreadable_images: int

    def described(self) -> dict[str, str]:
        """Lines for the terminal by title: steps and speed, and skipped steps or unreadable images, if any."""
        steps = f"{self.steps:,} step{'' if self.steps == 1 else 's'}"
        if self.steps < self.total_steps:
            steps += f" of {self.total_steps:,} (--resume goes on)"
        speed = f", {self.images_per_second:.0f} images/s" if self.images_per_second else ""
        lines = {"trained": f"{steps} in {self.seconds:.0f} s{speed}"}
        if self.bad_steps:
            lines["skipped steps"] = f"[yellow]{self.bad_steps} whose gradient was not finite[/]"
        if self.unreadable_images:
            lines["unreadable images"] = f"[yellow]{self.unreadable_images}, each replaced by the next one[/]"
        return lines


@dataclass(frozen=True, kw_only=True)
class Summary(Finished):
    """The result of a finished training of a flow."""

    held_out: Evaluation
    """As `evaluate_held_out` returns it."""
    class_names: tuple[str, ...]
    prompt: str | None
    """That the pipeline takes, such as a caption; None = it takes none."""
    grid: Path
