"""Every file in recipes/: it holds a recipe, and its dry run works without a network."""

from __future__ import annotations

import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import tyro
from PIL import Image

from itarflow.commands.train import Options
from itarflow.inverse import Guidance
from itarflow.presets import latent_itarflow_model
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
    assert f"itarflow train {path.stem}" in names["__doc__"]


def documented(path: Path) -> dict[str, Recipe]:
    """The recipes, by name, of the commands `itarflow train` in the docstring of a recipe's file."""
    names = runpy.run_path(str(path))
    lines = names["__doc__"].replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("    itarflow train ")]
    assert all(words[2] == path.stem for words in commands)
    options = [tyro.cli(Options, default=Options(recipe=names["recipe"]), args=words[3:]) for words in commands]
    return {chosen.recipe.name: chosen.recipe for chosen in options}


def shape(recipe: Recipe) -> tuple[object, ...]:
    model, train = recipe.model, recipe.train
    return model.patch_size, model.channels, model.num_layers, train.batch_size, train.epochs, recipe.noise_range


EIGHT, S, B = (8,) * 8, (2, 2, 2, 12), (4, 4, 4, 24)
# Tables 2 to 5 and section 4 of iTARFlow, tables 4 and 7 and figure 4 of TARFlow, and their published commands:
# patch, channels, layers, batch, epochs, noise levels.
PAPERS = {
    "imagenet64_pixel": (2, 1280, B, 512, 300, (0.01, 0.3)),
    "itarflow_s_imagenet64": (2, 1280, S, 512, 300, (0.01, 0.3)),
    "tarflow_s_imagenet64": (2, 1280, S, 512, 300, (0.3, 0.3)),
    "imagenet128_pixel": (4, 1600, B, 512, 450, (0.01, 0.5)),
    "imagenet256_pixel": (8, 2176, B, 512, 600, (0.01, 0.7)),
    "imagenet256_latent": (1, 1280, B, 512, 600, (0.01, 0.5)),
    "starflow_imagenet256": (1, 2048, (2, 2, 2, 2, 2, 18), 512, 312, (0.3, 0.3)),
    "starflow_imagenet512": (1, 2048, (2, 2, 2, 2, 2, 18), 512, 312, (0.3, 0.3)),
    "tarflow_imagenet256_codes": (1, 2048, (2, 2, 2, 2, 2, 18), 512, 312, (0.3, 0.3)),
    "starflow_text": (1, 3072, (2, 2, 2, 2, 2, 24), 1024, 10, (0.3, 0.3)),
    "itarflow_starflow256": (1, 2048, (2, 2, 2, 2, 2, 18), 512, 600, (0.01, 0.5)),
    "itarflow_b_starflow256": (1, 1280, B, 512, 600, (0.01, 0.5)),
    "starflow_b_0.3": (1, 1280, B, 512, 312, (0.3, 0.3)),
    "starflow_b_0.5": (1, 1280, B, 512, 312, (0.5, 0.5)),
    "tarflow_imagenet64_bpd": (2, 768, EIGHT, 384, 60, None),
    "tarflow_imagenet64_bpd_published": (2, 768, EIGHT, 256, 100, None),
    "tarflow_imagenet64_uncond": (2, 768, EIGHT, 256, 200, (0.05, 0.05)),
    "tarflow_imagenet64_cond": (2, 1024, EIGHT, 768, 320, (0.05, 0.05)),
    "tarflow_imagenet64_cond_published": (2, 768, EIGHT, 256, 200, (0.05, 0.05)),
    "tarflow_figure4_0.2": (4, 1024, EIGHT, 512, 100, (0.2, 0.2)),
    "tarflow_imagenet128": (4, 1024, EIGHT, 768, 320, (0.15, 0.15)),
    "tarflow_imagenet128_0.05": (4, 1024, EIGHT, 768, 320, (0.05, 0.05)),
    "tarflow_afhq256": (8, 768, EIGHT, 256, 4000, (0.07, 0.07)),
}
OURS = ("cifar10", "digits", "digits_starflow", "digits_text", "photos_latent")


def test_what_a_docstring_calls_the_papers_is():
    found = {name: recipe for path in RECIPES for name, recipe in documented(path).items()}
    assert {name: shape(recipe) for name, recipe in found.items() if name not in OURS} == PAPERS
    for name in PAPERS:
        found[name].check(num_processes=8)
        train = found[name].train
        assert (train.max_grad_norm, train.ema_decay, train.learning_rate, train.betas) == (
            None,
            None,
            6.4e-5 if name == "starflow_text" else 1e-4,
            (0.9, 0.95),
        )
        assert train.label_drop == (0.0 if name == "imagenet256_pixel" else 0.1)
    weights = {name: found[name].sampling.guidance for name in PAPERS}
    assert [weights[f"imagenet{size}_pixel"].weight for size in (64, 128, 256)] == [2.1, 3.7, 4.2]
    assert weights["tarflow_figure4_0.2"].weight == 2
    assert found["tarflow_imagenet64_bpd"].products == "float32"
    assert found["tarflow_afhq256"].data.held_out_images == 0
    assert found["starflow_imagenet512"].model.image_size == found["starflow_imagenet512"].model.rotary_side == 64
    assert [name for name in PAPERS if found[name].model.takes_captions] == ["starflow_text"]
    assert found["starflow_text"].sampling.guidance == Guidance(
        weight=3.6, rule="gaussian", schedule="constant", blocks=1
    )


def test_the_former_recipe_of_codes_at_one_level_is_still_tarflows_blocks():
    former = documented(Path(RECIPES[0]).parent / "starflow_imagenet256.py")["tarflow_imagenet256_codes"].model
    assert former == replace(latent_itarflow_model("B"), noise_conditioned=False, channels=2048,
                             num_layers=(2, 2, 2, 2, 2, 18))  # fmt: skip


def test_the_recipes_of_digits_differ_in_their_blocks_alone():
    digits, text = (recipe_in(RECIPES[0].parent / f"{name}.py") for name in ("digits", "digits_text"))
    star = documented(RECIPES[0].parent / "digits.py")["digits_starflow"]
    assert replace(star, name="digits", model=digits.model) == digits
    assert replace(star.model, num_classes=0, context_dim=512, context_tokens=8) == text.model
    assert (text.train, text.noise, text.sampling) == (digits.train, digits.noise, digits.sampling)


def test_what_is_not_the_papers_limits_the_gradient():
    assert [recipe_in(path).train.max_grad_norm for path in RECIPES if path.stem in OURS] == [1.0] * 4


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
    model = recipe.model
    if path.stem == "digits_text":  # its captions are not made yet
        found = "not checked: "
    elif recipe.data.path != "digits":
        words += ["--data.path", str(pets)]
        if model.num_classes:
            words += ["--model.num-classes", str(len(CLASSES))]
            model = replace(model, num_classes=len(CLASSES))
        if model.num_classes and model.context_tokens:
            words += ["--model.context-dim", str(len(CLASSES) + 1)]
            model = replace(model, context_dim=len(CLASSES) + 1)
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    with torch.device("meta"):
        flow = model.build()
    assert f"({sum(p.numel() for p in flow.parameters()):,})" in printed
    assert f"Recipe {path.stem}" in printed
    assert found in printed
    assert "time on one H200" in printed
    assert not (tmp_path / "runs").exists()


def test_there_is_a_recipe_for_the_papers_and_for_newcomers():
    assert {"digits", "imagenet64_pixel", "imagenet128_pixel", "imagenet256_pixel"} <= {path.stem for path in RECIPES}
