"""The frame of a training: what comes before what, and that the model is gone before the connection is closed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_training import tiny_recipe
from torch import Tensor, nn

from itarflow.data import load_data
from itarflow.data.loader import Batch
from itarflow.runtime.errors import TrainingError
from itarflow.runtime.signals import Interrupted, StopSignal
from itarflow.training import Recipe
from itarflow.training.loop import Loop
from itarflow.training.run_folder import RunDir, claimed


class _Output(NamedTuple):
    loss: Tensor
    grad_norm: float


class _Counting(Loop[_Output, list[str]]):
    """Learns nothing, and notes what it is asked for; its bad step number `bad` has no finite gradient."""

    task, advice = "counter", "Count lower."

    def __init__(self, recipe: Recipe, path: Path, stop: StopSignal, bad: int | None = None) -> None:
        data, accelerator = load_data(recipe.data, image_size=8, in_channels=1), Accelerator(cpu=True)
        super().__init__(recipe, RunDir(path), data, accelerator, stop, name="count", total_steps=5)
        self.model: nn.Module = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.ema, self.bad = None, bad
        self.events: list[str] = []

    def plan(self) -> str:
        return f"A plan. {self.shares()}"

    def step(self, number: int, micro_batches: Sequence[Batch]) -> _Output:
        self.events.append(f"step {number}")
        if self.own.get("stop at") == number:
            self.stop.signal_number = 15
        return _Output(torch.tensor(1.0), float("nan") if number == self.bad else 1.0)

    def bad_step_report(self, output: _Output) -> str:
        return " It was the moon."

    def metrics(self, output: _Output) -> dict[str, Any]:
        return {"loss": float(output.loss)}

    def end_of_step(self, last_step: int) -> None:
        self.events.append("end")

    def evaluate(self) -> None:
        self.events.append("evaluate")
        self.measured_at = self.state.step

    def export(self) -> None:
        self.events.append(f"saved {self.saved_at}")

    def load_state(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.events.append(f"load {len(lines)}")

    def finish(self) -> list[str]:
        self.events.append("finish")
        return self.events


def run(path: Path, *, resume: bool = False, bad: int | None = None, max_bad_steps: int = 10) -> list[str]:
    recipe = tiny_recipe(save_every=2, max_bad_steps=max_bad_steps)
    with claimed(RunDir(path), recipe, Accelerator(cpu=True), "resume" if resume else "fresh", False) as stop:
        return _Counting(recipe, path, stop, bad).run_to(3 if not resume else None, resume=resume)


@pytest.mark.slow
def test_states_are_saved_before_anything_else_is_done(tmp_path: Path) -> None:
    first = ["step 0", "end", "step 1", "saved 2", "end", "step 2", "end", "saved 3", "evaluate", "finish"]
    assert run(tmp_path) == first
    assert run(tmp_path, resume=True) == [
        "load 3", "saved 3", "end", "step 3", "saved 4", "end", "step 4", "end", "saved 5", "evaluate", "finish",
    ]  # fmt: skip


def test_who_gives_up_saves_and_says_whose_fault_it_was_and_how_to_go_on(tmp_path: Path) -> None:
    message = "1 steps in a row had no finite gradient, up to step 1, whose state is saved. It was the moon. Count low"
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, bad=0, max_bad_steps=1)
    assert [state.name for state in RunDir(tmp_path).states()] == ["step-00000001"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_gone_before_the_connection_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    alive: list[bool] = []
    monkeypatch.setattr(AcceleratorState, "destroy_process_group", lambda _: alive.append(model() is not None))
    recipe = tiny_recipe()
    with claimed(RunDir(tmp_path), recipe, Accelerator(cpu=True), "fresh", False) as stop:
        loop = _Counting(recipe, tmp_path, stop)
        model = weakref.ref(loop.model)
        loop.own = {"stop at": 1} if interrupted else {}
        if interrupted:
            with pytest.raises(Interrupted, match="Stopped at step 2"):
                loop.run_to(3, resume=False)
        else:
            loop.run_to(3, resume=False)
    assert alive == [False]
