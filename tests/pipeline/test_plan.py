import json

import pytest
import torch

from itarflow.inverse import Jacobi, sequential
from itarflow.pipeline import plan as module
from itarflow.pipeline.plan import InversePlan, choose, place_of, planned, replaced, tokens_of_blocks

CPU = place_of(torch.device("cpu"), torch.float32)
GPU = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "dtype": "torch.bfloat16", "torch": "2.13"}
ELSEWHERE = {
    "another device": {"device_name": "NVIDIA L4"},
    "a slice of it": {"device_name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb"},
    "another dtype": {"dtype": "torch.float32"},
    "another torch": {"torch": "2.12"},
    "not said": {"device_name": "", "dtype": "", "torch": ""},
}


def plan(**changes):
    solvers = (Jacobi(window=1), Jacobi(window=4, tolerance=0.0, guess="zero"))
    return InversePlan(**{"solvers": solvers, "num_tokens": (16, 4), "batch_size": 8, **CPU} | changes)


@pytest.fixture
def flow(make_flow):
    return make_flow(patch_size=(2, 1), in_channels=1)  # 4 tokens on the image side, 16 on the noise side


def test_a_plan_gives_solvers_noise_side_first(flow):
    assert tokens_of_blocks(flow) == (16, 4)
    assert plan().solvers_of(flow) == [sequential, Jacobi(window=4, tolerance=0.0, guess="zero")]


def test_a_plan_survives_json():
    found = plan(facts={"threads": 2}, **GPU)
    assert InversePlan.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_plan_of_an_older_version_is_read():
    old = {key: value for key, value in plan(**GPU).to_json().items() if key not in ("device_name", "dtype", "torch")}
    read = InversePlan.from_json(json.loads(json.dumps(old | {"facts": {"device": "NVIDIA L4"}})))
    assert choose([read], GPU, 1) is None
    assert read.place == "NVIDIA L4 in unknown dtype, torch unknown"


def test_a_plan_serves_its_batch_size_and_smaller_ones_where_it_was_found():
    plans = [plan(batch_size=64), plan(batch_size=1), plan(**GPU)]
    assert [choose(plans, CPU, size).batch_size for size in (1, 2, 63, 64)] == [1, 64, 64, 64]
    assert choose(plans, CPU, 65) is None
    assert choose(plans, GPU, 8).batch_size == 8
    assert choose(plans, GPU | {"device": "mps"}, 8) is None


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_plan_of_elsewhere_is_not_used_which_is_said_once(flow, caplog, where):
    module._warn_once.cache_clear()
    plans = [plan(**GPU | ELSEWHERE[where]), plan(batch_size=1)]
    for _ in range(2):
        assert planned(plans, flow, lambda: GPU, 8) is sequential
    (said,) = caplog.messages
    assert f"it was found on {plans[0].place}, and this is NVIDIA H100 80GB HBM3 in bfloat16, torch 2.13" in said
    assert "`itarflow profile CHECKPOINT` finds a plan" in said


def test_names_of_foreign_plans_can_not_command_a_terminal(flow, caplog):
    planned([plan(**GPU | {"device_name": "\x1b]0;title\x07"})], flow, lambda: GPU, 8)
    assert caplog.messages[0].isprintable()
    assert "title" in caplog.messages[0]


def test_nothing_is_said_of_plans_for_other_batches_or_types_of_device(flow, caplog):
    assert planned([plan(**GPU)], flow, lambda: GPU, 9) is sequential
    assert planned([plan(**GPU)], flow, lambda: CPU, 1) is sequential
    assert planned([plan(**GPU)], flow, lambda: GPU, 8) == plan().solvers_of(flow)
    assert caplog.messages == []


def test_a_place_names_device_dtype_and_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch, "__version__", "2.13.1+cu130")
    found = place_of(torch.device("cuda", 1), torch.bfloat16)
    assert found == {"device": "cuda", "device_name": "NVIDIA L4", "dtype": "torch.bfloat16", "torch": "2.13"}


def test_a_new_plan_replaces_that_for_its_device_and_batch_size():
    old, other, gpu = plan(), plan(batch_size=1), plan(**GPU)
    new = plan(facts={"new": True})
    assert replaced([gpu, old, other], new) == [other, new, gpu]


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_new_plan_replaces_that_of_another_torch_and_of_nowhere(where):
    there, new = plan(**GPU | ELSEWHERE[where]), plan(**GPU)
    kept = [new] if where in ("another torch", "not said") else [there, new]
    assert sorted(replaced([there], new), key=str) == sorted(kept, key=str)


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
