"""Every file in recipes/: it holds a recipe, and its dry run works without a network."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from itarflow.training import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))
CLASSES = ("cat", "dog", "wild")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images of three classes, in the splits that recipes ask for."""
    folder = tmp_path_factory.mktemp("pets")
    for split in ("train", "validation", "test"):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (8, 8)).save(folder / split / name / f"{index}.png")
    return folder


def recipe_in(path: Path) -> Recipe:
    return runpy.run_path(str(path))["recipe"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_named_as_its_file_fits_together_and_says_how_to_launch_it(path):
    names = runpy.run_path(str(path))
    recipe = names["recipe"]
    assert isinstance(recipe, Recipe)
    assert recipe.name == path.stem
    recipe.check(num_processes=8 if recipe.train.batch_size % 8 == 0 else 1)
    assert f"accelerate launch recipes/{path.name}" in names["__doc__"]


@pytest.mark.parametrize(
    "path",
    [
        # One of pixels on any machine and one of codes; the rest differ in their data alone.
        pytest.param(path, marks=[] if path.stem in ("digits",) else pytest.mark.slow)
        for path in RECIPES
    ],
    ids=lambda path: path.stem,
)
def test_the_dry_run_of_a_recipe_works_offline(path, pets, monkeypatch, capsys, tmp_path):
    recipe = recipe_in(path)
    words = [str(path), "--dry-run"]
    if recipe.codec.vae is not None:  # on the Hub
        found = "not checked: the VAE"
    else:
        found = "1,618" if recipe.data.path == "digits" else f"{pets}: "
    if recipe.data.path != "digits":
        words += ["--data.path", str(pets)]
        if recipe.model.num_classes:
            words += ["--model.num-classes", str(len(CLASSES))]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    with torch.device("meta"):
        flow = recipe.model.build()
    embeddings = sum(block.class_embedding.weight.numel() for block in flow.blocks if recipe.model.num_classes)
    kept = (
        embeddings if recipe.data.path == "digits" else embeddings * len(CLASSES) // max(recipe.model.num_classes, 1)
    )
    assert f"({sum(p.numel() for p in flow.parameters()) - embeddings + kept:,})" in printed
    assert f"image_size={recipe.model.image_size}" in printed
    assert found in printed
    assert "time on one H200" in printed
    assert not (tmp_path / "runs").exists()


def test_there_is_a_recipe_for_the_papers_and_for_newcomers():
    assert {"digits", "imagenet64_pixel", "imagenet128_pixel", "imagenet256_pixel"} <= {path.stem for path in RECIPES}
