"""Fixtures for tests of commands: what one prints, what it refuses, and pipelines to give it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from itarflow import DenoiseScheduler, ITARFlowPipeline, TARFlow
from itarflow.commands import cli

TRAINING = {
    "name": "pets",
    "data": "someone/pets",
    "steps": 123,
    "metrics": {"held-out nll at t=0.5 (nats/dim)": -1.25},
    "recipe": {"name": "pets", "train": {"epochs": 7}},
}
Run = Callable[..., str]
Save = Callable[..., Path]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """run("info", folder): what the command prints, in a terminal of 200 columns; the current folder is empty."""
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*words: object) -> str:
        cli.main([str(word) for word in words])
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """refused("info", folder): the message after "Error: ", once the command has exited with 1."""

    def call(*words: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            run(*words)
        printed = capsys.readouterr()
        assert exit_.value.code == 1
        assert "Traceback" not in printed.out + printed.err
        return printed.err.split("Error: ")[1]

    return call


@pytest.fixture
def save(make_flow: Callable[..., TARFlow], tmp_path: Path) -> Save:
    """save(): the folder of a pipeline; `flow` are the flow's arguments, `changes` the pipeline's."""

    def make(flow: dict[str, Any] | None = None, **changes: Any) -> Path:
        built = make_flow(**{"in_channels": 3, "noise_range": (0.02, 0.6)} | (flow or {}))
        names = ["cat", "dog", "bird"] if built.config.num_classes == 3 else None
        scheduler = DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2)
        arguments = {"class_names": names, "guidance": {"weight": 1.5}, "training": TRAINING} | changes
        ITARFlowPipeline(built, scheduler, **arguments).save_pretrained(tmp_path / "pets")
        return tmp_path / "pets"

    return make
