"""`gpu_check.py`: every step runs dry on a CPU, none takes another's figures, and its page tells what deviated."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_check
from gpu import hooks
from gpu.figures import Check, Done, Figure, named_missing, page
from gpu.setting import Setting
from gpu.targets import targets
from gpu.worker import Step, Worker, run_here, unready
from gpu_check import STEPS, Budget, Options, check, told
from test_benchmarks import clone

from itarflow.inverse import Jacobi
from itarflow.runtime.recording import Lane

ROOT = Path(__file__).resolve().parents[1]
QUICK = (
    "env",
    "kernels",
    "right",
    "inverse",
    "starflow",
    "token",
    "jacobi",
    "score",
    "train",
    "pipeline",
    "imagenet64",
    "peer",
)
"""Steps that start no process."""


def test_gpus_are_hidden_from_tests_unless_they_are_asked_for():
    if os.environ.get("ITARFLOW_TEST_CUDA", "") in ("", "0"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert not torch.cuda.is_available()


def dry(out: Path, *only: str, **options: Any) -> Check:
    return check(
        Options(dry=True, only=only, out=out, **options), "a command", time.monotonic(), say=lambda line: None
    )


@pytest.mark.parametrize("step", [step for step in QUICK if step != "peer"])
def test_every_step_runs_dry_and_nothing_deviates(step, tmp_path):
    (done,) = dry(tmp_path, step).steps
    assert done.failed is None
    assert done.figures
    assert [figure.deviation for figure in done.figures if figure.deviation] == []
    for figure in done.figures:
        assert figure.seconds is None or 0 < figure.seconds < math.inf
    stored = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(stored["steps"][0]["figures"]) == len(done.figures)
    assert "Nothing deviated" in (tmp_path / "gpu_check.md").read_text()


def test_the_official_code_is_timed_beside_ours_and_its_deviations_are_told(tmp_path):
    found = dry(tmp_path / "same", "peer", peer=clone(tmp_path / "clone"))
    (whole,) = (figure for figure in found.steps[0].figures if figure.what == "inverse and ten scores")
    assert whole.peer_seconds is not None
    assert " x as fast" in page(found)
    assert "Nothing deviated" in page(found)
    other = dry(tmp_path / "other", "peer", peer=clone(tmp_path / "clone", offset=0.5))
    assert "- inverse, against the official code, float32, 2 images: error" in page(other)


@pytest.mark.slow
def test_steps_that_start_processes_run_dry(tmp_path):
    found = dry(tmp_path, "spread", "recipe", "study")
    assert [line for done in found.steps for f in done.figures if (line := f.deviation)] == []
    assert [done.failed for done in found.steps] == [None] * 3
    assert (tmp_path / "digits" / "pipeline").exists()


@pytest.mark.slow
def test_a_small_model_of_cifar10_is_trained_kept_and_gone_on_with(tmp_path):
    write_pictures(tmp_path / "data")
    (done,) = dry(tmp_path, "cifar10", data=tmp_path / "data").steps
    assert done.failed is None
    assert [figure.deviation for figure in done.figures if figure.deviation] == []
    kept = tmp_path / "cifar10-kept"
    assert all((kept / name).exists() for name in ("metrics.jsonl", "samples.png", "curves.png", "pipeline"))
    (weights,) = (kept / "pipeline" / "flow").glob("*.safetensors")
    parameters = json.loads((tmp_path / "cifar10" / "recipe.json").read_text())
    assert parameters["train"]["mixed_precision"] == "bf16"
    assert weights.stat().st_size < 16e6
    (again,) = dry(tmp_path, "cifar10", data=tmp_path / "data").steps  # resumes, and has nothing left to do
    assert again.failed is None
    assert [figure.case for figure in again.figures if figure.deviation] == []


def write_pictures(folder: Path) -> None:
    """Parquet files as those of CIFAR-10, of random pictures."""
    import datasets
    import numpy as np
    from PIL import Image

    folder.mkdir()
    generator = np.random.default_rng(0)
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    for split, count in (("train", 80), ("test", 40)):
        pictures = [Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        rows = {"img": pictures, "label": [index % 10 for index in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


# -- the frame ------------------------------------------------------------------------------------------------------

STEP = """
import os, time, warnings
from gpu.figures import Figure

def fine(setting):
    yield Figure(what="fine", seconds=1.0)

def failing(setting):
    yield Figure(what="before")
    raise KeyError("no such thing")

def dying(setting):
    yield Figure(what="before")
    os._exit(11)

def lacking(setting):
    yield Figure(what="before")
    import no_such_package.part

def faulty(setting):
    yield Figure(what="before")
    import gpu.no_such_module

def hanging(setting):
    yield Figure(what="before")
    time.sleep(600)

def warning(setting):
    warnings.warn("the kernel of tokens is not used: it deviates")
    warnings.warn("something else")
    yield Figure(what="fine")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "steps_of_a_test.py").write_text(STEP)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "steps_of_a_test"


def settings(tmp_path: Path) -> dict[str, Any]:
    return {"dry": True, "out": tmp_path, "peer": None, "data": None, "features": None, "minutes": 1.0,
            "until": math.inf}  # fmt: skip


@pytest.mark.slow
def test_a_step_that_dies_or_hangs_loses_neither_its_figures_nor_the_next_step(tmp_path, module):
    worker = Worker(dry=True)
    try:
        for name, seconds, reason in (
            ("failing", 60, "KeyError: 'no such thing'"),
            ("hanging", 5, "its time was over, so its process was ended"),  # in the process of the step before
            ("dying", 60, "its process ended with exit status 11"),
            ("fine", 60, None),
        ):
            done = Done(name=name)
            assert worker.start(time.monotonic() + 120) is None
            worker.run(Step(name, module, settings(tmp_path)), done, time.monotonic() + seconds)
            assert done.failed == reason
            assert [figure.what for figure in done.figures] == ["fine" if name == "fine" else "before"]
    finally:
        worker.stop()


def test_what_wants_a_package_is_left_out_and_a_module_of_ours_that_is_missing_deviates(tmp_path, module):
    found: list[Figure] = []
    assert run_here(Step("lacking", module, settings(tmp_path)), found.append) is None
    assert [(figure.what, figure.left_out) for figure in found] == [
        ("before", None),
        ("lacking", "the package no_such_package is not installed"),
    ]
    failed = run_here(Step("faulty", module, settings(tmp_path)), [].append)
    assert failed == "ModuleNotFoundError: No module named 'gpu.no_such_module'"
    printed = "Traceback\nModuleNotFoundError: No module named '{}'\n"  # by a command
    assert named_missing(printed.format("no_such_package.part")) == "the package no_such_package is not installed"
    assert named_missing(printed.format("itarflow.no_such_module")) is None


def test_the_flows_are_compared_without_pytest_whose_part_is_left_out(tmp_path):
    blocked = "import sys\nfor name in ('pytest', '_pytest', 'conftest'): sys.modules[name] = None\n"
    code = (
        f"{blocked}sys.path.insert(0, 'benchmarks')\nfrom gpu.right import right, tests\n"
        "from gpu.setting import Setting\nimport math, pathlib\nfrom gpu.figures import Figure\n"
        "setting = Setting(dry=True, out=pathlib.Path('.'), peer=None, data=None, features=None, minutes=1.0, "
        "until=math.inf)\nprint([figure.deviation for figure in right(setting)])\n"
        "print(tests(setting, Figure(what='tests')).left_out)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [str([None] * 8), "the package pytest is not installed"], done.stderr


@pytest.mark.parametrize("step", ["peer", "cifar10"])
def test_a_step_without_what_it_needs_is_left_out(step, tmp_path):
    found = dry(tmp_path, step)
    told = page(found)
    assert re.search(rf"\| {step} \| [\d.]+ \| 0 \| left out \|", told)
    assert "Nothing deviated" in told
    assert "**Left out**" in told


def test_kernels_that_were_left_out_deviate_and_other_warnings_are_told(tmp_path, module):
    found: list[Figure] = []
    assert run_here(Step("warning", module, settings(tmp_path)), found.append) is None
    assert found[0].what == "fine"
    assert found[1].deviation == "kernel: the kernel of tokens is not used: it deviates"
    assert found[2].deviation is None
    assert found[2].more == {"": "something else"}


def test_without_a_gpu_it_is_said(tmp_path, module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    failed = run_here(Step("fine", module, settings(tmp_path) | {"dry": False}), [].append)
    assert failed is not None
    assert "sees no GPU here; --dry runs on the CPU" in failed


def test_without_a_gpu_or_a_package_nothing_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = unready(dry=False)
    assert reason is not None
    assert "sees no GPU here" in reason
    monkeypatch.setattr(Worker, "start", lambda self, until: reason)
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"Error: {reason}\n"
    assert not (tmp_path / "out").exists()

    def lacks(name: str) -> None:
        raise RuntimeError("Failed to import diffusers") from ModuleNotFoundError("...", name="no_such_package.models")

    monkeypatch.setattr("importlib.import_module", lacks)
    assert unready(dry=True) == (
        "the package no_such_package is not installed; benchmarks/README.md says which wheels to bring."
    )


def test_a_page_that_is_there_stays_and_the_path_of_the_new_one_comes_last(tmp_path):
    for name in ("gpu_check.md", "gpu_check-2.md"):
        said: list[str] = []
        check(Options(dry=True, only=("peer",), out=tmp_path), "a command", time.monotonic(), say=said.append)
        assert said[-1].splitlines()[-1] == f"This page is in {tmp_path / name}"
        assert (tmp_path / name).exists()


def test_a_step_whose_time_is_over_ends_with_the_figures_that_it_has(tmp_path, module):
    found: list[Figure] = []
    failed = run_here(Step("failing", module, settings(tmp_path) | {"until": 0.0}), found.append)
    assert failed == "TimeoutError: its time was over before its end"
    assert [figure.what for figure in found] == ["before"]


def test_steps_without_time_are_left_out_and_named(tmp_path, monkeypatch, module):
    monkeypatch.setattr(gpu_check, "STEPS", {"fine": Budget(1000, module), "failing": Budget(1, module)})
    found = check(Options(dry=True, seconds=100, out=tmp_path), "a command", time.monotonic(), say=lambda line: None)
    assert found.steps[0].failed == "left out: 100 s were left, and it has 1000"
    assert found.steps[1].failed == "KeyError: 'no such thing'"
    told = (tmp_path / "gpu_check.md").read_text()
    assert "- step fine: left out" in told
    assert "- step failing: KeyError" in told
    check(Options(dry=True, seconds=100, out=tmp_path), "a command", time.monotonic(), say=lambda line: None)
    assert (tmp_path / "gpu_check-2.json").exists()  # beside the first


def test_all_steps_fit_the_time():
    assert sum(budget.seconds for budget in STEPS.values() if not budget.alone) <= Options().seconds <= 510


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "envy"], "--only names 'envy'; expected some of env, kernels"),
        (["--seconds", "0"], "--seconds is 0.0; expected a number > 0"),
        (["--peer", "nowhere"], "--peer nowhere is not there"),
    ],
)
def test_what_will_not_go_is_said_at_once(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(words)
    assert stop.value.code
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_the_page_has_rates_floors_memory_and_what_deviated():
    figures = [
        Figure(what="inverse", dtype="bf16", images=8, seconds=2.0, first_seconds=3.0, floor_seconds=0.5,
               flops=4 * 10**12, moved_bytes=10**12, peak_bytes=2**30, estimated_bytes=2**31, peer_seconds=21.0),
        Figure(what="product", seconds=2e-5, moved_bytes=10**7),
        Figure(what="flow", case="a | b", error=0.25, tolerance=0.1),
        Figure(what="score", images=1, failed="OutOfMemoryError: CUDA out of memory."),
        Figure(what="official code", left_out="no --peer names a clone of it"),
    ]  # fmt: skip
    lines = page(Check(command="c", device="a GPU", dry=False, steps=[Done(name="all", figures=figures)])).splitlines()
    assert "| inverse | bf16 | 8 | 2 s | 250 ms | 3 s | 2 | 500 | 4 | 10.5 x as fast | 1 (2) |" in lines
    assert "| product | 20 us | 500 |" in lines
    assert "| flow, a \\| b | 0.25 | 0.1 |" in lines
    assert lines[-6:] == [
        "- flow, a | b: error 0.25, expected at most 0.1",
        "- score, 1 image: OutOfMemoryError: CUDA out of memory.",
        "",
        "**Left out**",
        "",
        "- official code: no --peer names a clone of it",
    ]


def test_targets_are_told_as_reached_or_missed():
    figures = [
        Figure(what="largest product", dtype="bf16", seconds=1.0, flops=800),
        Figure(what="inverse", dtype="bf16", images=1, seconds=9.0, floor_seconds=1.0),  # has none
        Figure(what="inverse", dtype="bf16", images=8, seconds=1.5, floor_seconds=1.0),
        Figure(what="inverse", dtype="bf16", images=64, seconds=3.0, floor_seconds=1.0),
        Figure(what="inverse and ten scores", images=8, seconds=2.0, peer_seconds=30.0),
        Figure(what="training step", case="compiled", dtype="bf16", images=64, seconds=1.0, flops=300, peak_bytes=100,
               estimated_bytes=110),
        Figure(what="TARFlow's ImageNet-64 inverse", images=32, seconds=3.0),
        Figure(what="TARFlow's ImageNet-64 denoising", images=32, seconds=1.0),
    ]  # fmt: skip
    assert [target.row[1:] for target in targets(figures)] == [
        ["at most 2 times", "1.5", "reached"],
        ["at most 2 times", "3", "missed"],
        ["at least 10 times as fast", "15", "reached"],
        ["at least 50 %", "37.5", "missed"],
        ["at most 15 %", "10", "reached"],
        ["at least 7 images a second", "8", "reached"],
    ]
    found = Check(command="c", device="a GPU", dry=False, steps=[Done(name="all", figures=figures)])
    assert "| inverse, 64 images, over the floor | at most 2 times | 3 | missed |" in told(found)


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_evaluations_are_counted_and_change_nothing(make_flow, make_inputs):
    flow = make_flow(image_size=8, patch_size=1, num_layers=(1,))
    _, labels, level = make_inputs(flow)
    z = torch.randn(3, *flow.z_shape, generator=torch.Generator().manual_seed(0))
    counting = hooks.Counting(Jacobi(window=5, tolerance=0.0))
    found = flow.inverse(z, labels, level, solver=counting)
    torch.testing.assert_close(found, flow.inverse(z, labels, level))
    assert 0 < counting.evaluations < flow.num_solved_tokens


@pytest.mark.cuda
def test_recordings_are_counted_and_can_be_prevented():
    one = torch.ones(1, device="cuda")
    with hooks.recordings_counted() as seconds:
        assert Lane(one.device).record(lambda x: x + 1, one)(one).item() == 2
    assert len(seconds) == 1
    with hooks.without_recordings(), pytest.warns(UserWarning, match="recording is off"):
        assert Lane(one.device).record(lambda x: x + 1, one)(one).item() == 2
    with hooks.recordings_counted() as seconds:
        Lane(one.device).record(lambda x: x + 1, one)
    assert len(seconds) == 1


def test_a_setting_travels_to_another_process(tmp_path):
    setting = Setting(**settings(tmp_path))
    assert setting.device.type == "cpu"
    assert setting.left == math.inf
    assert shutil.disk_usage(setting.out).free > 0
