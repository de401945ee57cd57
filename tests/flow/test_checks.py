"""Arguments of any type, as a file of others may hold them: a flow, a schedule and guidance are made, or refused."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from conftest import TINY, VARIANTS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from itarflow import DenoiseScheduler, Guidance, TARFlow
from itarflow.flow import NoiseConfig
from itarflow.flow.checks import block_sizes, num_parameters
from itarflow.inverse import Jacobi

NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([10**5, 2 * 10**9, 10**26, 10**30, -(10**30), 2**16, 1e-320, 1e-18, 1e18, 1e308, 0.5]),
    st.floats(),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["euler", "scale", "\x1b[0m"])
)
ANY = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
SCHEDULE = {"t_max": 0.5, "t_min": 0.02, "num_denoise_steps": 4, "method": "euler", "clip": False, "spacing": "even"}
GUIDANCE = {"weight", "rule", "schedule", "blocks", "shift", "scale", "temperature"}
FIELDS = {
    "flow": [
        *TINY,
        "noise_conditioned",
        "volume_preserving",
        "shared_layers",
        "input_scale",
        "learned_first_token",
        "noise_range",
    ],
    "schedule": list(SCHEDULE),
    "guidance": sorted(GUIDANCE),
    "noise": ["t_min", "t_max", "distribution", "weight"],
    "jacobi": ["window", "tolerance", "guess"],
}


def make(kind: str, field: str, value: Any) -> None:
    if kind == "flow":
        with torch.device("meta"):  # shapes without memory
            TARFlow(**{**TINY, field: value})
    elif kind == "schedule":
        DenoiseScheduler.from_config({**SCHEDULE, field: value})
    elif kind == "guidance":
        guidance = Guidance.from_json({field: value})
        guidance.weights(torch.arange(3), 3, torch.float32)
        assert guidance.guides(0) in (True, False)
    elif kind == "jacobi":
        Jacobi(**{field: value})
    else:
        NoiseConfig(**{field: value})


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in FIELDS.items() for field in fields])
def test_any_value_is_taken_or_refused_in_a_moment(kind, field):
    @given(value=ANY)
    @example(value=[10**6])
    @example(value=[1] * 10**5)
    @example(value="\x1b]0;title\x07")
    @settings(max_examples=40, deadline=None, derandomize=True)
    def try_values(value: Any) -> None:
        started, message = time.process_time(), ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are not known
            try:
                make(kind, field, value)
            except ValueError as error:
                message = str(error)
        assert "\x1b" not in message
        assert len(message) < 1000
        assert time.process_time() - started < 5

    try_values()


@pytest.mark.parametrize("stored", [[], "scale", 3, {"weights": 1.0}, {"": None}], ids=str)
def test_guidance_of_another_shape_is_refused(stored):
    with pytest.raises(ValueError, match=r"guidance is .*; expected weight, rule"):
        Guidance.from_json(stored)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted_without_building(variant, make_flow):
    flow = make_flow(fresh=True, **{"channels": 64, "head_dim": 32} | VARIANTS[variant] | {"channels": 64})
    weights = sum(
        p.numel()
        for name, p in flow.named_parameters()
        if (p.ndim > 1 and "start_token" not in name) or "embedding.weight" in name
    )
    assert num_parameters(flow.config, block_sizes(flow.config)) == weights
