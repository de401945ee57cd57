"""Several processes on one machine train the same flow as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_vae
from PIL import Image
from safetensors.torch import load_file

from itarflow import DenoiseScheduler, ITARFlowPipeline
from itarflow.commands import cli
from itarflow.data import DataConfig
from itarflow.data.prepare.encode import begin, encode_share, finish
from itarflow.data.prepare.encode_plan import EncodeConfig, plan_encoding
from itarflow.training.decoder.config import DecoderConfig, TuneConfig
from itarflow.training.decoder.finetune import fine_tune
from itarflow.training.decoder.losses import LossConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "digits.py"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # more would disturb one another
SMALL = ("--model.channels", "16", "--model.num-layers", "1", "1", "--model.head-dim", "16", "--model.patch-size", "4",
         "--train.trackers", "--train.log-every", "1", "--sampling.num-images", "10", "--max-steps", "6")  # fmt: skip


def launch(script, *words, processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=ONE_THREAD)


def run(run_dir, *words, processes):
    return launch(RECIPE, "--run-dir", run_dir, *words, processes=processes)


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return losses + [value for line in lines if "held_out" in line for value in line["held_out"]["nll"].values()]


def weights(run_dir):
    return load_file(run_dir / "pipeline" / "flow" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run by two processes."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    done = run(run_dir, *SMALL, processes=2)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [(("--train.learning-rate", "nan"), "expected a number"), (("--data.path", "./nothing"), "does not exist")],
    ids=["option", "data"],
)
def test_what_is_wrong_for_all_processes_is_said_once(tmp_path, words, message):
    done = run(tmp_path / "run", *words, processes=2)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count(message) == 1


def test_a_recipe_is_a_script(tmp_path):
    done = run(tmp_path / "run", *SMALL[:-1], "2", processes=1)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 6  # two losses, and those of held-out images at four levels
    assert weights(tmp_path / "run")


@pytest.mark.slow
def test_two_processes_give_the_losses_and_weights_of_one(two, tmp_path):
    done = run(tmp_path / "one", *SMALL, processes=1)
    assert done.returncode == 0, done.stderr
    assert len(metrics(two)) == 10
    assert metrics(two) == pytest.approx(metrics(tmp_path / "one"), abs=1e-5)
    ours, theirs = weights(two), weights(tmp_path / "one")
    assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in ours)


@pytest.mark.slow
def test_a_sharded_training_is_the_replicated_one_and_goes_on_on_one_process(two, tmp_path):
    done = run(tmp_path / "run", *SMALL[:-1], "4", "--train.shard", processes=2)
    assert done.returncode == 0, done.stderr
    assert "the model sharded over them" in done.stdout
    done = run(tmp_path / "run", *SMALL, "--resume", processes=1)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")[:6] == pytest.approx(metrics(two)[:6], abs=1e-5)
    ours, theirs = weights(tmp_path / "run"), weights(two)
    assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in theirs)


@pytest.mark.slow
def test_two_processes_encode_the_codes_that_one_does(tmp_path):
    vae, one, two = (tmp_path / name for name in ("vae", "one", "two"))
    tiny_vae().save_pretrained(vae)
    plan = plan_encoding(EncodeConfig(source="digits", out=one, vae=str(vae), size=8, shard_size=600, num_workers=0))
    begin(plan)
    encode_share(plan, device="cpu", count=int)
    finish(plan)
    words = ("digits", two, "--vae", vae, "--size", "8", "--shard-size", "600", "--num-workers", "0")
    done = launch(RECIPE.parents[1] / "vae" / "encode_dataset.py", *words, processes=2)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert len(names) == 5
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.slow
def test_two_processes_measure_the_likelihoods_that_one_does(make_flow, tmp_path):
    flow = make_flow(in_channels=1, num_classes=10, noise_range=(0.1, 0.5))
    ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.1)).save_pretrained(tmp_path / "pipeline")
    words = ("bpd", tmp_path / "pipeline", "--data", "digits", "--split", "train", "--num-images", "60",
             "--num-levels", "2", "--batch-size", "8", "--num-workers", "0", "--output")  # fmt: skip
    cli.main([*map(str, words), str(tmp_path / "one")])
    done = launch("-m", "itarflow", *words, tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "bpd.json").read_text()) for name in ("one", "two"))
    assert two["settings"] == one["settings"]
    assert [part["bits/dim"]["mean"] for part in two["results"]] == pytest.approx(
        [part["bits/dim"]["mean"] for part in one["results"]], abs=1e-5
    )
    assert done.stdout.count("Likelihood of 60 images") == 1
    assert len(list((tmp_path / "two").glob(".rows-*"))) == 2


@pytest.mark.slow
def test_two_processes_fine_tune_a_decoder_as_one(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    config = DecoderConfig(
        vae=str(tmp_path / "vae"),
        size=8,
        t_max=0.3,
        data=DataConfig(path="digits", num_workers=0),
        loss=LossConfig(adversarial=0.1),
        train=TuneConfig(steps=3, batch_size=8, accumulation=2, log_every=1, trackers=()),
    )
    fine_tune(config, tmp_path / "one")
    words = ("digits", tmp_path / "two", "--vae", config.vae, "--size", "8", "--t-max", "0.3", "--train.steps", "3",
             "--train.batch-size", "8", "--train.accumulation", "2", "--train.log-every", "1", "--train.trackers",
             "--loss.adversarial", "0.1", "--data.num-workers", "0")  # fmt: skip
    done = launch(RECIPE.parents[1] / "vae" / "finetune_decoder.py", *words, processes=2)
    assert done.returncode == 0, done.stderr
    logged = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("one", "two")]
    terms = [[line[name] for line in lines if "loss" in line for name in ("loss", "critic")] for lines in logged]
    assert len(terms[0]) == 6
    assert terms[1] == pytest.approx(terms[0], abs=1e-5)


@pytest.mark.slow
def test_a_training_killed_at_random_instants_ends_with_the_weights_of_an_undisturbed_one():
    command = [sys.executable, str(RECIPE.parents[1] / "benchmarks" / "kill_and_resume.py")]
    command += ["--kills", "1", "--steps", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Weights identical: True. All 16 losses identical: True." in done.stdout


@pytest.mark.slow
def test_what_one_process_can_not_read_stops_both_in_order(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(64):
        Image.new("L", (8, 8), index).save(tmp_path / "images" / f"{index:02d}.png")
    (tmp_path / "images" / "40.png").write_bytes(b"not a picture")
    words = [*SMALL[:-1], "16", "--data.path", str(tmp_path / "images"), "--data.no-in-memory", "--data.num-workers",
             "1", "--data.held-out-images", "0", "--model.num-classes", "0", "--train.label-drop", "0",
             "--train.batch-size", "4", "--sampling.guidance.weight", "0"]  # fmt: skip
    done = run(tmp_path / "run", *words, "--data.max-broken", "0", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("1 images could not be read, and data.max_broken is 0") == 1
    assert "Connection closed" not in done.stderr
    (state,) = (tmp_path / "run" / "state").glob("step-*")
    assert int(state.name[-8:]) > 0


@pytest.mark.slow
def test_a_refusal_is_said_once(two):
    done = run(two, *SMALL, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("already holds a run") == 1
