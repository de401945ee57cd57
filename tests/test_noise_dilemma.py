"""A study from end to end, with tiny flows, few images and a stand-in for the network that makes features."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_extractor import TinyExtractor

from itarflow.data import DataConfig
from itarflow.evaluation import scoring as evaluating
from itarflow.evaluation.samples.files import open_samples
from itarflow.flow import NoiseConfig
from itarflow.presets import ModelConfig
from itarflow.runtime.errors import DataError
from itarflow.training import Recipe, SamplingConfig, TrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import noise_dilemma
from noise_dilemma import Study, run, scales

pytestmark = pytest.mark.slow  # four trainings


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
        levels=(0.1, 0.5),
        num_samples=6,
        extractor="tiny",
        num_denoise_steps=(1, 3),
        likelihood_images=4,
        batch_size=4,
    )


@pytest.fixture(autouse=True)
def _means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(noise_dilemma, "load_extractor", lambda *_: TinyExtractor())
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("itarflow.evaluation.metrics.reference.statistics_folder", lambda: tmp_path / "statistics")


@pytest.fixture(scope="module")
def done(tiny: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("study")
        patch.setattr(noise_dilemma, "load_extractor", lambda *_: TinyExtractor())
        patch.setattr("itarflow.evaluation.metrics.reference.statistics_folder", lambda: folder / "statistics")
        return folder, run(tiny, folder, "cpu")


def test_every_flow_is_denoised_in_every_way(done: tuple[Path, dict[str, Any]]) -> None:
    folder, report = done
    assert {name: list(flow["scores"]) for name, flow in report["flows"].items()} == {
        "tarflow-0.1": ["raw", "self", "01", "03"],
        "tarflow-0.5": ["raw", "self", "01", "03"],
        "itarflow": ["raw", "01", "03"],
    }
    levels = {name: [one["noise_level"] for one in flow["likelihood"]] for name, flow in report["flows"].items()}
    assert levels == {"tarflow-0.1": [0.1], "tarflow-0.5": [0.5], "itarflow": [0.1, 0.5]}
    assert report["real images"]["samples"] == 6
    assert all(flow["training"]["steps"] == 3 for flow in report["flows"].values())
    assert json.loads((folder / "study.json").read_text()) == json.loads(json.dumps(report))
    for name in report["flows"]:
        labels = open_samples(folder / "samples" / name / "raw").labels
        assert labels is not None
        assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    for picture in ("distances.png", "samples.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 300


def test_a_study_that_is_done_is_not_done_again(
    done: tuple[Path, dict[str, Any]], tiny: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this was done before")

    folder, report = done
    monkeypatch.setattr(noise_dilemma, "train", refuse)
    monkeypatch.setattr(evaluating, "score_samples", refuse)
    monkeypatch.setattr("itarflow.evaluation.metrics.reference.statistics_folder", lambda: folder / "statistics")
    again = run(tiny, folder, "cpu")
    for flow in report["flows"]:
        assert again["flows"][flow] == report["flows"][flow]


def test_the_command_prints_a_table_and_refuses_what_it_does_not_know(
    done: tuple[Path, dict[str, Any]], tiny: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = done
    monkeypatch.setattr("itarflow.evaluation.metrics.reference.statistics_folder", lambda: folder / "statistics")
    monkeypatch.setitem(scales, "cpu", tiny)
    noise_dilemma.main(output=folder, device="cpu")
    printed = capsys.readouterr().out
    assert "Fréchet distance (tiny) of 6 samples" in printed
    assert f"{noise_dilemma.distance_of(report['flows']['tarflow-0.5']['scores']['03'])['value']:.4g}" in printed
    with pytest.raises(ValueError, match="'huge'; expected one of cpu, gpu"):
        noise_dilemma.main("huge")
    with pytest.raises(ValueError, match="--num-samples is 1"):
        noise_dilemma.main(num_samples=1)


def test_the_flows_differ_in_their_noise_alone() -> None:
    for study in scales.values():
        recipes = study.recipes
        assert list(recipes) == ["tarflow-0.05", "tarflow-0.1", "tarflow-0.3", "itarflow"]
        for recipe in recipes.values():
            recipe.check()
            assert (recipe.train, recipe.data) == (study.recipe.train, study.recipe.data)
            assert replace(recipe.model, noise_conditioned=True) == study.recipe.model
        # 64 MB of weights of all four in bfloat16, as the comment says.
        assert sum(recipe.model.build().num_parameters() for recipe in recipes.values()) * 2 < 64e6


def test_too_few_real_images_are_refused_before_the_training(tiny: Study, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 16 images, but likelihood_images is 17"):
        run(replace(tiny, likelihood_images=17), tmp_path, "cpu")
    assert not (tmp_path / "itarflow").exists()
