import json

import pytest

from itarflow.inverse import Jacobi, sequential
from itarflow.pipeline.plan import InversePlan, choose, replaced, tokens_of_blocks


def plan(**changes):
    solvers = (Jacobi(window=1), Jacobi(window=4, tolerance=0.0, guess="zero"))
    return InversePlan(**{"solvers": solvers, "num_tokens": (16, 4), "device": "cpu", "batch_size": 8} | changes)


@pytest.fixture
def flow(make_flow):
    return make_flow(patch_size=(2, 1), in_channels=1)  # 4 tokens on the image side, 16 on the noise side


def test_a_plan_gives_solvers_noise_side_first(flow):
    assert tokens_of_blocks(flow) == (16, 4)
    assert plan().solvers_of(flow) == [sequential, Jacobi(window=4, tolerance=0.0, guess="zero")]


def test_a_plan_survives_json():
    found = plan(facts={"threads": 2})
    assert InversePlan.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_plan_serves_its_batch_size_and_smaller_ones_on_its_kind_of_device():
    plans = [plan(batch_size=64), plan(batch_size=1), plan(device="cuda", batch_size=8)]
    assert [choose(plans, "cpu", size).batch_size for size in (1, 2, 63, 64)] == [1, 64, 64, 64]
    assert choose(plans, "cpu", 65) is None
    assert choose(plans, "cuda", 8).batch_size == 8
    assert choose(plans, "mps", 8) is None


def test_a_new_plan_replaces_that_for_its_device_and_batch_size():
    old, other, gpu = plan(), plan(batch_size=1), plan(device="cuda")
    new = plan(facts={"new": True})
    assert replaced([gpu, old, other], new) == [other, new, gpu]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": (16,)}, "2 solvers for 1 blocks"),
        ({"num_tokens": (16, 2)}, "window is 4.* 2 tokens"),
        ({"batch_size": 0}, "batch_size .* is 0"),
        ({"batch_size": 2.5}, "batch_size .* is 2.5"),
        ({"device": None}, "device .* is None"),
    ],
)
def test_plans_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_a_plan_for_another_architecture_is_refused(flow):
    with pytest.raises(ValueError, match=r"\(4, 4\) .*\(16, 4\)"):
        plan(num_tokens=(4, 4)).solvers_of(flow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solvers": [{"window": 1}, {"window": 2, "tolerance": -1.0}]}, "tolerance is -1.0"),
        ({"solvers": [{"window": 1}, {"widnow": 2}]}, "no inverse plan"),
        ({"solvers": None}, "no inverse plan"),
        ({"unknown": 1}, "no inverse plan"),
    ],
    ids=str,
)
def test_damaged_json_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        InversePlan.from_json(plan().to_json() | change)
    with pytest.raises(ValueError, match=r"no inverse plan: .*`solvers`"):
        InversePlan.from_json({})
