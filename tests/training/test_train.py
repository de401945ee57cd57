"""The training loop: what it leaves behind, exact resumption, interruption, and what it refuses."""

import dataclasses
import hashlib
import json
import math
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import claimed_run, losses, shared_weights, tiny_recipe

from itarflow import ITARFlowPipeline
from itarflow.data import load as data
from itarflow.data import load_data
from itarflow.data.prepare.crop import PrepareConfig, prepare
from itarflow.inverse import Guidance
from itarflow.inverse.solvers import Jacobi
from itarflow.pipeline.plan import InversePlan
from itarflow.runtime.errors import DataError, RunError, TrainingError
from itarflow.runtime.signals import Interrupted
from itarflow.training import objective
from itarflow.training import train as training
from itarflow.training.run_folder import RunDir, hold
from itarflow.training.states import MANIFEST
from itarflow.training.train import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of the tiny recipe."""
    run_dir = tmp_path_factory.mktemp("finished") / "tiny"
    return run_dir, train(tiny_recipe(), run_dir)


def test_a_run_leaves_what_the_design_promises(finished):
    run_dir, summary = finished
    assert json.loads((run_dir / "recipe.json").read_text())["train"]["batch_size"] == 128
    assert set(losses(run_dir)) == set(range(1, summary.steps + 1))
    assert len(list((run_dir / "state").glob("step-*"))) == 2
    grid = Image.open(summary.grid)
    assert grid.width > 400
    assert np.asarray(grid).std() > 1
    assert not list(run_dir.rglob(".partial*"))


def test_the_shared_pipeline_samples_with_its_defaults_and_tells_of_its_training(finished):
    run_dir, summary = finished
    pipe = ITARFlowPipeline.from_pretrained(run_dir / "pipeline")
    assert pipe.default_guidance.weight == 1.0
    assert pipe.scheduler.config.num_denoise_steps == 2
    assert tuple(pipe.flow.config.noise_range) == (0.02, 0.5)
    assert pipe.config.class_names == [str(digit) for digit in range(10)]
    assert pipe.config.training["steps"] == summary.steps
    assert pipe.config.training["metrics"].keys() == {
        f"held-out nll at t={level} (nats/dim)" for level in ("0.02", "0.18", "0.34", "0.5")
    }
    assert len(pipe(class_labels=[3, "4"]).images) == 2


def test_training_learns(finished):
    run_dir, summary = finished
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line["held_out"]["nll"] for line in lines if "held_out" in line]
    assert all(last[level] < first[level] for level in last)
    assert summary.held_out.nll == last


@pytest.mark.parametrize("stop_at", [7, 13])  # where a state is saved anyway, and where an epoch ends
def test_a_resumed_run_is_the_uninterrupted_run_to_the_last_bit(finished, tmp_path, stop_at):
    whole, _ = finished
    train(tiny_recipe(), tmp_path / "run", max_steps=stop_at)
    train(tiny_recipe(), tmp_path / "run", start="resume")
    assert losses(tmp_path / "run") == losses(whole)
    resumed, expected = shared_weights(tmp_path / "run"), shared_weights(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def digits_in_parquet(tmp_path_factory):
    """The digits, prepared in shards of 200 images."""
    folder = tmp_path_factory.mktemp("prepared") / "digits"
    prepare(PrepareConfig(source="digits", out=folder, size=8, in_channels=1, shard_size=200, num_workers=0))
    return folder


@pytest.mark.parametrize("num_workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_streamed_run_resumes_exactly_in_the_middle_of_an_epoch(digits_in_parquet, tmp_path, num_workers):
    recipe = tiny_recipe(
        path=str(digits_in_parquet), streaming=True, shuffle_buffer=256, in_memory=False, num_workers=num_workers,
        accumulation=2,
    )  # fmt: skip
    train(recipe, tmp_path / "whole", max_steps=10)
    train(recipe, tmp_path / "parts", max_steps=4)
    train(recipe, tmp_path / "parts", start="resume", max_steps=7)
    train(recipe, tmp_path / "parts", start="resume", max_steps=10)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    resumed, expected = shared_weights(tmp_path / "parts"), shared_weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_shorter_run_says_how_far_it_goes_and_what_it_does_meanwhile(tmp_path, capsys):
    train(tiny_recipe(), tmp_path / "run", max_steps=2)
    printed = " ".join(capsys.readouterr().out.split())
    assert "the whole training 27, of which --max-steps takes the first 2." in printed
    assert "step 2 evaluating 38 held-out images step 2 held-out nll" in printed
    assert "step 2 sampling 10 images" in printed
    assert "2/2" in printed  # the bar ends with the run


@pytest.mark.slow
def test_resuming_a_finished_run_adds_nothing(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train(tiny_recipe(), tmp_path / "run", start="resume")
    assert "step 27 " in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert (again.steps, again.held_out.nll) == (27, json.loads(before.splitlines()[-1])["held_out"]["nll"])


def noted(run_dir, card="# Mine\n"):
    """The pipeline of a run with what commands and people add to it: (index, card) as they are then."""
    folder = run_dir / "pipeline"
    pipe = ITARFlowPipeline.from_pretrained(folder)
    pipe.record(folder, "evaluations", lambda _: {"8 samples": "FID 3.5"})
    plan = InversePlan(solvers=(Jacobi(window=2),) * 2, num_tokens=(4, 4), device="cpu", batch_size=4)
    pipe.record(folder, "plans", lambda _: [plan.to_json()])
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_shared": {"repo_id": "you/tiny", "license": "mit"}}
    (folder / "model_index.json").write_text(json.dumps(index))
    if card is not None:
        (folder / "README.md").write_text(card)
    return index


def test_a_resumed_finished_run_leaves_its_pipeline_alone_whatever_is_set_meanwhile(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    index, folder = noted(tmp_path / "run"), tmp_path / "run" / "pipeline"
    del index["training"]["data_content"]  # as an earlier version wrote it
    (folder / "model_index.json").write_text(json.dumps(index))
    train(tiny_recipe(log_every=7, keep_states=3), tmp_path / "run", start="resume")
    assert json.loads((folder / "model_index.json").read_text()) == index
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_a_new_export_of_the_same_weights_keeps_what_was_measured_with_them(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    old = noted(tmp_path / "run", card=None)
    train(tiny_recipe(guidance=Guidance(weight=2.5)), tmp_path / "run", start="resume")
    folder = tmp_path / "run" / "pipeline"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["guidance"]["weight"] == 2.5
    assert {name: index[name] for name in ("evaluations", "plans", "_shared")} == {
        name: old[name] for name in ("evaluations", "plans", "_shared")
    }
    card = (folder / "README.md").read_text()
    assert "| 8 samples | 3.5 |" in card
    assert 'from_pretrained("you/tiny")' in card


def test_an_export_of_other_weights_keeps_the_card_written_by_hand_but_no_figures(tmp_path):
    train(tiny_recipe(), tmp_path / "run", max_steps=2)
    noted(tmp_path / "run")
    train(tiny_recipe(), tmp_path / "run", start="resume", max_steps=4)
    folder = tmp_path / "run" / "pipeline"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["training"]["steps"] == 4
    assert not index["evaluations"]
    assert not index["plans"]
    assert index["_shared"] == {"repo_id": "you/tiny", "license": "mit"}
    assert (folder / "README.md").read_text() == "# Mine\n"
    ITARFlowPipeline.from_pretrained(folder)


@pytest.mark.parametrize("undone", ["export", "evaluate", "_sample"])
def test_what_a_kill_left_undone_after_a_saved_state_is_made_up(finished, tmp_path, monkeypatch, undone):
    whole, _ = finished
    original = getattr(training._Training, undone)

    def killed(self):
        if self.state.step == 13:
            raise RuntimeError("killed")
        return original(self)

    monkeypatch.setattr(training._Training, undone, killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(tiny_recipe(save_every=13), tmp_path / "run")
    monkeypatch.undo()
    train(tiny_recipe(save_every=13), tmp_path / "run", start="resume")

    def told(run):
        return [(line["step"], line.get("loss"), line.get("held_out")) for line in RunDir(run).logged()]

    assert told(tmp_path / "run") == told(whole)
    for grid in sorted((whole / "samples").iterdir()):
        assert (tmp_path / "run" / "samples" / grid.name).read_bytes() == grid.read_bytes()


def test_an_export_that_was_killed_is_made_up_though_nothing_is_left_to_train(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    pipeline = tmp_path / "run" / "pipeline"
    pipeline.rename(pipeline.with_name(".old-pipeline"))  # between two renames
    train(tiny_recipe(), tmp_path / "run", start="resume")
    assert not pipeline.with_name(".old-pipeline").exists()
    shutil.rmtree(pipeline)
    train(tiny_recipe(), tmp_path / "run", start="resume")
    expected = shared_weights(finished[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in shared_weights(tmp_path / "run").items())


def test_resuming_a_finished_run_keeps_what_was_added_to_its_pipeline(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    index = tmp_path / "run" / "pipeline" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "evaluations": [{"fid": 3.0}]}))
    train(tiny_recipe(), tmp_path / "run", start="resume")
    assert json.loads(index.read_text())["evaluations"] == [{"fid": 3.0}]


@pytest.mark.slow
def test_a_run_that_is_moved_ends_and_goes_on_where_it_is_now(finished, tmp_path, monkeypatch):
    original = training._Training._log

    def log_and_move(self, *args):
        original(self, *args)
        if self.state.step == 9:
            (tmp_path / "run").rename(tmp_path / "moved")

    monkeypatch.setattr(training._Training, "_log", log_and_move)
    with pytest.raises(RunError, match="has been moved or removed"):
        train(tiny_recipe(), tmp_path / "run")
    assert os.listdir(tmp_path) == ["moved"]
    monkeypatch.undo()
    train(tiny_recipe(), tmp_path / "moved", start="resume")
    assert losses(tmp_path / "moved") == losses(finished[0])


@pytest.mark.slow
def test_the_states_before_a_divergence_stay(tmp_path, monkeypatch):
    original = training.clip_grad_norm

    def bad_from_the_fourth_on(model, limit):
        calls.append(original(model, limit))
        return math.nan if len(calls) > 3 else calls[-1]

    calls = []
    monkeypatch.setattr(training, "clip_grad_norm", bad_from_the_fourth_on)
    message = r"up to step 8.*these are before it: step-00000003, step-00000002\."
    with pytest.raises(TrainingError, match=message):
        train(tiny_recipe(save_every=1, max_bad_steps=5), tmp_path)
    assert [state.name[-1] for state in RunDir(tmp_path).states()] == ["2", "3", "8"]


@pytest.mark.slow
def test_a_run_that_was_stopped_before_its_first_state_begins_anew(finished, tmp_path, capsys):
    whole, _ = finished
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    run.log({"step": 1, "loss": 123.0})
    train(tiny_recipe(), tmp_path / "run", start="resume", max_steps=4)
    assert "beginning anew" in capsys.readouterr().out
    expected = losses(whole)
    assert losses(tmp_path / "run") == {step: expected[step] for step in range(1, 5)}


@pytest.mark.slow
def test_resuming_forgets_metrics_written_after_the_saved_state(tmp_path):
    train(tiny_recipe(), tmp_path, max_steps=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 123.0}) + "\n")
    train(tiny_recipe(), tmp_path, start="resume", max_steps=6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["step"] == 6 and "loss" in line] != [123.0]
    assert sum("loss" in line for line in lines) == 6


def test_a_signal_saves_the_state_and_resuming_goes_on(finished, tmp_path, monkeypatch):
    whole, _ = finished
    original = training._Training._log

    def log_and_signal(self, *args):
        original(self, *args)
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training._Training, "_log", log_and_signal)
    with pytest.raises(Interrupted, match="--resume") as stop:
        train(tiny_recipe(), tmp_path / "run")
    assert stop.value.exit_code == 128 + signal.SIGINT
    monkeypatch.undo()
    train(tiny_recipe(), tmp_path / "run", start="resume")
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.slow
def test_accumulation_gives_the_same_losses(finished, tmp_path):
    whole, _ = finished
    train(tiny_recipe(accumulation=4), tmp_path, max_steps=6)
    expected = losses(whole)
    assert losses(tmp_path) == pytest.approx({step: expected[step] for step in range(1, 7)}, abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_may_accumulate_in_other_shares(finished, tmp_path):
    whole, _ = finished
    train(tiny_recipe(), tmp_path, max_steps=5)
    train(tiny_recipe(accumulation=4), tmp_path, start="resume", max_steps=9)
    expected = losses(whole)
    assert losses(tmp_path) == pytest.approx({step: expected[step] for step in range(1, 10)}, abs=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_losses(finished, tmp_path):
    whole, _ = finished
    train(tiny_recipe(gradient_checkpointing=True), tmp_path, max_steps=3)
    expected = losses(whole)
    assert losses(tmp_path) == pytest.approx({step: expected[step] for step in range(1, 4)}, abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_give_the_same_losses(finished, tmp_path):
    whole, _ = finished
    train(tiny_recipe(compile=True), tmp_path, max_steps=3)
    expected = losses(whole)
    assert losses(tmp_path) == pytest.approx({step: expected[step] for step in range(1, 4)}, abs=1e-5)


@pytest.mark.slow
def test_bfloat16_trains_close_to_float32(finished, tmp_path):
    whole, _ = finished
    train(tiny_recipe(mixed_precision="bf16"), tmp_path, max_steps=6)
    expected = losses(whole)
    assert losses(tmp_path) == pytest.approx({step: expected[step] for step in range(1, 7)}, abs=1e-2)
    assert losses(tmp_path)[6] != expected[6]
    assert all(tensor.dtype == torch.float32 for tensor in shared_weights(tmp_path).values())


@pytest.mark.slow
def test_a_step_whose_loss_is_nan_is_skipped_and_counted(tmp_path, monkeypatch):
    def nan_at_the_third(flow, recipe, images, labels, draws, *context):
        losses = objective.training_losses(flow, recipe, images, labels, draws, *context)
        calls.append(1)
        return losses._replace(loss=losses.loss * float("nan")) if len(calls) == 3 else losses

    calls = []
    monkeypatch.setattr(training, "training_losses", nan_at_the_third)
    summary = train(tiny_recipe(), tmp_path, max_steps=5)
    assert summary.bad_steps == 1
    assert all(tensor.isfinite().all() for tensor in shared_weights(tmp_path).values())


def test_a_bad_step_is_reported_with_the_noise_level_it_came_from(tmp_path, monkeypatch, capsys):
    def one_image_is_infinite(flow, recipe, images, labels, draws, *context):
        levels.append(draws.noise_level[7].item())
        losses = objective.training_losses(flow, recipe, images, labels, draws, *context)
        infinite = torch.where(torch.arange(len(images)) == 7, torch.inf, 0.0)
        return losses._replace(loss=losses.loss + infinite.sum(), nll=losses.nll + infinite)

    def infinite_gradient(model, limit):
        return float("inf")

    levels = []
    monkeypatch.setattr(training, "training_losses", one_image_is_infinite)
    monkeypatch.setattr(training, "clip_grad_norm", infinite_gradient)
    train(tiny_recipe(), tmp_path, max_steps=1)
    printed = capsys.readouterr().out
    assert "Step 1: the gradient is not finite" in printed
    assert f"The worst image has noise level {levels[0]:.3g} (nll inf nats/dim)" in printed


def test_metrics_tell_likelihood_by_noise_level_and_z_by_block(finished):
    run_dir, _ = finished
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "loss" in line]
    assert last["nll_by_level"].keys() == {"0.02-0.14", "0.14-0.26", "0.26-0.38", "0.38-0.5"}
    values = list(last["nll_by_level"].values())
    assert min(values) < last["nll"] < max(values)
    assert last["bpd"] == pytest.approx((last["nll"] + np.log(128)) / np.log(2))
    assert last["bpd_by_level"].keys() == last["nll_by_level"].keys()
    assert len(last["z_mean"]) == len(last["z_std"]) == 2
    # z comes closer to what its prior says of it.
    assert abs(last["z_std"][-1] - 1) < abs(first["z_std"][-1] - 1)
    assert last["tflops"] > 0
    assert last["utilisation"] is None
    assert last["memory_gib"] > 0.05


@pytest.fixture
def images_with_a_broken_one(tmp_path):
    """A folder of forty images, one of which can't be read, and a recipe to train on them."""
    (tmp_path / "images").mkdir()
    for index in range(40):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index:02d}.png")
    (tmp_path / "images" / "33.png").write_bytes(b"not a picture")
    return tiny_recipe(
        path=str(tmp_path / "images"), num_classes=0, label_drop=0.0, guidance=Guidance(), in_memory=False,
        num_workers=0, held_out_images=0, batch_size=4, accumulation=2, seed=5, epochs=2,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_that_too_many_broken_images_stopped_goes_on_as_if_they_had_been_allowed(
    images_with_a_broken_one, tmp_path
):
    recipe = images_with_a_broken_one
    train(recipe, tmp_path / "whole")
    stricter = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_broken=0))
    with pytest.raises(DataError, match=r"33\.png"):
        train(stricter, tmp_path / "stopped")
    (state,) = (tmp_path / "stopped" / "state").glob("step-*")
    assert int(state.name[-8:]) == max(losses(tmp_path / "stopped")) > 0
    train(recipe, tmp_path / "stopped", start="resume")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    resumed, expected = shared_weights(tmp_path / "stopped"), shared_weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_repaired_images_count_no_longer(images_with_a_broken_one, tmp_path):
    recipe = images_with_a_broken_one
    stricter = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_broken=0))
    with pytest.raises(DataError, match="Repair or remove them"):
        train(stricter, tmp_path / "run")
    Image.new("L", (8, 8)).save(tmp_path / "images" / "33.png")
    with pytest.raises(RunError, match=r"The images are others.*\n.*\n.*--allow-changes"):
        train(stricter, tmp_path / "run", start="resume")
    assert train(stricter, tmp_path / "run", start="resume", allow_changes=True).steps == 20


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))


def test_a_state_that_names_no_images_is_compared_with_the_pipeline(tmp_path, capsys):
    images, run = tmp_path / "images", tmp_path / "run"
    for seed in range(24):
        (images / ("1", "2", "10")[seed % 3]).mkdir(parents=True, exist_ok=True)
        picture(seed).save(images / ("1", "2", "10")[seed % 3] / f"{seed}.png")
    recipe = tiny_recipe(
        path=str(images), num_classes=3, in_memory=False, num_workers=0, held_out_images=3, batch_size=4
    )
    train(recipe, run, max_steps=1)
    index = run / "pipeline" / "model_index.json"
    as_now = index.read_text()

    def forget(state):  # as version 0.1, which sorted the names of classes as texts
        (state / "progress.json").write_text(
            json.dumps({k: v for k, v in json.loads((state / "progress.json").read_text()).items() if k != "data"})
        )
        names = [path for path in state.rglob("*") if path.is_file() and path.name != MANIFEST]
        files = {
            str(f.relative_to(state)): {
                "bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()
            } for f in names
        }  # fmt: skip
        (state / MANIFEST).write_text(json.dumps({"files": files}))

    forget(RunDir(run).states()[-1])
    index.write_text(json.dumps(json.loads(as_now) | {"class_names": ["1", "10", "2"]}))
    recipe_before = (run / "recipe.json").read_bytes()
    workers = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, log_every=2))
    with pytest.raises(RunError, match=r"(?s)\[1, 10, 2\] there, \[1, 2, 10\] now.*--allow-changes"):
        train(workers, run, start="resume", max_steps=2)
    assert (run / "recipe.json").read_bytes() == recipe_before
    capsys.readouterr()
    index.write_text(as_now)
    train(workers, run, start="resume", max_steps=2)
    assert "only classes and numbers of images are compared" in capsys.readouterr().out.replace("\n", " ")
    assert json.loads((run / "recipe.json").read_text())["train"]["log_every"] == 2
    forget(RunDir(run).states()[-1])
    index.write_text(json.dumps(json.loads(as_now) | {"class_names": ["1", "10", "2"]}))
    assert train(recipe, run, start="resume", max_steps=3, allow_changes=True).steps == 3
    assert "Going on with other images: classes: " in capsys.readouterr().out


def test_other_images_are_not_gone_on_with_unless_that_is_allowed(tmp_path, capsys):
    images = tmp_path / "images"
    for seed in range(24):
        (images / "abc"[seed % 3]).mkdir(parents=True, exist_ok=True)
        picture(seed).save(images / "abc"[seed % 3] / f"{seed}.png")
    recipe = tiny_recipe(
        path=str(images), num_classes=3, in_memory=False, num_workers=0, held_out_images=3, batch_size=4
    )
    train(recipe, tmp_path / "run", max_steps=1)
    shutil.copytree(images, tmp_path / "elsewhere")  # without the times of change
    moved = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=str(tmp_path / "elsewhere")))
    train(moved, tmp_path / "run", start="resume", max_steps=2)
    (images / "b").rename(images / "zz")
    with pytest.raises(RunError, match=r"(?s)\[a, b, c\] there, \[a, c, zz\] now.*label 1 was b, is c now"):
        train(recipe, tmp_path / "run", start="resume", max_steps=3)
    (images / "zz").rename(images / "b")
    assert "elsewhere" in (tmp_path / "run" / "recipe.json").read_text()  # which the refused one did not replace
    picture(99).save(images / "b" / "99.png")
    with pytest.raises(RunError, match=r"(?s)images, train.*22 there, 23 now.*--allow-changes"):
        train(recipe, tmp_path / "run", start="resume", max_steps=3)
    capsys.readouterr()
    assert train(recipe, tmp_path / "run", start="resume", max_steps=3, allow_changes=True).steps == 3
    assert "Going on with other images: images, " in capsys.readouterr().out
    train(recipe, tmp_path / "run", start="resume", max_steps=4)  # from now on these are its images
    assert [line["step"] for line in RunDir(tmp_path / "run").logged() if "loss" in line] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["data"]["path"] == str(images)


@pytest.mark.slow
def test_settings_of_the_optimiser_may_be_changed_on_resuming(tmp_path):
    weights = []
    train(tiny_recipe(), tmp_path / "begun", max_steps=2)
    for changes in ({}, {"weight_decay": 5.0}, {"betas": (0.5, 0.6)}):
        run = shutil.copytree(tmp_path / "begun", tmp_path / str(len(weights)))
        train(tiny_recipe(**changes), run, start="resume", max_steps=4, allow_changes=True)
        weights.append(shared_weights(run)["blocks.0.proj_in.weight"])
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.slow
def test_an_average_may_begin_in_the_middle_of_a_run(tmp_path):
    train(tiny_recipe(ema_decay=None), tmp_path, max_steps=2)
    before = shared_weights(tmp_path)["blocks.0.proj_in.weight"]
    train(tiny_recipe(ema_decay=0.999999), tmp_path, start="resume", max_steps=3, allow_changes=True)
    torch.testing.assert_close(shared_weights(tmp_path)["blocks.0.proj_in.weight"], before, atol=1e-2, rtol=0)
    train(tiny_recipe(ema_decay=None), tmp_path, start="resume", max_steps=4, allow_changes=True)


@pytest.mark.slow
def test_saving_before_the_first_good_step_changes_nothing_of_it(tmp_path, monkeypatch):
    original = training.clip_grad_norm

    def first_two_are_bad(model, limit):
        norms.append(original(model, limit))
        return math.nan if len(norms) <= 2 else norms[-1]

    monkeypatch.setattr(training, "clip_grad_norm", first_two_are_bad)
    norms = []
    train(tiny_recipe(), tmp_path / "whole", max_steps=4)
    norms = []
    train(tiny_recipe(save_every=1), tmp_path / "saved", max_steps=2)
    train(tiny_recipe(), tmp_path / "saved", start="resume", max_steps=4)
    resumed, expected = shared_weights(tmp_path / "saved"), shared_weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_signal_after_the_last_step_loses_nothing(finished, tmp_path, monkeypatch):
    whole, _ = finished
    original = training._Training.evaluate

    def evaluate_and_signal(self):
        if self.state.step == 27:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(training._Training, "evaluate", evaluate_and_signal)
        with pytest.raises(Interrupted) as stop:
            train(tiny_recipe(), tmp_path / "run")
    assert stop.value.exit_code == 143
    summary = train(tiny_recipe(), tmp_path / "run", start="resume")
    assert summary.grid.exists()
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.slow
def test_a_dead_loader_process_is_refused_and_the_state_saved(tmp_path, monkeypatch):
    for index in range(40):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    recipe = tiny_recipe(
        path=str(tmp_path / "images"), num_classes=0, label_drop=0.0, guidance=Guidance(), in_memory=False,
        num_workers=1, held_out_images=0, batch_size=4, epochs=2,
    )  # fmt: skip
    reads, main_process = [], os.getpid()
    original = data.ImageDataset.unpadded

    def die_after_a_while(self, index):
        reads.append(index)
        if os.getpid() != main_process and len(reads) > 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    monkeypatch.setattr(data.ImageDataset, "unpadded", die_after_a_while)
    with pytest.raises(DataError, match=r"died.*data.num_workers.*--resume"):
        train(recipe, tmp_path / "run")
    assert len(list((tmp_path / "run" / "state").glob("step-*"))) == 1
    monkeypatch.undo()
    assert train(recipe, tmp_path / "run", start="resume").steps == 20


@pytest.mark.slow
def test_nan_in_many_steps_in_a_row_ends_training_with_advice(tmp_path, monkeypatch):
    def always_nan(*args):
        losses = objective.training_losses(*args)
        return losses._replace(loss=losses.loss * float("nan"))

    monkeypatch.setattr(training, "training_losses", always_nan)
    with pytest.raises(TrainingError, match=r"3 steps in a row.*--allow-changes.*learning_rate"):
        train(tiny_recipe(max_bad_steps=3), tmp_path)
    monkeypatch.undo()
    summary = train(
        tiny_recipe(max_bad_steps=3, learning_rate=1e-3), tmp_path, start="resume", max_steps=5, allow_changes=True
    )
    assert (summary.steps, summary.bad_steps) == (5, 3)


@pytest.mark.slow
def test_what_fails_after_the_last_step_costs_no_training(tmp_path, monkeypatch):
    def out_of_memory(self):
        raise torch.OutOfMemoryError("no memory for a grid")

    monkeypatch.setattr(training._Training, "_sample", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train(tiny_recipe(sample_every_epochs=100), tmp_path)
    assert len(list((tmp_path / "state").glob("step-*"))) > 0
    monkeypatch.undo()
    assert train(tiny_recipe(), tmp_path, start="resume").steps == max(losses(tmp_path))


@pytest.mark.slow
def test_a_last_line_that_a_crash_cut_off_does_not_stop_resuming(tmp_path):
    train(tiny_recipe(), tmp_path, max_steps=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(tiny_recipe(), tmp_path, start="resume", max_steps=4)
    assert list(losses(tmp_path)) == [1, 2, 3, 4]


def test_an_unreadable_held_out_image_is_named(tmp_path, capfd):
    (tmp_path / "images").mkdir()
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index:02d}.png")
    recipe = tiny_recipe(
        path=str(tmp_path / "images"), num_classes=0, label_drop=0.0, guidance=Guidance(), in_memory=False,
        num_workers=0, held_out_images=2, batch_size=4,
    )  # fmt: skip
    images = load_data(recipe.data, image_size=8, in_channels=1)
    names = [Path(images.held_out[index].image.numpy().tobytes().hex()) for index in range(2)]
    for file in (tmp_path / "images").glob("*.png"):
        if Path(np.asarray(Image.open(file)).tobytes().hex()) in names[1:]:
            file.write_bytes(b"broken")
            broken = file.name
    train(recipe, tmp_path / "run", max_steps=1)
    assert broken in capfd.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"volume_preserving": True, "distribution": "quadratic", "weight": "t2"},
        {
            "num_classes": 0,
            "label_drop": 0.0,
            "guidance": Guidance(weight=0.5, temperature=1.5),
            "ema_decay": None,
            "max_grad_norm": None,
        },
        {"noise_conditioned": False, "distribution": "constant", "weight": "one", "num_denoise_steps": 1},
        {
            "patch_size": (4, 2),
            "shared_layers": 1,
            "learned_first_token": True,
            "input_scale": 2.0,
            "distribution": "lognormal",
            "weight": "t_normalised",
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_flow_trains(tmp_path, changes):
    summary = train(tiny_recipe(**changes), tmp_path, max_steps=2)
    assert summary.bad_steps == 0
    assert all(np.isfinite(value) for value in summary.held_out.nll.values())


def test_likelihood_training_reports_bits_per_dim_of_the_8_bit_image(tmp_path):
    recipe = tiny_recipe(
        noise_conditioned=False, distribution="dequantise", weight="one", method="skip", horizontal_flip=False
    )
    summary = train(recipe, tmp_path, max_steps=3)
    # A fresh flow would spend about 8 bits on an even grey level; digits are mostly black or white.
    assert 3 < summary.held_out.bpd < 12
    assert summary.held_out.nll == {}


@pytest.mark.parametrize(("likelihood", "steps"), [(False, "high"), (True, "highest")])
def test_tf32_is_for_steps_alone_and_not_for_those_of_a_likelihood(tmp_path, monkeypatch, likelihood, steps):
    found = []

    def noting(function):
        def noted(*args, **kwargs):
            found.append((function.__name__, torch.get_float32_matmul_precision()))
            return function(*args, **kwargs)

        return noted

    for name in ("training_losses", "evaluate_held_out", "sample_grid"):
        monkeypatch.setattr(training, name, noting(getattr(training, name)))
    changes = {"noise_conditioned": False, "distribution": "dequantise", "weight": "one", "method": "skip"}
    before = torch.get_float32_matmul_precision()
    train(tiny_recipe(**(changes if likelihood else {})), tmp_path, max_steps=1)
    assert dict(found) == {"training_losses": steps, "evaluate_held_out": "highest", "sample_grid": "highest"}
    assert torch.get_float32_matmul_precision() == before


def test_the_prior_variance_of_a_volume_preserving_flow_is_estimated(tmp_path):
    train(tiny_recipe(volume_preserving=True), tmp_path, max_steps=8)
    variance = shared_weights(tmp_path)["prior_variance"]
    assert (variance - 1).abs().max() > 0.05


@pytest.mark.slow
def test_a_broken_image_is_named_and_training_goes_on(tmp_path, capfd):
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(20):
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    (tmp_path / "images" / "a" / "7.png").write_bytes(b"not a picture")
    recipe = tiny_recipe(
        path=str(tmp_path / "images"), num_classes=2, in_memory=False, num_workers=0, held_out_images=2, batch_size=8
    )
    summary = train(recipe, tmp_path / "run", max_steps=6)
    assert capfd.readouterr().err.count("7.png") == 1
    assert summary.unreadable_images == 1
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2])["unreadable_images"] == 1
    resumed = train(recipe, tmp_path / "run", max_steps=7, start="resume")
    assert resumed.unreadable_images == 1
    assert ITARFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline").config.training["unreadable_images"] == 1


def test_a_broken_image_in_memory_is_named_and_counted(tmp_path, capfd):
    (tmp_path / "images").mkdir()
    for index in range(30):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "7.png").write_bytes(b"not a picture")
    recipe = tiny_recipe(path=str(tmp_path / "images"), num_classes=0, label_drop=0.0, guidance=Guidance())
    summary = train(recipe, tmp_path / "run", max_steps=1)
    assert capfd.readouterr().err.count("7.png") == 1
    assert summary.unreadable_images == 1


def test_labels_are_compared_before_images_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("itarflow.data.load.ImageData.decoded", lambda self: pytest.fail("images were decoded"))
    with pytest.raises(ValueError, match="10 classes"):
        train(tiny_recipe(num_classes=4), tmp_path / "run")


def test_labels_that_are_not_the_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"10 classes.*model.num_classes is 4; .*--model.num-classes 10"):
        train(tiny_recipe(num_classes=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_left_alone(finished):
    run_dir, _ = finished
    before = losses(run_dir)
    with pytest.raises(RunError, match=r"--resume.*--restart"):
        train(tiny_recipe(), run_dir)
    assert losses(run_dir) == before


def test_other_settings_can_not_be_resumed(finished):
    run_dir, _ = finished
    with pytest.raises(RunError, match=r"train.learning_rate: 0.01 -> 0.5"):
        train(tiny_recipe(learning_rate=0.5), run_dir, start="resume")


def test_an_output_folder_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"can't be written.*--run-dir"):
        train(tiny_recipe(), tmp_path / "file" / "run")


def damage_tensors(state):
    (tensors,) = (state / "tensors").glob("*.distcp")
    tensors.write_bytes(tensors.read_bytes()[:100])


@pytest.mark.slow
def test_without_a_whole_state_nothing_is_resumed_and_the_fault_is_named(tmp_path):
    train(tiny_recipe(), tmp_path, max_steps=2)
    (state,) = (tmp_path / "state").glob("step-*")
    damage_tensors(state)
    with pytest.raises(RunError, match=r"step-00000002: .*distcp .*100 bytes"):
        train(tiny_recipe(), tmp_path, start="resume")


def test_a_damaged_newest_state_is_passed_over_and_the_run_ends_as_ever(finished, tmp_path, capsys):
    whole, _ = finished
    train(tiny_recipe(), tmp_path / "run", max_steps=10)
    older, newest = sorted((tmp_path / "run" / "state").glob("step-*"))
    assert (older.name, newest.name) == ("step-00000007", "step-00000010")
    damage_tensors(newest)
    train(tiny_recipe(), tmp_path / "run", start="resume")
    printed = capsys.readouterr().out
    assert "step-00000010: tensors/__0_0.distcp has 100 bytes" in printed
    assert f"Resuming from {older} at step 7" in printed
    assert losses(tmp_path / "run") == losses(whole)
    assert (tmp_path / "run" / "state" / "torn-step-00000010").is_dir()


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_state_and_says_so(finished, tmp_path):
    whole, _ = finished
    train(tiny_recipe(), tmp_path / "run", max_steps=3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file may grow beyond: as if the disk were full
    try:
        with pytest.raises(RunError, match=r"step 7 .*File too large"):
            train(tiny_recipe(), tmp_path / "run", start="resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [state.name for state in (tmp_path / "run" / "state").iterdir()] == ["step-00000003"]
    train(tiny_recipe(), tmp_path / "run", start="resume")
    resumed, expected = shared_weights(tmp_path / "run"), shared_weights(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_run_that_is_being_written_is_left_alone(tmp_path):
    train(tiny_recipe(), tmp_path / "run", max_steps=1)
    lock = hold(RunDir(tmp_path / "run"))
    for start in ("resume", "restart"):
        with pytest.raises(RunError, match="is being written by another training"):
            train(tiny_recipe(), tmp_path / "run", start=start)
    lock.release()
    train(tiny_recipe(), tmp_path / "run", start="resume", max_steps=2)


def test_flips_and_label_drops_follow_the_recipe():
    device = torch.device("cpu")
    draws = objective.draw(tiny_recipe(batch_size=4096, label_drop=0.25), 0, device)
    assert draws.flip.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert draws.drop.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not objective.draw(tiny_recipe(horizontal_flip=False), 0, device).flip.any()


def test_steps_draw_different_numbers_and_a_step_always_the_same():
    device = torch.device("cpu")
    first, again, second = (objective.draw(tiny_recipe(), step, device) for step in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first[:-1], again[:-1], strict=True))
    assert first.posterior is None  # in pixel space
    assert not torch.equal(first.noise, second.noise)


def test_dropped_labels_are_the_null_label():
    class Recorder(torch.nn.Module):
        def forward(self, images, labels, noise_level, context):
            self.labels = labels
            return training_output

    from itarflow.flow.block import FlowOutput

    training_output = FlowOutput(torch.zeros(4, 1, 1), torch.zeros(4))
    draws = objective.Draws(
        noise_level=torch.ones(4),
        noise=torch.zeros(4, 1, 8, 8),
        flip=torch.zeros(4, dtype=bool),
        drop=torch.tensor([True, False, True, False]),
        posterior=None,
    )
    recorder = Recorder()
    objective.training_losses(
        recorder, tiny_recipe(), torch.zeros(4, 1, 8, 8).byte(), torch.tensor([5, 6, 7, 8]), draws
    )
    assert recorder.labels.tolist() == [-1, 6, -1, 8]
