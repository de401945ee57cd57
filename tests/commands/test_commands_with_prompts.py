"""Commands with a checkpoint that takes prompts: images, facts, evaluation, and what is refused."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("transformers")

from evaluations import terminal, write_photos
from tiny_extractor import TinyExtractor
from tiny_flows import randomise
from tiny_text import TOKENS, WIDTH, save_text_encoder, tiny_t5, tiny_tokenizer

from itarflow import DenoiseScheduler, ITARFlowPipeline, TARFlow, text_encoder
from itarflow.codec import Posterior, to_pixels
from itarflow.commands.prompts import prompts_in, take_encoder
from itarflow.data import DataConfig, load_data
from itarflow.data.dataset import PictureDecoder
from itarflow.evaluation.likelihood.bounds import Noise, likelihoods
from itarflow.pipeline import storage
from itarflow.pipeline.prompts import encoded_on
from itarflow.text_encoder import TextEncoder

PROMPTS = ["a corgi on the beach", "a red cat"]


def save_pipe(folder: Path, text: bool = True, **changes: Any) -> Path:
    """A flow of images of 4 x 4 pixels from prompts, with random weights."""
    sizes = {"in_channels": 3, "num_layers": (1, 1), "channels": 16, "head_dim": 16, "noise_range": (0.05, 0.5)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = TARFlow(**{"image_size": 4, **sizes, "context_dim": WIDTH, "context_tokens": TOKENS, "rotary_side": 2,
                             "start_token": True, "soft_clip": 1.0, **changes})  # fmt: skip
    randomise(flow)
    parts = {"text_encoder": tiny_t5(), "tokenizer": tiny_tokenizer()} if text else {}
    guidance = {"weight": 1.0, "rule": "gaussian", "schedule": "constant", "blocks": 1}
    scheduler = DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2)
    ITARFlowPipeline(flow, scheduler, guidance=guidance, **parts).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return save_pipe(tmp_path / "paint")


@pytest.fixture
def never_samples(monkeypatch):
    monkeypatch.setattr(ITARFlowPipeline, "__call__", lambda *_, **__: pytest.fail("has sampled"))


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def named(*prompts: str) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def test_sample_names_files_by_prompts_and_agrees_with_the_pipeline(run, checkpoint):
    assert "3 images in out" in run(
        "sample", checkpoint, *named(*PROMPTS, ""), "--output", "out", "--seed", 5, "--batch-size", 2
    )
    files = sorted(Path("out").iterdir())
    assert [file.name for file in files] == ["000000-a-corgi-on-the-beach.png", "000001-a-red-cat.png", "000002.png"]
    assert Image.open(files[0]).text["prompt"] == "a corgi on the beach"
    pipe = ITARFlowPipeline.from_pretrained(checkpoint)
    expected = pipe(prompt=[*PROMPTS, ""], generator=torch.Generator().manual_seed(5)).images
    for file, image in zip(files, expected, strict=True):
        assert np.abs(pixels(file).astype(int) - np.asarray(image)).max() <= 1  # of another batch size


def test_a_grid_has_the_prompts(run, checkpoint):
    run("sample", checkpoint, *named(*PROMPTS), "--num-images", 4)
    assert json.loads(Image.open("samples.png").text["prompts"]) == PROMPTS * 2
    Path("prompts.txt").write_text("a corgi on the beach\na red cat \n")
    run("sample", checkpoint, "--prompts", "prompts.txt", "--num-images", 4, "--output", "again.png")
    np.testing.assert_array_equal(pixels("samples.png"), pixels("again.png"))


def test_prompts_may_follow_one_another(run, checkpoint):
    run("sample", checkpoint, "--prompt", *PROMPTS, "--prompt", "")
    assert json.loads(Image.open("samples.png").text["prompts"]) == [*PROMPTS, ""]


def test_a_grid_of_rectangles(run, tmp_path):
    run("sample", save_pipe(tmp_path / "wide", image_size=(4, 8)), *named(*PROMPTS), "--no-captions")
    assert Image.open("samples.png").size == (2 * 48 + 2, 24)


def test_names_of_any_letters_and_length(run, checkpoint):
    with pytest.warns(UserWarning, match="is cut to 6"):
        run("sample", checkpoint, *named("ein Hündchen / 犬\n", "a " * 99 + "cat", "../.."), "--output", "out")
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["000000-ein-Hündchen-犬.png", f"000001-{'a-' * 29}a.png", "000002-..-...png"]
    assert Image.open(f"out/{names[0]}").text["prompt"] == "ein Hündchen / 犬\n"


def test_names_of_letters_of_many_bytes_are_short_enough(run, checkpoint):
    run("sample", checkpoint, *named("\U00020000" * 80), "--output", "out")
    (path,) = Path("out").iterdir()
    assert len(path.name.encode()) < 200
    assert Image.open(path).text["prompt"] == "\U00020000" * 80


def test_lines_of_a_file_are_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\r\n a\x0bb\x85c\u2028d \n\n\n".encode())
    assert prompts_in(file) == ["a cat", "", "a\x0bb\x85c\u2028d"]
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="is empty"):
        prompts_in(file)


def test_prompts_may_come_through_a_pipe(monkeypatch, capsys, tmp_path):
    """Which can be read once."""
    run = terminal(TinyExtractor(), monkeypatch, capsys, tmp_path)
    save_pipe(tmp_path / "paint", in_channels=1)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        file.write("a dog\na cat\n")
    run("evaluate", "--prompts", f"/dev/fd/{reader}", checkpoint="paint")
    os.close(reader)
    assert Path("evaluation/evaluation.json").is_file()


def test_an_encoder_that_does_not_fit_a_device_reads_on_the_cpu(checkpoint, monkeypatch):
    encoder = take_encoder(ITARFlowPipeline.from_pretrained(checkpoint))
    expected, move, places = encoder.encode(PROMPTS), encoder.to, []

    def to(device):
        places.append(device)
        if device != "cpu":
            raise torch.OutOfMemoryError("out of memory")
        return move(device)

    monkeypatch.setattr(encoder, "to", to)
    with pytest.warns(UserWarning, match=r"does not fit the memory of cuda; the prompts are read on the CPU"):
        found = encoded_on(encoder, PROMPTS, "cuda")
    assert torch.equal(found, expected)
    assert places == ["cuda", "cpu"]


def test_a_text_encoder_may_be_named(run, refused, checkpoint, tmp_path):
    bare, encoder = save_pipe(tmp_path / "bare", text=False), save_text_encoder(tmp_path / "t5")
    run("sample", checkpoint, *named(*PROMPTS))
    run("sample", bare, *named(*PROMPTS), "--text-encoder", encoder, "--output", "named.png")
    np.testing.assert_array_equal(pixels("samples.png"), pixels("named.png"))
    assert "no text encoder; name the one of its training" in refused("sample", bare, *named("a cat"))
    save_text_encoder(tmp_path / "wide", width=12)
    message = refused("sample", bare, *named("a cat"), "--text-encoder", tmp_path / "wide")
    assert "vectors of 12, but the flow takes vectors of 8" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one, such as --prompt 'a corgi on the beach'"),
        (("--class-labels", 1), "--class-labels were given, but this checkpoint takes prompts; give --prompt"),
        (("--class-labels", 1, "--prompt", "a"), "this checkpoint takes prompts; leave them out"),
        (("--prompt", "a", "--num-images", 0), "--num-images is 0"),
        (("--prompt", "a", "--prompts", "some.txt"), "--prompt and --prompts were given"),
        (("--prompts", "missing.txt"), "--prompts missing.txt is not there; expected a text file"),
        (("--prompts", "."), "is a folder; expected a text file"),
        (("--prompts", "empty.txt"), "is empty"),
        (("--prompts", "binary.txt"), "no text in UTF-8"),
        (("--prompt", "a \udcff cat"), "can't be written in UTF-8"),
        (("--prompt", "a", "--text-encoder", "./nowhere"), "can't be loaded"),
    ],
)
@pytest.mark.usefixtures("never_samples")
def test_what_can_not_be_sampled_is_refused(refused, checkpoint, words, message):
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    assert message in refused("sample", checkpoint, *words)


@pytest.mark.usefixtures("never_samples")
def test_a_checkpoint_without_prompts_refuses_them(refused, save):
    assert "makes no images from prompts; give --class-labels" in refused("sample", save(), "--prompt", "a cat")
    message = refused("sample", save(), "--prompt", "a cat", "--class-labels", 1)
    assert "makes no images from prompts; leave it out" in message
    assert "is for prompts" in refused("sample", save(), "--text-encoder", "google/flan-t5-xl")


def test_info_shows_what_reads_prompts_and_does_not_load_it(run, checkpoint, monkeypatch):
    monkeypatch.setattr(storage, "load_encoder", lambda *_: pytest.fail("has loaded the text encoder"))
    printed = run("info", checkpoint)
    assert "read by a T5EncoderModel of 2 layers, as 6 vectors of 8" in printed
    assert "context_tokens" in printed


def test_compare_refuses_a_checkpoint_of_prompts(refused, checkpoint):
    assert "`itarflow compare` does not take" in refused("compare", checkpoint, "--output", "out")


def test_bpd_takes_the_captions_of_the_data(run, refused, checkpoint, tmp_path):
    write_photos(tmp_path / "photos", ("cat", "dog"), count=2)
    encoder = save_text_encoder(tmp_path / "t5")
    words = ("--size", 4, "--captions", "a {}", "--text-encoder", encoder, "--context-tokens", TOKENS)
    run("prepare", tmp_path / "photos", "data", *words)
    measure = ("--noise", "gaussian", "--noise-levels", 0.5, "--num-workers", 0, "--split", "train")
    for output, options in (("own", ()), ("none", ("--unlabelled",))):
        run("bpd", checkpoint, "--data", "data", *measure, "--output", output, *options)
    reports = {name: json.loads(Path(name, "bpd.json").read_text()) for name in ("own", "none")}
    assert [one["settings"]["captions"] for one in reports.values()] == ["a {}", "none"]
    flow = ITARFlowPipeline.from_pretrained(checkpoint).flow
    data = load_data(DataConfig(path="data", held_out_images=0), image_size=4, in_channels=3, context=(TOKENS, WIDTH))
    images = to_pixels(torch.stack([example.image for example in data.train]))
    contexts = {
        "own": torch.stack([example.context for example in data.train]).float(),
        "none": data.null_context.float().expand(4, -1, -1),
    }
    for name, context in contexts.items():
        expected = likelihoods(flow, Posterior(images, None), None, [Noise("gaussian", 0.5)], context=context)
        with Path(name, "images.csv").open(newline="") as file:
            found = [float(next(value for key, value in row.items() if "nats" in key)) for row in csv.DictReader(file)]
        assert found == pytest.approx(expected.nll[:, 0].tolist(), abs=1e-5)
    printed = refused("bpd", checkpoint, "--data", tmp_path / "photos", *measure)
    assert "have no captions" in printed
    assert "by unlabelled" in printed
    assert "model.context-dim" not in printed
    # Nothing of captions is needed then: the empty one is that of the checkpoint's own encoder.
    run("bpd", checkpoint, "--data", tmp_path / "photos", *measure, "--output", "bare", "--unlabelled")
    assert Path("bare", "images.csv").read_text() == Path("none", "images.csv").read_text()


def test_bpd_says_by_which_captions_it_measures_and_refuses_those_of_another_encoder(
    run, refused, checkpoint, tmp_path, monkeypatch
):
    write_photos(tmp_path / "photos", ("cat", "dog"), count=2)
    words = ("--size", 4, "--captions", "a [red] {}", "--context-tokens", TOKENS)
    for name, seed in (("same", 0), ("other", 1)):
        encoder = save_text_encoder(tmp_path / "t5" / name, seed=seed)
        run("prepare", tmp_path / "photos", name, *words, "--text-encoder", encoder)
    measure = ("--noise", "gaussian", "--noise-levels", 0.5, "--num-workers", 0, "--split", "train")
    printed = run("bpd", checkpoint, "--data", "same", *measure, "--output", "out")
    assert "captions by 'a [red] {}'" in " ".join(printed.split())
    assert "no captions" in run("bpd", checkpoint, "--data", "same", *measure, "--unlabelled")
    assert "by another text encoder" in refused("bpd", checkpoint, "--data", "other", *measure)
    bare = save_pipe(tmp_path / "bare", text=False)
    assert "captions_encoder: [" in refused("bpd", bare, "--data", "other", *measure, "--output", "out")
    reads, read = [], PictureDecoder.__call__
    monkeypatch.setattr(PictureDecoder, "__call__", lambda *args: reads.append(args) or read(*args))
    run("bpd", bare, "--data", "other", *measure)
    assert len(reads) == 1 + 4  # one to try, and each image once


def test_evaluate_takes_prompts_in_turn(monkeypatch, capsys, tmp_path):
    run = terminal(TinyExtractor(), monkeypatch, capsys, tmp_path)
    save_pipe(tmp_path / "paint", in_channels=1)
    Path("captions.txt").write_text("\n".join([*PROMPTS, "", "a dog"]))
    run("evaluate", "--prompts", "captions.txt", checkpoint="paint")
    assert "prompts captions.txt, seed 0" in Path("paint/README.md").read_text()
    assert "read by a T5EncoderModel" in Path("paint/README.md").read_text()
    report = json.loads(Path("evaluation/evaluation.json").read_text())
    assert report["prompts"] == "captions.txt"
    assert set(report["ways"]) == {"raw", "self", "iterative"}
    made = {path.name: path.read_bytes() for path in Path("evaluation/raw").iterdir()}
    run("evaluate", "--prompts", "captions.txt", "--output", "again", "--batch-size", 4, checkpoint="paint")
    assert {path.name: path.read_bytes() for path in Path("again/raw").iterdir()} == made
    Path("captions.txt").write_text("a dog\na cat")  # others: those samples are not gone on with
    with pytest.raises(SystemExit):
        run("evaluate", "--prompts", "captions.txt", checkpoint="paint")
    assert "prompts" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_evaluations_without_prompts_are_refused(monkeypatch, capsys, tmp_path, command):
    run = terminal(TinyExtractor(), monkeypatch, capsys, tmp_path)
    save_pipe(tmp_path / "paint", in_channels=1)
    with pytest.raises(SystemExit):
        run(command, checkpoint="paint")
    assert "give some: --captions of the real images" in capsys.readouterr().err
    Path("captions.txt").write_text("a dog")
    with pytest.raises(SystemExit):
        run(command, "--prompts", "captions.txt")
    assert "makes no images from prompts" in capsys.readouterr().err
    save_pipe(tmp_path / "bare", text=False, in_channels=1)
    with pytest.raises(SystemExit):
        run(command, "--prompts", "captions.txt", checkpoint="bare")
    assert "no text encoder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(command, "--prompts", "captions.txt", "--labels", "none", checkpoint="paint")
    assert "--labels is none, but this checkpoint takes prompts" in capsys.readouterr().err


def test_the_encoder_is_beside_no_flow_in_evaluations(monkeypatch, capsys, tmp_path):
    """It is moved away after each batch, and told from others once."""
    run = terminal(TinyExtractor(), monkeypatch, capsys, tmp_path)
    save_pipe(tmp_path / "paint", in_channels=1)
    Path("captions.txt").write_text("\n".join(PROMPTS))
    order, inverse, to = [], TARFlow.inverse, TextEncoder.to
    digest = text_encoder.weights_digest

    def note(what, function, *args, **kwargs):
        order.append(what)
        return function(*args, **kwargs)

    monkeypatch.setattr(TARFlow, "inverse", lambda *args, **kwargs: note("flow", inverse, *args, **kwargs))
    monkeypatch.setattr(TextEncoder, "to", lambda self, device: note(f"to {device}", to, self, device))
    monkeypatch.setattr(text_encoder, "weights_digest", lambda values: note("digest", digest, values))
    run("sweep", "--prompts", "captions.txt", "--guidance-weights", 0, 1, checkpoint="paint")
    assert order.count("digest") == 1
    assert [what for what in order if what != "digest"] == ["to cpu", "to cpu", "flow"] * 4  # 2 batches of 2 settings


def test_evaluate_takes_the_captions_of_the_real_images(monkeypatch, capsys, tmp_path):
    run = terminal(TinyExtractor(), monkeypatch, capsys, tmp_path)
    save_pipe(tmp_path / "paint", in_channels=1)
    run("evaluate", "--captions", "a {} dog", checkpoint="paint")
    assert json.loads(Path("evaluation/evaluation.json").read_text())["captions"] == "a {} dog"
    texts = ["a dark dog"] * 8 + ["a light dog"] * 8  # of all images; samples are fewer
    Path("same.txt").write_text("\n".join(texts[index * 16 // 6] for index in range(6)))
    run("evaluate", "--prompts", "same.txt", "--output", "same", checkpoint="paint")
    made = {path.name: load_file(path)["images"] for path in Path("evaluation/raw").glob("*.safetensors")}
    assert made
    for name, images in made.items():
        assert torch.equal(load_file(Path("same/raw") / name)["images"], images)
    for words, message in (
        (("--captions", "text"), "'text'"),
        (("--captions", "a {}", "--prompts", "same.txt"), "expected one of them"),
    ):
        with pytest.raises(SystemExit):
            run("evaluate", *words, "--output", "other", checkpoint="paint")
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("evaluate", "--captions", "a {}", "--reference", "some.npz", checkpoint="paint", data=None)
    assert "give --prompts FILE" in capsys.readouterr().err


def test_sweep_takes_prompts(monkeypatch, capsys, tmp_path):
    run = terminal(TinyExtractor(), monkeypatch, capsys, tmp_path)
    save_pipe(tmp_path / "paint", in_channels=1)
    Path("captions.txt").write_text("\n".join(PROMPTS))
    run("sweep", "--prompts", "captions.txt", "--guidance-weights", 0, 1, checkpoint="paint")
    assert Path("sweep").is_dir()


@pytest.mark.parametrize("write", [True, False])
def test_profile_finds_a_plan_for_prompts(run, refused, checkpoint, write):
    card = (checkpoint / "README.md").read_text()
    words = ("--batch-sizes", 1, "--num-images", 2, "--repeats", 1, "--windows", 2)
    words += () if write else ("--no-write",)
    run("profile", checkpoint, *words, *named(*PROMPTS))
    pipe = ITARFlowPipeline.from_pretrained(checkpoint)
    assert len(pipe.inverse_plans) == int(write)
    assert pipe.text_encoder is not None
    changed = (checkpoint / "README.md").read_text()
    assert (changed != card) == write
    assert "read by a T5EncoderModel" in changed
    assert "has no prompts" in refused("profile", checkpoint, *words, *named("a cat"), "--data", "digits")
    assert "give one, such as --prompt" in refused("profile", checkpoint, *words)
