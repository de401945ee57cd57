"""`itarflow evaluate` from end to end, with a tiny flow and a stand-in for the network that makes features."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from evaluations import Run, save_checkpoint, terminal, write_photos
from PIL import Image
from tiny_extractor import TinyExtractor
from torch import Tensor

from itarflow import ITARFlowPipeline
from itarflow.commands import cli
from itarflow.commands.options import default_folder
from itarflow.data import DataConfig
from itarflow.evaluation import evaluate as evaluate_it
from itarflow.evaluation import scoring as evaluating
from itarflow.evaluation.conversion import as_scripts_see
from itarflow.evaluation.metrics.features import Sums, frechet_distance
from itarflow.evaluation.metrics.reference import reference_of
from itarflow.evaluation.samples.denoising import variants_of
from itarflow.evaluation.samples.files import open_samples
from itarflow.evaluation.samples.generate import Generation
from itarflow.inverse import Guidance
from itarflow.runtime.errors import DataError

FIGURES = ["frechet_distance", "kernel_distance", "precision", "recall"]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """evaluate("--seed", 3): what is printed; 10 samples of tmp_path/pipeline against tmp_path/photos."""
    return partial(terminal(TinyExtractor(), monkeypatch, capsys, tmp_path), "evaluate", "--num-samples", 10)


@pytest.fixture
def refused(evaluate: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """refused("--seed", -1): the message; nothing has been made."""

    def call(*words: object, **options: Any) -> str:
        with pytest.raises(SystemExit) as exit_:
            evaluate(*words, **options)
        assert exit_.value.code == 1
        assert not list((tmp_path / "evaluation").rglob("*.safetensors"))
        return " ".join(capsys.readouterr().err.split("Error: ")[1].split())

    return call


def report(folder: str = "evaluation") -> dict[str, Any]:
    return json.loads(Path(folder, "evaluation.json").read_text())


def test_samples_are_made_scored_written_and_noted(evaluate: Run, tmp_path: Path) -> None:
    printed = evaluate("--npz", "--png")
    found = report()
    assert list(found["ways"]) == ["raw", "self", "iterative"]
    for way, scores in found["ways"].items():
        assert list(scores["figures"]) == FIGURES
        assert scores["samples"] == 10
        assert scores["reference"] == "photos, split train"
        arrays = np.load(tmp_path / "evaluation" / f"{way}.npz")
        assert arrays["arr_0"].shape == (10, 4, 4, 3)
        assert arrays["arr_1"].tolist() == [0, 1] * 5
        pictures = sorted((tmp_path / "evaluation" / f"{way}-png").iterdir())
        assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pictures]), arrays["arr_0"][..., 0])
        assert f"{scores['figures']['frechet_distance']['value']:.4g}" in printed
    assert found["checkpoint"] == "pipeline"
    assert found["images of a class"] == [5]
    assert found["samples"]["guidance"]["weight"] == 1.0
    assert found["samples"]["cleaning"]["iterative"]["num_denoise_steps"] == 3
    noted = ITARFlowPipeline.from_pretrained("pipeline").config.evaluations
    assert len(noted) == 3
    name, line = list(noted.items())[2]
    assert name == (
        "iterative, 3 steps euler even, guidance 1, t_max 0.5: 10 samples, labels balanced, seed 0, against photos, "
        "split train, by tiny"
    )
    assert line.startswith("Fréchet distance (tiny) ")
    assert line.split(",")[0].split()[-1] in Path("pipeline", "README.md").read_text().split(name)[-1]


def test_figures_are_those_of_the_pictures_that_are_written(evaluate: Run, tmp_path: Path) -> None:
    evaluate("--ways", "self")
    photos = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "photos").rglob("*.png"))]
    real = TinyExtractor()(torch.from_numpy(np.stack(photos))[:, None]).pool
    made = TinyExtractor()(open_samples(Path("evaluation/self")).read(0, 10)).pool
    expected = frechet_distance(Sums.of(made).moments(), Sums.of(real).moments())
    assert list(report()["ways"]) == ["self"]
    assert report()["ways"]["self"]["figures"]["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-samples", 1), "--num-samples is 1; expected 2 or more"),
        (("--batch-size", 0), "--batch-size is 0; expected 1 or more"),
        (("--denoise-batch-size", -1), "--denoise-batch-size is -1"),
        (("--reference", "statistics.npz"), "give either --data (real images) or --reference"),
        (("--t-max", 0.7), "t_max: noise_level [0.7"),
        (("--num-denoise-steps", 0), "num_denoise_steps is 0"),
        (("--num-denoise-steps", 1, "--ways", "iterative"), "'iterative': this checkpoint, by its schedule (1 steps"),
        (("--method", "skip", "--ways", "self"), "knows raw"),
        (("--labels", "none", "--guidance-weight", 2), "no labels to guide by"),
        (("--guidance-weight", -1), "Guidance weight is -1"),
        (("--ways",), "no denoising variant is named; expected some of raw, self, iterative"),
        (("--num-samples", 10**30), "expected at most 100,000,000"),
        (("--seed", 2**64), "--seed is 18446744073709551616; expected a number >= 0, and below 2^63"),
    ],
)
def test_evaluate_refuses_with_a_message(refused: Run, words: tuple[object, ...], message: str) -> None:
    assert message in refused(*words)


def test_real_images_are_needed_of_the_checkpoints_classes(refused: Run, tmp_path: Path) -> None:
    assert "give either --data" in refused(data=None)
    assert "is no file" in refused("--reference", "nowhere.npz", data=None)
    others = write_photos(tmp_path / "others", ("a", "b", "c"))
    assert "have 3 classes, but the checkpoint knows 2" in refused(data=others)


def test_flows_of_one_level_are_denoised_in_one_step(evaluate: Run, tmp_path: Path, capsys: Any) -> None:
    save_checkpoint(tmp_path / "single", noise_conditioned=False)
    evaluate(checkpoint="single")
    assert list(report()["ways"]) == ["raw", "self"]
    with pytest.raises(SystemExit):
        evaluate("--ways", "iterative", "--output", "other", checkpoint="single")
    assert "knows raw, self" in " ".join(capsys.readouterr().err.split())


def test_images_that_are_not_finite_are_counted(evaluate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(noisy: Tensor, labels: Tensor | None, noise_level: Tensor) -> Tensor:
        return torch.where(torch.arange(len(noisy))[:, None, None, None] == 1, torch.nan, noisy)

    monkeypatch.setattr("itarflow.commands.options.load_denoiser", lambda *_, **__: diverges)
    printed = evaluate("--denoiser", "another")
    assert {way: scores["broken"] for way, scores in report()["ways"].items()} == {"raw": 0, "self": 0, "iterative": 3}
    assert "not finite" in printed
    assert "3 samples have values that are not finite" in printed


@pytest.mark.slow
def test_the_crop_is_that_of_the_training(evaluate: Run, refused: Run, tmp_path: Path) -> None:
    pipe = ITARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.record(tmp_path / "pipeline", "training", lambda _: {"name": "tiny", "recipe": {"data": {"crop": "adm"}}})
    assert "the checkpoint was trained on images with crop adm" in refused("--crop", "edm")
    evaluate()
    assert report()["reference"]["crop"] == "adm"


def test_the_function_takes_the_crop_and_the_classes_of_the_training(evaluate: Run, tmp_path: Path) -> None:
    pipe = ITARFlowPipeline.from_pretrained("pipeline")
    pipe.record(tmp_path / "pipeline", "training", lambda _: {"name": "tiny", "recipe": {"data": {"crop": "adm"}}})
    pipe = ITARFlowPipeline.from_pretrained("pipeline")
    options: dict[str, Any] = {"num_samples": 4, "extractor": TinyExtractor(), "cache": tmp_path / "kept"}
    for path in (tmp_path / "photos").rglob("*.png"):
        Image.fromarray(np.tile(np.asarray(Image.open(path)), (3, 5))).save(path)  # crops differ
    found = evaluate_it(pipe, "photos", ways=["raw"], **options)
    adm = evaluate_it(pipe, DataConfig(path="photos", crop="adm"), ways=["raw"], **options)
    assert found == adm
    with pytest.raises(ValueError, match="crop is center, but the checkpoint was trained on images with crop adm"):
        evaluate_it(pipe, DataConfig(path="photos"), ways=["raw"], **options)
    others = write_photos(tmp_path / "others", ("a", "b", "c"))
    with pytest.raises(DataError, match="have 3 classes, but the checkpoint knows 2"):
        evaluate_it(pipe, others, ways=["raw"], **options)


def test_what_others_have_noted_meanwhile_stays(
    evaluate: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def scored(*rest: Any, **options: Any) -> Any:
        pipe = ITARFlowPipeline.from_pretrained(tmp_path / "pipeline")
        pipe.record(tmp_path / "pipeline", "evaluations", lambda _: {"another one": "FID 3"})
        return real(*rest, **options)

    real = evaluating.scores_of
    monkeypatch.setattr("itarflow.commands.options.scores_of", scored)
    evaluate("--ways", "raw")
    noted = ITARFlowPipeline.from_pretrained(tmp_path / "pipeline").config.evaluations
    assert len(noted) == 2
    assert noted["another one"] == "FID 3"


def in_process(out: Path) -> None:
    """What one of several processes does; a fork, because imports take longer than the work."""
    signal.alarm(120)  # a process that hangs ends, and fails the test
    PartialState._reset_state()
    state = PartialState(cpu=True)
    torch.save(sampled_and_scored(out, state), out / f"{state.process_index}.pt")


def sampled_and_scored(out: Path, state: PartialState) -> list[dict[str, Any]]:
    """All scores of 10 samples, and which images this process has taken the features of."""
    pipe = ITARFlowPipeline.from_pretrained(out / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(10) % 2
    made = Generation(pipe=pipe, variants=variants_of(pipe, pipe.schedule()), labels=labels, batch_size=4)
    evaluating.save_samples({out / "samples": made}, state)
    extractor = TinyExtractor()
    reference = reference_of(
        DataConfig(path=str(out / "photos"), num_workers=0),
        image_size=4,
        in_channels=1,
        extractor=extractor,
        accelerator=state,
        cache=out / "kept",
    )
    scores, scored = evaluating.scores_of(
        [out / "samples" / way for way in made.variants], reference, extractor, state
    )
    assert scored == 30
    return [one.to_json() for one in scores]


@pytest.mark.slow
def test_two_processes_make_the_files_and_figures_of_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_checkpoint(tmp_path / name / "pipeline")
        write_photos(tmp_path / name / "photos")
    PartialState._reset_state()
    one = sampled_and_scored(tmp_path / "one", PartialState(cpu=True))
    debug_launcher(in_process, (tmp_path / "two",), num_processes=2)
    for index in range(2):
        two = torch.load(tmp_path / "two" / f"{index}.pt")
        for expected, found in zip(one, two, strict=True):
            for name, figure in expected["figures"].items():
                assert found["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-9, abs=1e-12)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one" / "samples").rglob("0*"))
    assert len(files) == 9
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_a_stop_is_told_with_the_way_on(
    evaluate: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("itarflow.commands.options.save_samples", stop)
    with pytest.raises(SystemExit) as exit_:
        evaluate()
    assert exit_.value.code == 130
    assert "The same command goes on with evaluation later." in capsys.readouterr().err


def test_every_part_of_guidance_can_be_evaluated(evaluate: Run, refused: Run) -> None:
    words = ("--guidance-rule", "gaussian", "--guidance-schedule", "constant", "--guidance-blocks", 1)
    evaluate("--ways", "self", *words, "--guided", "shift", "--guidance-temperature", 0.8, "--output", "other")
    wanted = {"weight": 1.0, "rule": "gaussian", "schedule": "constant", "blocks": 1, "shift": True, "scale": False,
              "temperature": 0.8}  # fmt: skip
    assert report("other")["guidance"] == report("other")["samples"]["guidance"] == wanted
    noted = ITARFlowPipeline.from_pretrained("pipeline").config.evaluations
    assert "guidance rule gaussian" in next(iter(noted))
    assert "temperature is 0" in refused("--guidance-temperature", 0)


def test_the_function_gives_what_the_command_gives(evaluate: Run, tmp_path: Path) -> None:
    evaluate("--guidance-weight", 2)
    pipe = ITARFlowPipeline.from_pretrained("pipeline")
    pipe.set_progress_bar_config(disable=True)
    data = DataConfig(path="photos", num_workers=0)
    options: dict[str, Any] = {"num_samples": 10, "extractor": TinyExtractor(), "cache": tmp_path / "kept"}
    found = evaluate_it(pipe, data, guidance=Guidance(weight=2.0), batch_size=4, **options)
    for way, scores in report()["ways"].items():
        assert found[way].to_json() == scores
    assert not list(Path(tempfile.gettempdir()).glob("itarflow-*/evaluation"))
    with pytest.raises(ValueError, match="num_samples is 1"):
        evaluate_it(pipe, data, **{**options, "num_samples": 1})


def test_the_official_protocol_truncates_and_flips(evaluate: Run) -> None:
    evaluate("--ways", "raw")
    evaluate("--ways", "raw", "--protocol", "official", "--output", "official")
    ours, theirs = (open_samples(Path(folder, "raw")).read(0, 10).int() for folder in ("evaluation", "official"))
    assert set((ours - theirs).flatten().tolist()) == {0, 1}
    assert report("official")["ways"]["raw"]["reference"] == "photos, split train, flipped, truncated"
    assert "flip real images at random: see --protocol official" in report()["protocol"]
    assert report("official")["conversion"].startswith("truncate(255 * 0.5 * (clip(x, -1, 1) + 1))")
    assert "made otherwise: conversion: round" in refused_again(evaluate, "--ways", "raw", "--protocol", "official")
    words = ("--reference", "a.npz", "--protocol", "official", "--output", "new")
    assert "flips real images at random" in refused_again(evaluate, *words, data=None)


def refused_again(evaluate: Run, *words: object, **options: Any) -> str:
    """The message of a call after others."""
    messages = list[str]()

    def refuse(error: Exception) -> None:
        messages.append(str(error))
        sys.exit(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("itarflow.runtime.processes.refuse", refuse)
        with pytest.raises(SystemExit):
            evaluate(*words, **options)
    return messages[0]


def test_a_quarter_of_the_real_levels_loses_one_and_images_are_flipped_by_their_number() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = levels.expand(64, 1, 16, 16)
    seen = as_scripts_see(images, 0)
    flipped = torch.tensor([not torch.equal(one.sort(dim=-1).values, one) for one in seen])
    assert 20 < int(flipped.sum()) < 44
    assert torch.equal(as_scripts_see(images[:8], 8), seen[8:16])
    whole = torch.where(flipped[:, None, None, None], seen.flip(-1), seen)
    assert int((levels.int() - whole[0].int()).sum()) == 63


def test_results_lie_beside_the_pipeline_of_a_run_or_are_named_after_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert default_folder(tmp_path / "run" / "pipeline", "evaluation") == Path("run-evaluation")
    (tmp_path / "run" / "recipe.json").write_text("{}")
    assert default_folder(tmp_path / "run" / "pipeline", "sweep") == tmp_path / "run" / "sweep"
    assert default_folder("somebody/digits", "evaluation") == Path("digits-evaluation")


@pytest.mark.parametrize(
    ("command", "place"),
    [("evaluate", "evaluation"), ("evaluate", "evaluation/self"), ("evaluate", "evaluation/raw-png"),
     ("sweep", "sweep"), ("sweep", "sweep/guidance-1_t-0.5"), ("sweep", "sweep/guidance-1_t-0.5/steps-03")],
)  # fmt: skip
def test_links_in_a_run_from_elsewhere_are_not_written_through(
    evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str, place: str
) -> None:
    save_checkpoint(tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "recipe.json").write_text("{}")
    link, elsewhere = tmp_path / "run" / place, tmp_path / "elsewhere"
    link.parent.mkdir(parents=True, exist_ok=True)
    elsewhere.mkdir()
    words = f"{command} run/pipeline --data photos --num-samples 4 --num-workers 0 --device cpu --cache kept".split()
    link.symlink_to(elsewhere)
    with pytest.raises(SystemExit) as exit_:
        cli.main([*words, "--png"] if command == "evaluate" else words)
    assert exit_.value.code == 1
    assert f"run/{place} is a link to another folder" in " ".join(capsys.readouterr().err.split())
    assert not list(elsewhere.iterdir())


def test_evaluations_are_shown_in_one_table(evaluate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("--ways", "raw", "self", "--output", "one/evaluation")
    evaluate("--ways", "raw", "--seed", 2, "--output", "two/evaluation")
    capsys.readouterr()
    cli.main(["table", "one/evaluation", "two/evaluation/evaluation.json"])
    printed = capsys.readouterr().out
    for folder in ("one/evaluation", "two/evaluation"):
        value = report(folder)["ways"]["raw"]["figures"]["frechet_distance"]["value"]
        assert f"{value:.4g}" in printed
    assert "10 samples against photos, split train, by tiny" in printed
    assert "do not compare" not in printed
    evaluate("--ways", "raw", "--num-samples", 12, "--output", "three")
    capsys.readouterr()
    cli.main(["table", "one/evaluation", "three"])
    printed = capsys.readouterr().out
    assert "figures that do not compare" in printed
    assert "three: 12 samples against photos" in printed


@pytest.mark.parametrize("content", ["[]", "{", '{"checkpoint": 3}', '{"checkpoint": "a", "ways": {"raw": 1}}'])
def test_damaged_files_of_an_evaluation_are_named(
    evaluate: Run, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    evaluate("--ways", "raw")
    whole = report()
    Path("evaluation", "evaluation.json").write_text(content)
    with pytest.raises(SystemExit):
        cli.main(["table", "evaluation"])
    assert "evaluation.json is damaged" in " ".join(capsys.readouterr().err.split())
    Path("evaluation", "raw", "scores.json").write_text(content)  # is made again
    evaluate("--ways", "raw")
    assert report()["ways"] == whole["ways"]


def test_a_folder_of_photographs_is_not_written_into(evaluate: Run) -> None:
    before = sorted(Path("photos").rglob("*"))
    assert "photos holds other things" in refused_again(evaluate, "--output", "photos")
    assert sorted(Path("photos").rglob("*")) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("training", "x"), ("training", {"recipe": None}), ("training", {"recipe": {"data": [1]}}), ("evaluations", [1]),
     ("training", {"recipe": {"data": {"crop": 3}}}), ("evaluations", 1e308)],
)  # fmt: skip
def test_a_checkpoint_with_foreign_settings_is_refused_before_the_work(
    evaluate: Run, field: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("pipeline", "model_index.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(SystemExit) as exit_:
        evaluate("--ways", "raw")
    assert exit_.value.code == 1
    assert field in capsys.readouterr().err
    assert not list(Path("evaluation").rglob("*.safetensors"))
