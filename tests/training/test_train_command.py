"""A recipe as a command: help, overrides, the dry run, refusals, and what reaches the training."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from itarflow.commands import train as launch
from itarflow.data import DataConfig
from itarflow.flow import NoiseConfig
from itarflow.presets import itarflow_model
from itarflow.runtime.errors import RunError, TrainingError
from itarflow.runtime.signals import Interrupted
from itarflow.training import Recipe, TrainConfig
from itarflow.training.finished import Summary
from itarflow.training.held_out import Evaluation
from itarflow.training.run_folder import RunDir

Run = Callable[..., str]

RECIPE = Recipe(
    name="tiny",
    model=replace(
        itarflow_model("S", 32, num_classes=10),
        image_size=8,
        in_channels=1,
        patch_size=2,
        channels=64,
        num_layers=(1, 1),
    ),
    data=DataConfig(path="digits"),
    noise=NoiseConfig(t_min=0.02, t_max=0.5),
    train=TrainConfig(epochs=2, batch_size=100),
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wide terminal, an empty current folder, and no network."""
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run("--dry-run", ...): what the command prints, table borders and line breaks left out."""

    def call(*words: object, recipe: Recipe = RECIPE, **options: Any) -> str:
        launch.main(recipe, args=[str(word) for word in words], **options)
        return re.sub(r"[\s│]+", " ", capsys.readouterr().out)

    return call


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """refused(...): the message after "Error: ", once the command has exited with 1."""

    def call(*words: object, **options: Any) -> str:
        with pytest.raises(SystemExit) as exit_:
            run(*words, **options)
        assert exit_.value.code == 1
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return printed.err.split("Error: ")[1]

    return call


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The trainings that were asked for; none takes place."""
    calls: list[dict[str, Any]] = []

    def train(recipe: Recipe, run_dir: Path, **options: Any) -> Summary:
        calls.append({"recipe": recipe, "run_dir": run_dir, **options})
        held_out = Evaluation({"0.5": -1.25}, None)
        grid = RunDir(run_dir).grid(20)
        return Summary(
            run=RunDir(run_dir), steps=20, total_steps=33, seconds=61.0, images_per_second=33.0, held_out=held_out,
            bad_steps=2, unreadable_images=3, class_names=("cat", "guinea pig"), prompt=None, grid=grid,
        )  # fmt: skip

    monkeypatch.setattr(launch, "train", train)
    return calls


# -- help and the dry run ---------------------------------------------------------------------------------------


def test_help_explains_every_setting(run, capsys):
    with pytest.raises(SystemExit) as exit_:
        run("--help", description="An experiment with digits.")
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "An experiment with digits.",
        "--dry-run",
        "Check settings and data, print parameters, FLOPs and memory, and stop",
        "--resume",
        "--model.patch-size",
        "Side of a patch; divides image_size",
        "--data.path",
        "--noise.t-max",
        "--train.learning-rate",
        "Highest learning rate, after the warm-up",
        "--sampling.guidance.weight",
        "(default: 0.5)",
    ):
        assert words in printed


@pytest.mark.slow
def test_a_dry_run_prints_the_costs_and_leaves_nothing_behind(run, tmp_path):
    printed = run("--dry-run")
    flow = RECIPE.model.build()
    assert f"({sum(parameter.numel() for parameter in flow.parameters()):,})" in printed
    for words in ("FLOP an image", "32 sequential token steps, 10 scores", "gradient checkpointing", "MiB"):
        assert words in printed
    assert (
        "33 steps in 2 epochs images: 1,618 to train on, 179 held out, of column image labels: 10 classes" in printed
    )
    assert "Dry run: nothing was trained or written" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_overrides_reach_the_recipe(run):
    printed = run(
        "--dry-run", "--model.num-layers", 1, 2, 3, "--train.epochs", 7, "--train.no-compile", "--noise.t-max", 0.4,
        "--sampling.guidance.weight", 2.5, "--data.held-out-images", 20,
    )  # fmt: skip
    for words in ("num_layers=1,2,3", "epochs=7", "t_max=0.4", "weight=2.5", "20 held out", "in 7 epochs"):
        assert words in printed


@pytest.mark.slow
def test_the_values_of_overrides_are_what_changes_the_estimate(run):
    def parameters(printed: str) -> int:
        return int(re.search(r"parameters [\d.]+[KMG]? \(([\d,]+)\)", printed)[1].replace(",", ""))

    assert parameters(run("--dry-run", "--model.channels", 128)) > 3 * parameters(run("--dry-run"))


@pytest.mark.slow
def test_a_size_of_the_paper_is_recognised(run):
    recipe = replace(RECIPE, model=itarflow_model("B", 64), data=DataConfig())
    assert "iTARFlow-B, 770M in the paper" in run("--dry-run", recipe=recipe)


@pytest.mark.slow
def test_a_recipe_without_data_says_how_to_give_some(run):
    assert "none yet: give a folder, parquet files or a Hub name by --data.path" in run(
        "--dry-run", recipe=replace(RECIPE, data=DataConfig())
    )


@pytest.mark.slow
def test_data_on_the_hub_that_are_out_of_reach_do_not_fail_a_dry_run(run):
    assert "not checked: path 'someone/pets'" in run("--dry-run", "--data.path", "someone/pets")


def test_brackets_in_settings_are_printed(run):
    assert "path=someone/pets[bold]" in run("--dry-run", "--data.path", "someone/pets[bold]")


def test_without_denoising_no_score_is_announced(run):
    assert "32 sequential token steps, 0 scores" in run("--dry-run", "--sampling.method", "skip")


# -- the dry run's memory ---------------------------------------------------------------------------------------


def test_one_device_has_one_column_and_nothing_to_exchange(run):
    printed = run("--dry-run")
    assert "Memory of a training step" in printed
    assert "one device" in printed
    assert "DDP" not in printed
    assert "gathered from other devices" not in printed
    assert "fits into" not in printed


@pytest.mark.slow
def test_several_devices_are_compared_replicated_and_sharded(run):
    printed = run("--dry-run", "--devices", 4, "--memory", 0.5)
    for words in ("each of 4 devices", "replicated (DDP)", "sharded (FSDP2)", "gathered from other devices",
                  "fits into 90% of 0.5 GiB", "fits into 90% of 0.5 GiB, gradient checkpointing",
                  "--train.accumulation 1 for 25 at a time"):  # fmt: skip
        assert words in printed


def test_memory_that_is_too_small_is_said_plainly(run):
    assert "not even one image" in run("--dry-run", "--memory", 0.001)


def test_accumulation_follows_from_the_memory(run):
    words = re.findall(r"(\d+) images; --train.accumulation (\d+) for (\d+) at a time", run(
        "--dry-run", "--memory", 0.016, "--model.channels", 128, "--model.num-layers", 1, 2
    ))  # fmt: skip
    assert len(words) == 2
    for largest, accumulation, at_a_time in (map(int, found) for found in words):
        assert at_a_time <= largest < 100
        assert accumulation * at_a_time == 100


def test_devices_that_cannot_share_the_batch_are_told(run):
    assert "but 3 devices can't share a batch of 100 evenly" in run("--dry-run", "--devices", 3, "--memory", 1)


@pytest.mark.slow
def test_the_precision_of_the_estimate_is_the_recipes(run):
    assert "one image in float32" in run("--dry-run")
    assert "one image in bf16" in run("--dry-run", "--train.mixed-precision", "bf16")


@pytest.mark.parametrize(("option", "value"), [("--devices", "8"), ("--memory", "80.0")])
def test_options_of_the_dry_run_are_refused_without_it(refused, trained, option, value):
    assert f"{option} {value} belongs to the estimates of --dry-run" in refused(option, value)
    assert trained == []


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-steps", "0"), "--max-steps is 0; expected a number >= 1"),
        (("--save-every", "0"), "train.save_every is 0"),
        (("--devices", "0"), "--devices is 0; expected a number > 0"),
        (("--memory", "nan"), "--memory is nan; expected a number > 0"),
        (("--resume", "--restart"), "--resume and --restart exclude each other"),
        (("--model.patch-size", "3"), "patch_size 3 does not divide image_size 8; choose one of [1, 2, 4, 8]"),
        (("--model.no-noise-conditioned",), "noise.distribution is 'uniform', a range of noise levels"),
        (("--model.num-classes", "7"), "have 10 classes, but model.num_classes is 7; set --model.num-classes 10"),
        (("--data.path", "./nothing"), "'./nothing' does not exist"),
        (("--data.path", "nothing/at/all"), "'nothing/at/all' does not exist"),
        (("--data.path", "~/nothing"), "'~/nothing' does not exist"),
        (("--name", "../elsewhere"), "Another folder is given by --run-dir"),
        (("--data.split", "test"), "has no split 'test'; use one of train"),
        (("--data.path", "./[bold]/nothing"), "./[bold]/nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_that_makes_no_sense_is_refused(refused, trained, words, message):
    assert message in refused("--dry-run", *words)
    assert trained == []


def test_settings_are_refused_before_data_are_read_or_a_run_is_begun(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("itarflow.training.train.open_data", lambda *_, **__: pytest.fail("data were read"))
    assert "patch_size 3 does not divide" in refused("--model.patch-size", "3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train.epochs", "-1"), "train.epochs is -1.0; expected a number > 0"),
        (("--noise.t-min", "0.9"), "t_min=0.9, t_max=0.5; expected 0 < t_min <= t_max"),
        (("--sampling.num-images", "0"), "sampling.num_images is 0; expected a number >= 1"),
        (("--sampling.guidance.weight", "-1"), "Guidance weight is -1.0; expected a finite number >= 0"),
        (("--train.mixed-precision", "fp16"), "fp16"),
        (("--train.learning-rat", "1"), "--train.learning-rat"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_value_that_no_setting_takes_is_refused(run, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        run("--dry-run", *words)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert message in " ".join(printed.err.replace("│", " ").split())
    assert "Traceback" not in printed.out + printed.err


def test_unlabelled_images_for_a_model_with_classes_are_refused(refused, tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("L", (8, 8)).save(tmp_path / "images" / f"{index}.png")
    message = refused("--dry-run", "--data.path", tmp_path / "images")
    assert "have no labels, but model.num_classes is 10" in message
    assert "--model.num-classes 0" in message


# -- what reaches the training, and what comes of it -------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "start"), [((), "fresh"), (("--resume",), "resume"), (("--restart",), "restart")], ids=str
)
def test_a_training_starts_as_asked(run, trained, words, start):
    run(*words)
    (call,) = trained
    assert call == {
        "recipe": RECIPE,
        "run_dir": Path("runs/tiny"),
        "start": start,
        "max_steps": None,
        "allow_changes": False,
        "find_micro_batch": False,
    }


def test_options_of_the_run_reach_the_training(run, trained):
    run("--run-dir", "elsewhere", "--max-steps", 5, "--save-every", 3, "--train.seed", 9, "--name", "other")
    (call,) = trained
    assert (call["run_dir"], call["max_steps"]) == (Path("elsewhere"), 5)
    assert (call["recipe"].train.save_every, call["recipe"].train.seed, call["recipe"].name) == (3, 9, "other")


def test_the_name_decides_on_the_folder(run, trained):
    run("--name", "other")
    assert trained[0]["run_dir"] == Path("runs/other")


def test_the_report_says_what_was_reached_and_what_to_do_next(run, trained):
    printed = run("--run-dir", "runs/[x]")
    for words in (
        "20 steps of 33 (--resume goes on) in 61 s, 33 images/s",
        "nll -1.250 at t=0.5",
        "2 whose gradient was not finite",
        "runs/[x]/samples/step-00000020.png",
        "runs/[x]/metrics.jsonl",
        "3, each replaced by the next one",
        "itarflow sample runs/[x]/pipeline --class-labels cat 'guinea pig' --num-images 9 --output samples.png",
    ):
        assert words in printed


def test_the_next_command_of_a_model_of_captions_has_a_prompt(run, trained, monkeypatch):
    of_labels = launch.train

    def of_captions(*args: Any, **options: Any) -> Summary:
        return replace(of_labels(*args, **options), class_names=(), prompt="a photo of a cat")

    monkeypatch.setattr(launch, "train", of_captions)
    assert "itarflow sample runs/x/pipeline --prompt 'a photo of a cat' --num-images 9" in run("--run-dir", "runs/x")


@pytest.mark.parametrize(
    "error",
    [
        RunError("runs/tiny already holds a run"),
        TrainingError("10 steps in a row had no finite gradient"),
        OSError(28, "No space left on device", "runs/tiny/metrics.jsonl"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_stops_a_training_is_said_without_a_traceback(refused, monkeypatch, error):
    def train(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(launch, "train", train)
    assert str(error) in refused()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried 9"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_met_with_the_same_advice_on_any_device(refused, monkeypatch, error):
    def train(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(launch, "train", train)
    assert "--train.gradient-checkpointing, --train.mixed-precision bf16" in refused()


def test_a_training_that_clearly_does_not_fit_the_memory_is_refused_before_it_begins(
    refused, run, monkeypatch, trained
):
    monkeypatch.setattr(launch, "usable_memory", lambda device: 2**24)
    large = ("--model.channels", 128, "--model.num-layers", 1, 2)
    message = refused(*large)
    assert re.search(r"needs about [\d.]+ MiB for 100 images at a time, but there are 16 MiB", message)
    assert "--train.accumulation 2" in message
    assert "--no-check-memory" in message
    assert trained == []
    run(*large, "--no-check-memory")
    monkeypatch.setattr(launch, "usable_memory", lambda device: 2**34)
    run(*large)
    assert len(trained) == 2


@pytest.mark.parametrize("words", [("--dry-run",), ()], ids=str)
def test_a_tracker_that_is_not_installed_is_refused(refused, trained, monkeypatch, words):
    monkeypatch.setattr("itarflow.training.settings.get_available_trackers", list)
    assert "'tensorboard', which is not installed" in refused(*words)
    assert "pip install wandb" in refused(*words, "--train.trackers", "wandb")
    assert "'wandbb'; expected some of" in refused(*words, "--train.trackers", "wandbb")
    assert trained == []


def test_the_first_line_says_what_differs_from_the_recipe_and_no_more(run, trained):
    assert "Recipe tiny, as it is written. " in run()
    printed = run("--train.epochs", 7, "--model.num-layers", 1, 2)
    assert "Recipe tiny with model.num_layers=1,2 train.epochs=7.0 " in printed
    assert "batch_size" not in printed


def test_what_the_environment_asks_for_and_the_recipe_does_not_is_said(run, trained, monkeypatch):
    assert "environment" not in run()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    printed = run()
    assert "says gradient accumulation 4; the recipe's is used" in printed
    assert "says compilation by inductor; the recipe's is used" in printed
    assert "precision" not in printed


def test_an_interrupted_training_says_how_to_go_on_and_exits_with_the_signal(run, monkeypatch, capsys):
    def train(*args: object, **kwargs: object) -> None:
        raise Interrupted(15, Path("runs/tiny"), 12)

    monkeypatch.setattr(launch, "train", train)
    with pytest.raises(SystemExit) as exit_:
        run()
    assert exit_.value.code == 128 + 15
    assert (
        "Stopped at step 12; the state is saved in runs/tiny. Go on by the same command with --resume."
        in capsys.readouterr().out
    )
