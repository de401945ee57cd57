"""The curves of runs: what is found in metrics.jsonl, and a picture of it."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import claimed_run, tiny_recipe

from itarflow.runtime.errors import RunError
from itarflow.training.curves import PANELS, _names, _smoothed, plot_runs
from itarflow.training.decoder.losses import LossConfig, reconstruction_terms


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, steps): a run with metrics as a training writes them; without a noise range if likelihood."""

    def make(name, steps=120, likelihood=False):
        run = claimed_run(tmp_path / name, tiny_recipe(), "fresh")
        for step in range(1, steps + 1):
            values = {"step": step, "loss": 1 / step, "grad_norm": 2.0, "learning_rate": 1e-3, "memory_gib": None}
            if not likelihood:
                values |= {"nll_by_level": {"0.02-0.5": 1 / step}, "z_mean": [0.1, 0.0], "z_std": [1.5, 1.0]}
            run.log(values)
            if step % 40 == 0:
                nll = {} if likelihood else {"0.02": -step / 100, "0.5": 1.0}
                run.log({"step": step, "held_out": {"nll": nll, "bpd": 3.5 if likelihood else None}})
        return run.path

    return make


def panel(title):
    return next(panel for panel in PANELS if panel.title.startswith(title))


@pytest.mark.slow
def test_a_picture_is_drawn_of_one_run_and_of_several(make_run, tmp_path):
    one, other = make_run("one"), make_run("other", steps=60)
    plot_runs([one], tmp_path / "one.png")
    plot_runs([one, other], tmp_path / "both.png")
    pictures = [np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("one.png", "both.png")]
    assert all(picture.std() > 10 for picture in pictures)
    assert pictures[0].shape == pictures[1].shape
    assert not np.array_equal(*pictures)


def test_lines_are_found_by_level_and_by_block(make_run):
    lines = [json.loads(line) for line in (make_run("run") / "metrics.jsonl").read_text().splitlines()]
    assert panel("held-out nll").find(lines) == {
        "t = 0.02": ([40, 80, 120], [-0.4, -0.8, -1.2]),
        "t = 0.5": ([40, 80, 120], [1.0, 1.0, 1.0]),
    }
    assert panel("spread of z").find(lines).keys() == {"block 0", "block 1"}
    assert panel("loss").find(lines)[""][0] == list(range(1, 121))
    assert panel("loss of the decoder").find(lines) == {}
    assert panel("held-out bits").find(lines) == {}
    assert panel("memory").find(lines) == {}


@pytest.mark.slow
def test_a_likelihood_run_has_its_own_panels(make_run, tmp_path):
    lines = [
        json.loads(line) for line in (make_run("run", likelihood=True) / "metrics.jsonl").read_text().splitlines()
    ]
    assert panel("held-out bits").find(lines)[""][1] == [3.5] * 3
    plot_runs([tmp_path / "run"], tmp_path / "bpd.svg")
    assert (tmp_path / "bpd.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("weights", [{}, {"l2": 0.0}, {"l1": 0.0}])
def test_the_loss_of_a_decoder_is_no_nll(weights):
    terms = reconstruction_terms(LossConfig(**weights), torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), None)
    lines = [{"step": 7, "loss": 0.5} | {name: float(term) for name, term in terms.items()}]
    assert panel("loss (weighted nll)").find(lines) == {}
    assert panel("loss of the decoder").find(lines) == {"": ([7], [0.5])}


def test_runs_of_one_name_are_told_apart(make_run):
    paths = [make_run("a/digits"), make_run("b/digits"), make_run("other")]
    assert list(_names(paths).values()) == [str(path) for path in paths]
    assert list(_names(paths[1:]).values()) == ["digits", "other"]


def test_values_that_are_not_finite_leave_gaps():
    lines = [{"step": step, "loss": loss} for step, loss in enumerate([1.0, math.nan, math.inf, 2.0, None])]
    assert panel("loss").find(lines) == {"": ([0, 3], [1.0, 2.0])}


def test_smoothing_keeps_length_and_constants():
    assert _smoothed([3.0] * 400) == pytest.approx([3.0] * 400)
    assert len(_smoothed(list(np.random.default_rng(0).normal(size=401)))) == 401
    assert _smoothed([1.0, 5.0]) == [1.0, 5.0]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"recipe\.json is missing"):
        plot_runs([tmp_path], tmp_path / "x.png")
    claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    with pytest.raises(RunError, match="has no metrics yet"):
        plot_runs([tmp_path / "run"], tmp_path / "x.png")


def test_without_matplotlib_the_extra_is_named(make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "itarflow\[plot\]"'):
        plot_runs([make_run("run")], tmp_path / "x.png")


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "x", "loss": 1}',
        '{"step": 1}',
        '{"step": 1, "held_out": 3, "loss": "x"}',
        '{"step": 1, "z_mean": {"a": []}}',
        '{"step": 1, "loss": 1' + "0" * 400 + "}",
    ],
)
def test_metrics_without_figures_are_refused(make_run, tmp_path, line):
    run = make_run("run", steps=0)
    (run / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(RunError, match=r"no figures to draw|no metrics yet"):
        plot_runs([run], tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()
