"""Numbers that no training can have: a recipe refuses them with a ValueError before any work, or it can be built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_training import tiny_recipe

from itarflow.training import Recipe
from itarflow.training.estimate import estimate
from itarflow.training.settings import learning_rate_factor

TINY = tiny_recipe()
EXTREME = (
    -1, 0, 1, 2, 3, 99, 10**4, 10**6, 10**9, 2**31, 2**32, 2**63, 2**64, 10**26, 10**30, -(10**30),
    1e-320, 1e-30, 0.5, 1e19, 1e30, 1e38, 1e39, 1e308, -1e308, math.inf, -math.inf, math.nan,
)  # fmt: skip
BUILT_SLOWLY = {"num_layers": 20, "shared_layers": 20, "image_size": 4096}
"""Larger numbers take minutes where they are not refused."""


def numbers(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """The names of all settings that hold numbers, with their types."""
    for field in fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from numbers(value, f"{name}.")
        else:
            kind = str(get_type_hints(type(section))[field.name])
            if "int" in kind or "float" in kind:
                yield name, kind


SETTINGS = sorted(numbers(TINY, ""))


def changed(section: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    return replace(section, **{first: changed(getattr(section, first), rest, value) if rest else value})


@st.composite
def overrides(draw: Any) -> tuple[str, Any]:
    name, kind = draw(st.sampled_from(SETTINGS))
    number = draw(st.sampled_from(EXTREME) | st.integers(-4, 40) | st.floats())
    number = float(number) if "float" in kind else int(number) if math.isfinite(number) else 10**30
    if kind.startswith("tuple") or ("tuple" in kind and draw(st.booleans())):
        number = (number,) * draw(st.integers(1, 3))
    return name, number


def is_built_soon(name: str, value: Any) -> bool:
    most = BUILT_SLOWLY.get(name.split(".")[-1])
    return most is None or max(value if isinstance(value, tuple) else (value,)) <= most


def use(recipe: Recipe) -> None:
    """Compute what follows from the numbers of a recipe."""
    recipe.check()
    estimate(recipe)
    per_epoch = recipe.steps_per_epoch(10**6)
    warmup = round(recipe.train.warmup_epochs * per_epoch)
    assert math.isfinite(learning_rate_factor(10, warmup, recipe.num_steps(10**6), recipe.train.min_learning_rate))
    round(recipe.train.evaluate_every_epochs * per_epoch)


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(overrides())
@example(("train.epochs", 1e308))
@example(("noise.t_max", 1e308))
def test_a_number_is_refused_as_a_value_error_or_can_be_used(override: tuple[str, Any]) -> None:
    name, value = override
    if not is_built_soon(name, value):
        return
    try:
        recipe = changed(TINY, name.split("."), value)
        recipe.check()
    except ValueError:
        return
    use(recipe)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampling.denoise_batch_size", 0),
        ("sampling.denoise_batch_size", -1),
        ("sampling.decode_batch_size", 0),
        ("sampling.num_images", 2 * 10**9),
        ("sampling.num_images", 10**26),
        ("sampling.num_denoise_steps", 2 * 10**9),
        ("sampling.guidance.temperature", 1e308),
        ("sampling.guidance.temperature", 1e-320),
        ("sampling.guidance.weight", 1e308),
        ("sampling.guidance.blocks", 99),
        ("sampling.guidance.blocks", (0, 1, 99)),
        ("noise.t_min", 1e-320),
        ("noise.t_max", 1e308),
        ("train.epochs", 1e308),
        ("train.warmup_epochs", 1e308),
        ("train.evaluate_every_epochs", 1e308),
        ("train.learning_rate", 1e308),
        ("train.seed", 2**64),
        ("train.batch_size", 128 * 10**24),
        ("data.num_workers", 10**6),
        ("model.patch_size", 8),
        ("model.patch_size", (8, 2)),
        ("model.channels", 16 * 10**26),
    ],
)
def test_what_can_not_be_trained_or_sampled_is_refused_by_its_name_before_any_work(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}|{name.split('.')[-1]}|model.\\*"):
        changed(TINY, name.split("."), value).check()


@pytest.mark.parametrize("patch_size", [8, (8, 2), (2, 8)])
def test_a_transformer_without_a_token_to_read_is_refused_even_if_the_first_token_is_learned(patch_size: Any) -> None:
    learned = changed(changed(TINY, ["model", "patch_size"], patch_size), ["model", "learned_first_token"], True)
    with pytest.raises(ValueError, match=r"model\.patch_size is .*block of one token.*smaller patch"):
        learned.check()
