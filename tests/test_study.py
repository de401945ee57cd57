"""A study from end to end, with tiny flows, few images and a stand-in for the network that makes features."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from itarflow.commands import noise_dilemma as studies
from itarflow.commands import study as command
from itarflow.commands.noise_dilemma import REAL, Study, run_study
from itarflow.data import DataConfig
from itarflow.evaluation import evaluate as evaluating
from itarflow.evaluation.metrics.extractors import Features
from itarflow.evaluation.samples.files import open_samples
from itarflow.flow import NoiseConfig
from itarflow.presets import ModelConfig
from itarflow.runtime.errors import DataError
from itarflow.training import Recipe, SamplingConfig, TrainConfig


class Means:
    """Features: mean and spread of each half."""

    name = "halves"
    identity = "halves-1"

    def __call__(self, images: Tensor) -> Features:
        halves = images.float().flatten(1).unflatten(1, (2, -1)) / 255
        return Features(torch.cat([halves.mean(dim=2), halves.std(dim=2)], dim=1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 8)):
        for label in ("dark", "light"):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 128, (4, 4, 3)) + 128 * (label == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def tiny(photos: Path) -> Study:
    recipe = Recipe(
        name="itarflow",
        model=ModelConfig(image_size=4, num_classes=2, patch_size=2, channels=64, num_layers=(1, 1)),
        data=DataConfig(path=str(photos), held_out_split="test", num_workers=0),
        noise=NoiseConfig(t_min=0.05, t_max=0.5),
        train=TrainConfig(epochs=1, batch_size=8, warmup_epochs=0, trackers=()),
        sampling=SamplingConfig(num_images=2),
    )
    return Study(
        recipe=recipe,
        single_levels=(0.1, 0.5),
        num_samples=6,
        extractor="halves",
        num_denoise_steps=(1, 3),
        likelihood_images=4,
        batch_size=4,
    )


@pytest.fixture(autouse=True)
def _means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(studies, "load_extractor", lambda *_: Means())
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("itarflow.evaluation.metrics.reference.statistics_folder", lambda: tmp_path / "statistics")


@pytest.fixture(scope="module")
def done(tiny: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("study")
        patch.setattr(studies, "load_extractor", lambda *_: Means())
        patch.setattr("itarflow.evaluation.metrics.reference.statistics_folder", lambda: folder / "statistics")
        return folder, run_study(tiny, folder, device="cpu")


def test_every_flow_is_cleaned_in_every_way(done: tuple[Path, dict[str, Any]]) -> None:
    folder, report = done
    assert {name: list(flow["scores"]) for name, flow in report["flows"].items()} == {
        "tarflow-0.1": ["raw", "self", "01", "03"],
        "tarflow-0.5": ["raw", "self", "01", "03"],
        "itarflow": ["raw", "01", "03"],
    }
    levels = {name: [one["noise_level"] for one in flow["likelihood"]] for name, flow in report["flows"].items()}
    assert levels == {"tarflow-0.1": [0.1], "tarflow-0.5": [0.5], "itarflow": [0.1, 0.5]}
    assert report[REAL]["samples"] == 6
    assert all(flow["training"]["steps"] == 3 for flow in report["flows"].values())
    assert json.loads((folder / "study.json").read_text()) == json.loads(json.dumps(report))
    for picture in ("distances.png", "samples.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 300


def test_samples_share_noise_and_labels(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    for name in ("tarflow-0.1", "tarflow-0.5", "itarflow"):
        labels = open_samples(folder / "samples" / name / "raw").labels
        assert labels is not None
        assert labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_a_study_that_is_done_is_not_done_again(
    done: tuple[Path, dict[str, Any]], tiny: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this was done before")

    folder, report = done
    monkeypatch.setattr(studies, "train", refuse)
    monkeypatch.setattr(evaluating, "score_samples", refuse)
    monkeypatch.setattr("itarflow.evaluation.metrics.reference.statistics_folder", lambda: folder / "statistics")
    again = run_study(tiny, folder, device="cpu")
    for flow in report["flows"]:
        assert again["flows"][flow] == report["flows"][flow]


def test_runs_that_were_brought_here_without_states_are_used(
    done: tuple[Path, dict[str, Any]], tiny: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, report = done
    for name in tiny.recipes:
        (tmp_path / name).mkdir()
        (folder / name / "pipeline").rename(tmp_path / name / "pipeline")
        (tmp_path / name / "finished.json").write_text((folder / name / "finished.json").read_text())
    try:
        monkeypatch.delattr(studies, "train")
        again = run_study(tiny, tmp_path, device="cpu")
    finally:
        for name in tiny.recipes:
            (tmp_path / name / "pipeline").rename(folder / name / "pipeline")
    assert again["flows"]["itarflow"]["scores"] == report["flows"]["itarflow"]["scores"]


def test_other_samples_are_scored_anew(
    done: tuple[Path, dict[str, Any]], tiny: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = done
    scored = list[str]()
    real: Callable[..., Any] = evaluating.score_samples

    def score(samples: Any, *rest: Any, **options: Any) -> Any:
        scored.append(samples.name)
        return real(samples, *rest, **options)

    monkeypatch.setattr(evaluating, "score_samples", score)
    monkeypatch.setattr("itarflow.evaluation.metrics.reference.statistics_folder", lambda: folder / "statistics")
    kept = folder / "samples" / "itarflow" / "03" / "scores.json"
    stored = json.loads(kept.read_text())
    stored["of"]["samples"]["seed"] = 5
    kept.write_text(json.dumps(stored))
    run_study(tiny, folder, device="cpu")
    assert scored == ["itarflow/03"]


def test_the_command_prints_a_table_and_refuses_what_it_does_not_know(
    done: tuple[Path, dict[str, Any]], tiny: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = done
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("itarflow.evaluation.metrics.reference.statistics_folder", lambda: folder / "statistics")
    command.main({"cpu": tiny}, args=["--output", str(folder)])
    printed = capsys.readouterr().out
    assert "Fréchet distance (halves) of 6 samples" in printed
    assert "tarflow-0.5" in printed
    for words, message in (
        (["--scale", "huge"], "--scale is 'huge'; expected one of cpu"),
        (["--num-samples", "1"], "--num-samples is 1"),
    ):
        with pytest.raises(SystemExit):
            command.main({"cpu": tiny}, args=words)
        assert message in capsys.readouterr().err


def test_real_images_are_needed_that_are_not_trained_on(tiny: Study, tmp_path: Path) -> None:
    without = replace(tiny, recipe=replace(tiny.recipe, data=replace(tiny.recipe.data, held_out_split=None)))
    with pytest.raises(ValueError, match="held_out_split"):
        run_study(without, tmp_path, device="cpu")


def test_too_few_real_images_are_refused_before_the_training(tiny: Study, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 16 images, but likelihood_images is 17"):
        run_study(replace(tiny, likelihood_images=17), tmp_path, device="cpu")
    assert not (tmp_path / "itarflow").exists()
