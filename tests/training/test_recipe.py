"""Recipes as data: what is refused, the learning rate, and what may change in a resumed run."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from itarflow.data import DataConfig
from itarflow.flow import NoiseConfig
from itarflow.inverse import Guidance
from itarflow.presets import ModelConfig
from itarflow.training import Recipe, SamplingConfig, TrainConfig
from itarflow.training.settings import differences, learning_rate_factor, to_json, write_recipe

GOLDEN = Path(__file__).parents[1] / "golden"
SECTIONS = ("model", "data", "codec", "noise", "train", "sampling")


def recipe(**changes: Any) -> Recipe:
    """A sound recipe; `changes` are named section__setting."""
    sound = Recipe(
        name="tiny",
        model=ModelConfig(image_size=8, in_channels=1, patch_size=2, channels=64, num_layers=(1, 1), num_classes=3),
        data=DataConfig(path="digits"),
        noise=NoiseConfig(t_min=0.02, t_max=0.5),
        train=TrainConfig(epochs=3, batch_size=12),
        sampling=SamplingConfig(num_denoise_steps=4, guidance=Guidance(weight=1.5)),
    )
    for name, value in changes.items():
        section, setting = name.split("__")
        sound = replace(sound, **{section: replace(getattr(sound, section), **{setting: value})})
    return sound


ONE_LEVEL = {
    "model__noise_conditioned": False,
    "noise__distribution": "constant",
    "sampling__num_denoise_steps": 1,
}
LIKELIHOOD = {
    "model__noise_conditioned": False,
    "noise__distribution": "dequantise",
    "noise__weight": "one",
    "sampling__method": "skip",
}


# -- check ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, ONE_LEVEL, LIKELIHOOD], ids=["itarflow", "tarflow", "likelihood"])
def test_a_sound_recipe_passes(changes):
    sound = recipe(**changes)
    sound.check(num_processes=4)
    assert sound.scheduler().config.method == sound.sampling.method


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"noise__distribution": "constant"},
            "'constant'.*model.noise_conditioned is on",
        ),
        ({"noise__distribution": "dequantise"}, "'dequantise'.*model.noise_conditioned is on"),
        (
            {"model__noise_conditioned": False},
            "'uniform'.*model.noise_conditioned is off",
        ),
        (ONE_LEVEL | {"sampling__num_denoise_steps": 4}, "num_denoise_steps is 4"),
        (LIKELIHOOD | {"noise__weight": "t"}, "noise.weight is 't'.*'one'"),
        (LIKELIHOOD | {"sampling__method": "euler"}, "sampling.method is 'euler'"),
        ({"model__patch_size": 3}, "patch_size 3 .*image_size 8"),
        ({"model__channels": 65}, "channels 65 .*head_dim 64"),
        ({"sampling__method": "dpm"}, "method is 'dpm'.*euler"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        recipe(**changes).check()


def test_a_batch_that_processes_cannot_share_is_refused():
    split = recipe(train__accumulation=3)
    split.check(num_processes=2)
    words = r"batch_size 12 .* 8 processes .*train\.accumulation 3.* 24"
    with pytest.raises(ValueError, match=words):
        split.check(num_processes=8)


OUT_OF_RANGE: tuple[tuple[str, Any], ...] = (
    ("train__epochs", 0),
    ("train__epochs", float("nan")),
    ("train__batch_size", 0),
    ("train__accumulation", 0),
    ("train__learning_rate", 0.0),
    ("train__min_learning_rate", -1e-6),
    ("train__min_learning_rate", 1.0),
    ("train__warmup_epochs", -1),
    ("train__weight_decay", -0.1),
    ("train__betas", (0.9, 1.0)),
    ("train__label_drop", 1.5),
    ("train__ema_decay", 1.0),
    ("train__max_grad_norm", 0.0),
    ("train__log_every", 0),
    ("train__save_every", -1),
    ("train__keep_states", 0),
    ("train__max_bad_steps", 0),
    ("train__evaluate_every_epochs", 0),
    ("train__sample_every_epochs", 0),
    ("sampling__num_denoise_steps", 0),
    ("sampling__num_images", 0),
    ("sampling__batch_size", 0),
)


def test_a_value_out_of_range_is_refused_by_name():
    for name, value in OUT_OF_RANGE:
        with pytest.raises(ValueError, match=name.replace("__", r"\.")):
            recipe(**{name: value})


def test_micro_batches_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"batch_size 12 .*train\.accumulation 5"):
        recipe(train__accumulation=5)


# -- what follows from the settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, (0.02, 0.5)), (ONE_LEVEL, (0.5, 0.5)), (LIKELIHOOD, None)], ids=str
)
def test_the_flow_is_told_the_levels_it_is_trained_on(changes, expected):
    assert recipe(**changes).noise_range == expected


def test_the_scheduler_has_the_settings_of_noise_and_sampling():
    sampling = {"sampling__method": "heun", "sampling__clip": True, "sampling__spacing": "quadratic"}
    config = recipe(**sampling).scheduler().config
    expected = {"t_max": 0.5, "t_min": 0.02, "num_denoise_steps": 4, "method": "heun", "clip": True}
    expected |= {"spacing": "quadratic"}
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(("num_images", "steps"), [(12, 3), (13, 4), (120, 30), (1, 1)])
def test_every_image_is_seen_as_many_times_as_there_are_epochs(num_images, steps):
    assert recipe().num_steps(num_images) == steps


def test_a_part_of_an_epoch_is_at_least_a_step():
    assert recipe(train__epochs=0.001).num_steps(100) == 1


# -- learning rate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr_schedule", "lr_schedule_tarflow"])
def test_the_learning_rate_is_that_of_the_official_code(name):
    (call,) = json.loads((GOLDEN / name / "case.json").read_text())["calls"]
    official = load_file(GOLDEN / name / "case.safetensors")
    highest, lowest = call["max_lr"], call["min_lr"] / call["max_lr"]

    def rate(step: int) -> float:
        return highest * learning_rate_factor(step, call["warmup"], call["total"], lowest)

    total = call["total"]
    used = torch.tensor([rate(step) for step in range(total)], dtype=torch.float64)
    following = torch.tensor([rate(step + 1) for step in range(total)], dtype=torch.float64)
    torch.testing.assert_close(used, official["lr.lr_used"][:total], rtol=1e-9, atol=0)
    torch.testing.assert_close(following, official["lr.lr_returned"][:total], rtol=1e-9, atol=0)


def test_the_learning_rate_stays_at_the_lowest_where_the_official_one_climbs_again():
    official = load_file(GOLDEN / "lr_schedule" / "case.safetensors")["lr.lr_used"]
    assert official[109] > 1.2 * official[100]
    assert [learning_rate_factor(step, 10, 100, 0.1) for step in (100, 101, 109, 1000)] == [0.1] * 4


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (0, 1), (10, 10), (20, 10)])
def test_the_learning_rate_is_never_out_of_range(warmup, total):
    factors = [learning_rate_factor(step, warmup, total, 0.1) for step in range(30)]
    assert all(0.1 <= factor <= 1 for factor in factors)
    assert factors[0] == (1.0 if warmup == 0 else 0.1)


# -- storing and comparing --------------------------------------------------------------------------------------


def test_the_stored_recipe_is_plain_json_with_every_setting(tmp_path):
    write_recipe(recipe(), tmp_path / "recipe.json")
    stored = json.loads((tmp_path / "recipe.json").read_text())
    assert stored == to_json(recipe())
    assert stored["model"]["num_layers"] == [1, 1]
    assert stored["sampling"]["guidance"]["weight"] == 1.5
    for section in SECTIONS:
        assert set(stored[section]) == {field.name for field in fields(getattr(recipe(), section))}


def test_an_unchanged_recipe_has_no_differences():
    assert differences(to_json(recipe()), recipe()) == []


def test_settings_that_make_another_run_are_differences_in_order_of_name():
    changed = recipe(
        train__seed=1, train__batch_size=24, train__epochs=4, train__ema_decay=0.9, noise__t_max=0.6,
        model__num_layers=(1, 2), data__horizontal_flip=False,
    )  # fmt: skip
    assert differences(to_json(recipe()), changed) == [
        "data.horizontal_flip: True -> False",
        "model.num_layers: [1, 1] -> [1, 2]",
        "noise.t_max: 0.5 -> 0.6",
        "train.batch_size: 12 -> 24",
        "train.ema_decay: None -> 0.9",
        "train.epochs: 3 -> 4",
        "train.seed: 0 -> 1",
    ]


def test_settings_that_change_neither_weights_nor_losses_are_none():
    changed = recipe(
        data__path="/elsewhere", data__num_workers=7, data__in_memory=True, data__max_broken=3, train__accumulation=2,
        train__gradient_checkpointing=True, train__compile=True, train__log_every=1, train__save_every=5,
        train__keep_states=9, train__evaluate_every_epochs=2, train__sample_every_epochs=2, train__max_bad_steps=3,
        train__trackers=(), sampling__num_images=4, sampling__guidance=Guidance(weight=9.0),
    )  # fmt: skip
    assert differences(to_json(recipe()), changed) == []


def test_a_setting_that_an_older_version_did_not_have_had_its_default():
    stored = to_json(recipe())
    del stored["model"]["input_scale"]
    assert differences(stored, recipe()) == []
    assert differences(stored, recipe(model__input_scale=2.0)) == ["model.input_scale: 1.0 -> 2.0"]
