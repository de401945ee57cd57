"""The command `itarflow bpd`: figures of each image, how it goes on, what it leaves out, says and refuses."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import tiny_vae
from image_files import damage, encoded, load, write_classes, write_image, write_one_broken, write_parquet
from PIL import Image

from itarflow import ITARFlowPipeline, TARFlow
from itarflow.codec import Posterior, VaeCodec, to_pixels
from itarflow.commands import cli
from itarflow.evaluation.likelihood import bpd as measuring
from itarflow.evaluation.likelihood.bounds import Noise, likelihoods
from itarflow.evaluation.likelihood.report import open_report
from itarflow.runtime import processes

Run = Callable[..., str]
LEVELS = ("--noise-levels", "0.1", "0.5")
NOISES = (Noise("uniform", 0.1), Noise("gaussian", 0.1), Noise("gaussian", 0.5))
QUICK = ("--num-workers", "0", "--split", "train")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven flat images, grey 0 .. 6, of the classes that `save` names, which come in another order here."""
    return write_classes(tmp_path / "images", {"bird": 3, "cat": 2, "dog": 2})


@pytest.fixture
def checkpoint(save: Callable[..., Path]) -> Path:
    return save()


@pytest.fixture
def measured(run: Run, checkpoint: Path, data: Path) -> Callable[..., dict[str, Any]]:
    """measured("--draws", 2): bpd.json of the command with these words, once it has run into a folder."""

    def measure(*words: object, output: str = "out") -> dict[str, Any]:
        run("bpd", checkpoint, "--data", data, *QUICK, *LEVELS, "--output", output, *words)
        return json.loads(Path(f"{output}/bpd.json").read_text())

    return measure


def table(folder: str = "out") -> list[dict[str, str]]:
    with (Path(folder) / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def directly(checkpoint: Path, data: Path, labels: torch.Tensor | None, **options: Any) -> Any:
    images = load(data, image_size=4).train
    pixels = to_pixels(torch.stack([images[index].image for index in range(len(images))]))
    flow = ITARFlowPipeline.from_pretrained(checkpoint).flow
    return likelihoods(flow, Posterior(pixels, None), labels, NOISES, **options)


def test_each_images_figures_and_their_means_are_those_of_the_flow(measured, checkpoint, data):
    report = measured("--draws", 3, "--seed", 4)
    labels = torch.tensor([2, 2, 2, 0, 0, 1, 1])  # bird, cat, dog by the numbers of the checkpoint
    expected, rows = directly(checkpoint, data, labels, draws=3, seed=4), table()
    assert [(row["image"], row["label"]) for row in rows] == [
        (str(i), str(label)) for i, label in enumerate(labels.tolist())
    ]
    parts = {"nats/dim": expected.nll, "bits/dim": expected.bits, "bits/dim, one draw": expected.bits_one_draw}
    assert len(rows[0]) == 2 + 9
    for name, part in parts.items():
        for index, noise in enumerate(NOISES):
            assert column(rows, f"{name}, {noise.title}") == pytest.approx(part[:, index].tolist(), abs=1e-5)
            figures = report["results"][index]
            assert (figures["noise"], figures["noise_level"]) == (noise.kind, noise.level)
            assert figures[name]["mean"] == pytest.approx(float(part[:, index].mean()), abs=1e-5)
            error = float(part[:, index].std()) / math.sqrt(7)
            assert figures[name]["standard_error"] == pytest.approx(error, rel=1e-3)
            assert figures[name]["not_finite"] == 0
    assert (report["images"], report["broken"]) == (7, [])
    settings = report["settings"]
    assert {settings[name] for name in ("draws", "seed", "num_images")} == {3, 4, 7}
    assert (settings["data"], settings["labels"], settings["dtype"]) == ("images", "of the data", "float32")
    assert set(report["versions"]) == {"itarflow", "torch"}
    assert Image.open("out/nll.png").size[0] > 100


@pytest.mark.slow
def test_neither_batches_nor_the_number_of_images_change_an_images_figures(measured):
    measured("--draws", 2)
    whole = table()
    for words, kept in ((("--batch-size", 2), range(7)), (("--num-images", 3), (0, 2, 4))):
        measured("--draws", 2, *words, output=f"other{words[0]}")
        other = table(f"other{words[0]}")
        assert [row["image"] for row in other] == [str(index) for index in kept]
        for row, index in zip(other, kept, strict=True):
            assert [*map(float, row.values())] == pytest.approx([*map(float, whole[index].values())], abs=1e-5)


def test_labels_may_be_left_out(measured, checkpoint, data):
    report = measured("--unlabelled")
    expected = directly(checkpoint, data, None)
    assert report["settings"]["labels"] == "none"
    assert report["results"][1]["nats/dim"]["mean"] == pytest.approx(float(expected.nll[:, 1].mean()), abs=1e-5)
    assert {row["label"] for row in table()} == {"-1"}


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(measured, monkeypatch, capsys):
    whole = measured(output="whole")
    asked: list[int] = []

    def stop_after_two(*args: Any, **options: Any) -> Any:
        asked.extend(options["numbers"])
        if len(asked) > 4:
            raise KeyboardInterrupt
        return likelihoods(*args, **options)

    monkeypatch.setattr(measuring, "likelihoods", stop_after_two)
    with pytest.raises(SystemExit) as exit_:
        measured("--batch-size", 2)
    assert exit_.value.code == 130
    assert "The same command goes on with out later" in capsys.readouterr().err.replace("\n", " ")
    with next(Path("out").glob(".rows-*")).open("a") as file:
        file.write('{"4": {"label": 0, "val')  # as a killed process leaves it
    asked.clear()
    monkeypatch.setattr(measuring, "likelihoods", lambda *a, **k: asked.extend(k["numbers"]) or likelihoods(*a, **k))
    report = measured("--batch-size", 2)
    assert asked == [4, 5, 6]
    for ours, theirs in zip(report["results"], whole["results"], strict=True):
        assert ours["bits/dim"]["mean"] == pytest.approx(theirs["bits/dim"]["mean"], abs=1e-5)
    asked.clear()
    assert measured() == report
    assert asked == []


@pytest.mark.slow
def test_figures_of_other_settings_or_weights_are_left_alone(measured, refused, checkpoint, data, save):
    measured()
    before = Path("out/bpd.json").read_bytes()
    words = ("bpd", checkpoint, "--data", data, *QUICK, *LEVELS, "--output", "out")
    message = refused(*words, "--seed", 1)
    assert "holds figures of other settings" in message
    assert "seed: 0 -> 1" in message
    save({"seed": 1})
    assert "weights: " in refused(*words)
    assert Path("out/bpd.json").read_bytes() == before


@pytest.mark.slow
def test_figures_of_other_data_are_not_taken_for_the_same(measured, refused, checkpoint, data, tmp_path):
    measured()
    words = ("bpd", checkpoint, *QUICK, *LEVELS, "--output", "out", "--data")
    namesake = write_classes(tmp_path / "elsewhere" / "images", {"bird": 3, "cat": 2, "dog": 2})
    assert "images_digest: " in refused(*words, namesake)
    write_image(data / "cat" / "000.png", 200, (12, 8))  # in place
    message = refused(*words, data)
    assert "images_digest: " in message
    assert "labels_digest: " not in message


@pytest.mark.slow
def test_figures_of_other_labels_are_not_taken_for_the_same(run, refused, checkpoint, tmp_path):
    labels, features = [0, 1, 2], datasets.ClassLabel(names=["cat", "dog", "bird"])
    columns = {"image": [{"bytes": encoded(index), "path": None} for index in labels], "a": labels, "b": labels[::-1]}
    kinds = datasets.Features({"image": datasets.Image(), "a": features, "b": features})
    write_parquet(tmp_path / "parquet" / "train.parquet", columns, kinds)
    words = ("bpd", checkpoint, "--data", tmp_path / "parquet", *QUICK, *LEVELS, "--output", "out", "--label-column")
    run(*words, "a")
    message = refused(*words, "b")
    assert "labels_digest: " in message
    assert "images_digest: " not in message


@pytest.mark.slow
def test_figures_of_another_vae_are_not_taken_for_the_same(run, refused, save, data):
    def words(**vae: Any) -> tuple[object, ...]:
        folder = save({"in_channels": 4}, vae=tiny_vae(in_channels=3, out_channels=3, **vae))
        return "bpd", folder, "--data", data, *QUICK, *LEVELS, "--output", "out"

    run(*words())
    assert "nothing was left to do" in run(*words())
    assert "vae encoder: " in refused(*words(seed=1))
    assert "vae scaling_factor: 0.4 -> 0.3" in refused(*words(scaling_factor=0.3))


@pytest.mark.slow
def test_what_is_measured_is_not_written_anew(measured, monkeypatch):
    def no_space(_file: int) -> None:
        raise OSError(28, "No space left on device")

    whole = measured()
    (rows,) = Path("out").glob(".rows-*")
    before = rows.stat()
    assert measured() == whole
    assert (rows.stat().st_ino, rows.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with rows.open("a") as file:
        file.write('{"4": {"lab')
    with monkeypatch.context() as patch:
        patch.setattr("itarflow.runtime.files.os.fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            open_report(Path("out"), whole["settings"])
    assert set(open_report(Path("out"), whole["settings"])) == set(range(7))
    assert rows.read_text().endswith("}\n")


@pytest.mark.slow
@pytest.mark.parametrize("line", ['{"4": {"lab\n', "[1]\n", '{"a": {}}\n'])
def test_a_damaged_row_is_named(measured, refused, checkpoint, data, line):
    measured("--batch-size", 3)
    (rows,) = Path("out").glob(".rows-*")
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([lines[0], line, *lines[1:]]))
    message = refused("bpd", checkpoint, "--data", data, *QUICK, *LEVELS, "--output", "out")
    assert f"line 2 of {rows} is damaged" in message
    assert "delete that line" in message
    rows.write_text("".join(lines))
    assert measured()["images"] == 7


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"settings": [1]}', "[" * 100_000], ids=range(5))
def test_a_damaged_report_is_named(measured, refused, checkpoint, data, content):
    measured()
    Path("out/bpd.json").write_text(content)
    message = refused("bpd", checkpoint, "--data", data, *QUICK, *LEVELS, "--output", "out")
    assert "out/bpd.json is damaged" in message
    assert "choose another folder" in message


@pytest.mark.slow
def test_processes_count_anew_in_each_call(measured, monkeypatch):
    names, counter = [], processes.shared_counter
    monkeypatch.setattr(processes, "shared_counter", lambda name: names.append(name) or counter(name))
    measured()
    measured()
    assert len(set(names)) == 2


def test_no_folder_of_this_machine_is_named(measured, data, tmp_path):
    damage(data / "cat" / "001.png")
    (broken,) = measured()["broken"]
    assert broken.startswith("cat/001.png: ")
    assert str(tmp_path) not in Path("out/bpd.json").read_text()


def test_unreadable_images_are_left_out_and_named(run, refused, save, tmp_path):
    folder, broken = save({"num_classes": 0}), write_one_broken(tmp_path / "broken")
    words = ("bpd", folder, "--data", broken, *QUICK, *LEVELS)
    printed = run(*words, "--output", "out")
    assert "Likelihood of 4 images" in printed
    assert "1 unreadable image left out" in printed
    assert "002.png" in printed
    assert [row["image"] for row in table()] == ["0", "1", "3", "4"]
    assert json.loads(Path("out/bpd.json").read_text())["images"] == 4
    assert "1 images could not be read" in refused(*words, "--max-broken", 0)


def test_values_that_are_not_finite_are_counted_not_dropped(run, checkpoint, data, monkeypatch):
    log_prob = TARFlow.log_prob

    def overflow(self: TARFlow, images: Any, labels: Any, level: Any, context: Any) -> Any:
        values = log_prob(self, images, labels, level)
        return torch.where(labels == 2, math.inf, values) if level == 0.5 else values

    monkeypatch.setattr(TARFlow, "log_prob", overflow)
    printed = run("bpd", checkpoint, "--data", data, *QUICK, *LEVELS, "--output", "out")
    assert "3 not finite" in printed
    first, _, last = json.loads(Path("out/bpd.json").read_text())["results"]
    assert first["nats/dim"]["mean"] is not None
    assert last["nats/dim"] == {"mean": None, "standard_error": None, "not_finite": 3}
    assert [row["nats/dim, gaussian t=0.5"] for row in table()][:3] == ["-inf"] * 3


def test_a_flow_of_codes_gives_nats_of_its_codes_and_no_bits(run, refused, save, data):
    vae = tiny_vae(in_channels=3, out_channels=3)
    folder = save({"in_channels": 4}, vae=vae)
    words = ("bpd", folder, "--data", data, *QUICK)
    printed = run(*words, *LEVELS, "--output", "out", "--seed", 5)
    assert "bits/dim of pixels do not follow" in printed
    assert "bits/dim <=" not in printed
    assert [*table()[0]] == ["image", "label", "nats/dim, gaussian t=0.1", "nats/dim, gaussian t=0.5"]
    pipe = ITARFlowPipeline.from_pretrained(folder)
    images = load(data, image_size=8).train
    posterior = VaeCodec(pipe.vae).encode(to_pixels(torch.stack([images[index].image for index in range(7)])))
    labels = torch.tensor([2, 2, 2, 0, 0, 1, 1])
    expected = likelihoods(pipe.flow, posterior, labels, NOISES[1:], seed=5, bits=False).nll
    assert column(table(), "nats/dim, gaussian t=0.5") == pytest.approx(expected[:, 1].tolist(), abs=1e-4)
    assert "bits/dim can't be had from codes" in refused(*words, "--noise", "uniform")


def test_a_flow_trained_for_likelihoods_has_one_row(run, save, data):
    folder = save({"noise_conditioned": False, "noise_range": None})
    printed = run("bpd", folder, "--data", data, *QUICK, "--draws", 2)
    assert "with 1 draw" in printed
    assert "gaussian" not in printed
    assert "out of distribution" not in printed
    assert not list(Path().iterdir())


def test_it_says_when_a_flow_is_asked_out_of_its_training(run, checkpoint, data):
    assert "out of distribution" in run("bpd", checkpoint, "--data", data, *QUICK, "--noise", "uniform")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--draws", 0), "draws is 0"),
        (("--num-images", 0), "num_images is 0"),
        (("--num-images", 8), "7 images"),
        (("--batch-size", 0), "batch_size is 0"),
        (("--seed", -1), "seed is -1"),
        (("--noise-levels", 0.7), "lies outside [0.02, 0.6]"),
        (("--num-levels", 0), "num_levels is 0"),
        (("--split", "test"), "no split 'test'"),
        (("--device", "nowhere"), "--device nowhere can't be used"),
        (("--output", "/proc/here"), "can't be written"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_work(refused, checkpoint, data, monkeypatch, words, message):
    monkeypatch.setattr(TARFlow, "log_prob", None)  # its call would raise a TypeError
    assert message in " ".join(refused("bpd", checkpoint, "--data", data, *QUICK, *words).split())


def test_labels_that_are_not_the_flows_are_refused(refused, run, checkpoint, tmp_path):
    two = write_classes(tmp_path / "two", {"cat": 1, "dog": 2})
    none = write_parquet(tmp_path / "none" / "train.parquet", {"image": [{"bytes": encoded(9), "path": "a.png"}]})
    assert "have 2 classes, but the flow knows 3" in refused("bpd", checkpoint, "--data", two, *QUICK)
    assert "have no labels, but the flow knows 3" in refused("bpd", checkpoint, "--data", none, *QUICK)
    assert "Likelihood of 1 image (" in run("bpd", checkpoint, "--data", none, *QUICK, "--unlabelled")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bpd", "--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("Measure how likely a flow finds real images", "--draws", "upper bounds", "accelerate launch"):
        assert part in printed
