"""The command `itarflow`: what it writes, prints and refuses."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import TRAINING, Run, Save
from PIL import Image

from itarflow import DenoiseScheduler, Guidance, ITARFlowPipeline, TARFlow
from itarflow.commands import cli
from itarflow.commands import profile as command
from itarflow.commands.console import plain_output
from itarflow.commands.convert import Convert
from itarflow.inverse import sequential

GOLDEN = Path(__file__).parents[1] / "golden"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# -- sample -----------------------------------------------------------------------------------------------------


def test_sample_writes_a_grid_with_every_class_in_turn(run, save):
    assert "3 images in samples.png" in run("sample", save(), "--no-captions")
    grid = Image.open("samples.png")
    assert (grid.mode, grid.size) == ("RGB", (3 * 48 + 2 * 2, 48))
    assert pixels("samples.png").std() > 1


def test_sample_writes_a_folder_with_a_file_for_each_image(run, save):
    assert "4 images in new/folder" in run("sample", save(), "--output", "new/folder", "--num-images", 4)
    files = sorted(Path("new/folder").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png", "000003.png"]
    assert {Image.open(file).size for file in files} == {(4, 4)}


def test_files_and_pipeline_agree(run, save):
    folder = save()
    run("sample", folder, "--output", "images", "--class-labels", "dog", 2, "--seed", 5)
    pipe = ITARFlowPipeline.from_pretrained(folder)
    expected = pipe(["dog", "bird"], generator=torch.Generator().manual_seed(5)).images
    for index, image in enumerate(expected):
        np.testing.assert_array_equal(pixels(Path(f"images/{index:06d}.png")), np.asarray(image))


def test_labels_are_numbers_or_names(run, save):
    folder = save()
    run("sample", folder, "--class-labels", "dog", "cat", "--output", "names.png")
    run("sample", folder, "--class-labels", 1, 0, "--output", "numbers.png")
    run("sample", folder, "--class-labels", 0, 1, "--output", "others.png")
    np.testing.assert_array_equal(pixels("names.png"), pixels("numbers.png"))
    assert not np.array_equal(pixels("names.png"), pixels("others.png"))


def test_labels_are_repeated_in_turn(run, save):
    folder = save()
    run("sample", folder, "--class-labels", 1, 0, "--num-images", 3, "--output", "turn.png")
    run("sample", folder, "--class-labels", 1, 0, 1, "--output", "written.png")
    np.testing.assert_array_equal(pixels("turn.png"), pixels("written.png"))


def test_images_may_be_denoised_in_lower_precision(run, save):
    folder = save()
    run("sample", folder, "--output", "exact.png")
    for options in ((), ("--denoiser", folder)):
        run("sample", folder, "--denoise-dtype", "bf16", "--output", "near.png", *options)
        difference = pixels("near.png").astype(int) - pixels("exact.png")
        assert 0 < np.abs(difference).max() < 8  # these weights are random, and not small


def test_the_seed_decides(run, save):
    folder = save()
    for name, seed in (("a.png", 3), ("b.png", 3), ("c.png", 4)):
        run("sample", folder, "--seed", seed, "--output", name)
    np.testing.assert_array_equal(pixels("a.png"), pixels("b.png"))
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


@pytest.mark.parametrize(
    "words",
    [
        ("--guidance-weight", "0"),
        ("--num-denoise-steps", "1"),
        ("--method", "heun", "--num-denoise-steps", "3"),
        ("--method", "predictor-corrector", "--spacing", "quadratic", "--num-denoise-steps", "4"),
        ("--method", "skip"),
    ],
    ids=" ".join,
)
def test_options_replace_the_checkpoints_defaults(run, save, words):
    folder = save()
    run("sample", folder, "--output", "default.png")
    run("sample", folder, "--output", "changed.png", *words)
    assert not np.array_equal(pixels("default.png"), pixels("changed.png"))


def test_every_part_of_guidance_is_an_option(run, save):
    folder = save()
    words = ("--guidance-rule", "gaussian", "--guidance-schedule", "constant", "--guidance-blocks", 0, 1)
    run("sample", folder, "--output", "ours", *words, "--guidance-temperature", 0.7, "--guided", "scale", "shift")
    guidance = Guidance(weight=1.5, rule="gaussian", schedule="constant", blocks=(0, 1), temperature=0.7)
    pipe = ITARFlowPipeline.from_pretrained(folder)
    expected = pipe([0, 1, 2], guidance=guidance, generator=torch.Generator().manual_seed(0)).images
    for index, image in enumerate(expected):
        np.testing.assert_array_equal(pixels(Path(f"ours/{index:06d}.png")), np.asarray(image))


def test_without_classes_sixteen_images_are_made(run, save):
    assert "16 images in" in run("sample", save({"num_classes": 0}))
    assert Image.open("samples.png").size == (4 * 48 + 3 * 2, 4 * 48 + 3 * 2)


def test_each_label_has_its_column(run, save):
    run("sample", save(), "--class-labels", "bird", "cat", "--num-images", 5, "--no-captions")
    assert Image.open("samples.png").size == (2 * 48 + 2, 3 * 48 + 2 * 2)


def test_captions_name_the_classes_and_texts_tell_where_a_picture_is_from(run, save):
    folder = save()
    run("sample", folder, "--class-labels", "bird", "cat", "--num-images", 4)
    run("sample", folder, "--class-labels", "bird", "cat", "--num-images", 4, "--no-captions", "--output", "bare.png")
    run("sample", folder, "--class-labels", "bird", "bird", "cat", "--output", "each.png", "--seed", 3)
    grid, each = Image.open("samples.png"), Image.open("each.png")
    assert grid.size == (2 * 96 + 2, 21 + 2 * 96 + 2)  # a line of names, then the images
    assert (pixels("samples.png")[:21] < 255).any()
    assert np.array_equal(pixels("samples.png")[21:117:2, :96:2], pixels("bare.png")[:48, :48])
    assert each.size == (2 * 96 + 2, 2 * (21 + 96))
    assert each.text == {"checkpoint": str(folder.name), "seed": "3", "labels": "bird, bird, cat"}
    run("sample", folder, "--class-labels", "dog", "-1", "--output", "images", "--seed", 7)
    one = Image.open("images/000001.png")
    assert one.text == {"checkpoint": str(folder.name), "seed": "7", "number": "1", "label": "none"}


def test_a_folder_with_older_pictures_is_refused(run, refused, save):
    folder = save()
    run("sample", folder, "--num-images", 4, "--output", "images")
    before = pixels("images/000000.png")
    message = refused("sample", folder, "--num-images", 2, "--output", "images", "--seed", 1)
    assert "--output images holds other files: 000000.png, 000001.png" in message
    assert np.array_equal(pixels("images/000000.png"), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grid.webp", "can't be written as WEBP, with 98 x 17498 pixels"),
        ("grid.ico", "as ICO in place of"),
        ("grid.h5", "can't be written as HDF5"),
    ],
)
def test_a_grid_that_its_format_can_not_hold_is_refused_before_sampling(refused, save, monkeypatch, name, message):
    monkeypatch.setattr(ITARFlowPipeline, "__call__", lambda *_, **__: pytest.fail("has sampled"))
    words = ("--class-labels", "dog", "cat", "--num-images", 700, "--no-captions", "--output", name)
    assert message in refused("sample", save(), *words)
    assert not Path(name).exists()


def test_a_picture_that_can_not_be_written_is_no_picture(refused, save, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in refused("sample", save())
    assert not Path("samples.png").exists()


def test_a_number_is_the_same_label_as_in_python_also_where_classes_are_called_by_numbers(run, save):
    folder = save(class_names=["2", "10", "0"])
    printed = run("sample", folder, "--class-labels", 2, "--output", "number")
    assert "label 2 is the class '0'; the class that is called '2' has label 0" in printed
    pipe = ITARFlowPipeline.from_pretrained(folder)
    expected = pipe([2], generator=torch.Generator().manual_seed(0)).images[0]
    np.testing.assert_array_equal(pixels(Path("number/000000.png")), np.asarray(expected))


def test_images_do_not_depend_on_the_batch_size(run, save):
    folder = save()
    run("sample", folder, "--output", "all.png")
    run("sample", folder, "--output", "single.png", "--batch-size", 1)
    assert np.abs(pixels("all.png").astype(int) - pixels("single.png")).max() <= 1  # rounding


def test_another_flow_may_denoise(run, save, tmp_path):
    save().rename(tmp_path / "dogs")
    other = save({"seed": 1, "num_layers": (1, 1)})
    run("sample", tmp_path / "dogs", "--output", "own.png")
    run("sample", tmp_path / "dogs", "--output", "other.png", "--denoiser", other, "--num-denoise-steps", 1)
    run("sample", tmp_path / "dogs", "--output", "again.png", "--denoiser", tmp_path / "dogs")
    assert not np.array_equal(pixels("own.png"), pixels("other.png"))
    np.testing.assert_array_equal(pixels("own.png"), pixels("again.png"))


def test_a_denoiser_for_other_images_is_refused(refused, save, tmp_path):
    save().rename(tmp_path / "dogs")
    assert "flow for (3, 8, 8)" in refused("sample", tmp_path / "dogs", "--denoiser", save({"image_size": 8}))
    assert not Path("samples.png").exists()


# -- info -------------------------------------------------------------------------------------------------------


def test_info_tells_what_a_checkpoint_is(run, save):
    folder = save()
    printed = run("info", folder)
    parameters = sum(p.numel() for p in ITARFlowPipeline.from_pretrained(folder).flow.parameters())
    for words in (
        "iTARFlow, conditioned on the noise level",
        f"{parameters:,}",
        "0.02 to 0.6",
        "4 tokens of 12 values",
        "num_layers",
        "t_max",
        "1.5",
        "bird",
        "someone/pets",
        "123",
        "-1.25",
        "epochs=7",
    ):
        assert words in printed


def test_info_says_what_is_not_known(run, save):
    printed = run("info", save({"noise_conditioned": False, "noise_range": None}, training=None))
    assert "TARFlow, one noise level" in printed
    assert re.search(r"trained on noise levels\s*│\s*not recorded", printed)
    assert "Training" not in printed


def test_info_says_how_many_labels_it_leaves_out(run, save):
    printed = run("info", save({"num_classes": 21}, class_names=[f"class {index}" for index in range(21)]))
    assert "21 in all" in printed
    assert "class 19" in printed
    assert "class 20" not in printed


def test_info_leaves_out_labels_that_are_their_own_numbers(run, save):
    assert "Labels" not in run("info", save(class_names=["0", "1", "2"]))


def test_info_rounds_figures(run, save):
    training = TRAINING | {"metrics": {"held-out bits/dim": 3.123456789012345}}
    printed = run("info", save(training=training))
    assert "3.12346" in printed
    assert "3.123456789" not in printed


def test_brackets_in_names_are_printed(run, save):
    assert "[bold]" in run("info", save(class_names=["[bold]", "[/red]", "[x]"]))


# -- convert ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["itarflow_cond", "tarflow_cond"])
def test_converting_there_and_back_gives_the_same_bits(run, name):
    source = GOLDEN / name / "weights.pth"
    assert "pipeline with" in run("convert", source, "ours", "--t-max", 0.3)
    assert "official checkpoint in back.pth" in run("convert", "ours", "back.pth", "--to-official")
    before, after = torch.load(source), torch.load("back.pth")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("name", "size"), [("itarflow_cond", 12), ("tarflow_cond", 8)])
def test_a_converted_checkpoint_samples(run, name, size):
    run("convert", GOLDEN / name / "weights.pth", "ours", "--t-max", 0.05, "--num-denoise-steps", 1)
    run("sample", "ours", "--output", "images", "--class-labels", 1, 5)
    assert [Image.open(path).size for path in sorted(Path("images").iterdir())] == [(size, size)] * 2


@pytest.mark.parametrize(("name", "rule", "steps"), [("itarflow_cond", "scale", 10), ("tarflow_cond", "log_scale", 1)])
def test_a_converted_checkpoint_has_the_sampling_of_its_official_code(run, name, rule, steps):
    run("convert", GOLDEN / name / "weights.pth", "ours", "--t-max", 0.2, "--t-min", 0.02, "--guidance-weight", 2.5)
    pipe = ITARFlowPipeline.from_pretrained("ours")
    guidance, scheduler = pipe.default_guidance, pipe.scheduler.config
    assert (guidance.weight, guidance.rule, guidance.schedule) == (2.5, rule, "linear")
    assert (scheduler.t_max, scheduler.t_min, scheduler.num_denoise_steps) == (0.2, 0.02, steps)
    assert tuple(pipe.flow.config.noise_range) == (0.02, 0.2)


def test_what_the_official_file_does_not_tell_is_an_option(run):
    source = GOLDEN / "itarflow_uncond" / "weights.pth"
    run("convert", source, "ours", "--in-channels", 1, "--input-scale", 0.5, "--t-max", 0.3)
    config = ITARFlowPipeline.from_pretrained("ours").flow.config
    assert (config.in_channels, config.input_scale) == (1, 0.5)


def test_an_assumed_noise_level_is_said_aloud(run):
    assert "0.3 is assumed" in run("convert", GOLDEN / "itarflow_cond" / "weights.pth", "ours")
    assert "assumed" not in run("convert", GOLDEN / "itarflow_cond" / "weights.pth", "again", "--t-max", 0.2)


@pytest.mark.parametrize(("iterative", "t_max"), [(True, 0.5), (False, 0.15)])
def test_the_assumed_noise_level_is_that_of_the_models_own_paper(iterative, t_max, make_flow):
    flow = make_flow(fresh=True, image_size=128, patch_size=32, in_channels=3, noise_conditioned=iterative)
    pipe = Convert(source="model.pth", target=Path("ours"))._pipeline(flow)
    assert pipe.scheduler.config.t_max == t_max


def test_what_exists_is_only_overwritten_on_request(run, refused, save):
    source = GOLDEN / "itarflow_cond" / "weights.pth"
    run("convert", source, "ours", "--t-max", 0.3)
    before = Path("ours/model_index.json").read_text()
    assert "ours exists; add --overwrite" in refused("convert", source, "ours", "--t-max", 0.2)
    assert Path("ours/model_index.json").read_text() == before
    run("convert", source, "ours", "--t-max", 0.2, "--overwrite")
    assert ITARFlowPipeline.from_pretrained("ours").scheduler.config.t_max == 0.2
    run("convert", "ours", "back.pth", "--to-official")
    assert "back.pth exists; add --overwrite" in refused("convert", "ours", "back.pth", "--to-official")
    run("convert", "ours", "back.pth", "--to-official", "--overwrite")


def test_a_folder_with_other_things_is_never_replaced(refused):
    Path("photos").mkdir()
    Path("photos/cat.png").write_text("")
    source = GOLDEN / "itarflow_cond" / "weights.pth"
    for words in ((), ("--overwrite",)):
        assert "photos is a folder with other things in it (cat.png)" in refused("convert", source, "photos", *words)
    assert Path("photos/cat.png").exists()


def test_notes_in_a_pipelines_folder_are_not_overwritten(run, refused):
    source = GOLDEN / "itarflow_cond" / "weights.pth"
    run("convert", source, "ours", "--t-max", 0.3)
    Path("ours/notes.md").write_text("mine")
    assert "other things in it (notes.md)" in refused("convert", source, "ours", "--t-max", 0.3, "--overwrite")
    Path("ours/notes.md").rename("ours/flow/notes.txt")
    assert "other things in it (flow/notes.txt)" in refused("convert", source, "ours", "--t-max", 0.3, "--overwrite")
    assert Path("ours/flow/notes.txt").exists()


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--class-labels", "fish"), "class label 'fish' is not known; names of this checkpoint: cat, dog, bird"),
        (("--class-labels", "3"), "class label 3 is out of range; expected 0 .. 2"),
        (("--num-images", "0"), "--num-images is 0; expected a number >= 1"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--seed", str(2**64)), "--seed is 18446744073709551616; expected a number >= 0, and below 2^63"),
        (("--num-images", str(10**30)), "expected a number >= 1, and at most 1,000,000"),
        (
            ("--class-labels", "-2"),
            "class label -2 is out of range; expected 0 .. 2, or -1 for images without a label",
        ),
        (("--num-denoise-steps", "0"), "num_denoise_steps is 0"),
        (("--guidance-weight", "-1"), "expected a finite number >= 0"),
        (("--output", "images.doc"), "images.doc has an unknown image format; use .png"),
        (("--output", "images.psd"), "images.psd has an unknown image format; use .png"),
        (("--device", "abacus"), "--device abacus can't be used"),
        (("--device", "meta"), "--device meta can't be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_sample_refuses_with_a_message(refused, save, words, message):
    assert message in refused("sample", save(), *words)


# itarflow profile


PROFILE = ("--num-images", 4, "--batch-sizes", 2, "--windows", 2, 4, "--repeats", 1, "--class-labels", "cat")


@pytest.fixture
def save_long(save: Save) -> Save:
    """save_long(): as save(), but with blocks of 16 tokens."""
    return lambda **changes: save({"patch_size": 1}, **changes)


def test_profile_writes_a_plan_by_which_the_checkpoint_samples(run, save_long, monkeypatch):
    folder, asked = save_long(), []
    printed = run("profile", folder, *PROFILE, "--output", "out")
    assert re.search(r"The inverse of 2 images at a time, noise side first", printed)
    assert re.search(
        r"2 at a time: ([\d.]+ ms one token after another, [\d.]+ ms by the plan|nothing is faster)", printed
    )
    stored = json.loads((folder / "model_index.json").read_text())["plans"]
    assert [(plan["device"], plan["batch_size"], plan["num_tokens"]) for plan in stored] == [("cpu", 2, [16, 16])]
    report = json.loads(Path("out/profile.json").read_text())
    assert report["batch_sizes"]["2"]["plan"] == stored[0]
    assert [len(rows) for rows in report["batch_sizes"]["2"]["blocks"]] == [5, 5]
    assert len(report["metrics"]) == 2
    assert pixels(Path("out/profile.png")).std() > 0
    row = r"inverse on cpu in float32, torch [\d.]+, up to 2 at a time.*(tokens at once in the blocks|exact: nothing)"
    assert re.search(row, run("info", folder))
    assert re.search(row, (folder / "README.md").read_text())

    inverse = TARFlow.inverse
    monkeypatch.setattr(TARFlow, "inverse", lambda *a, **k: asked.append(k["solver"]) or inverse(*a, **k))
    for name, words in (("planned.png", ()), ("exact.png", ("--exact",))):  # two at a time, as the plan
        run("sample", folder, "--num-images", 2, "--output", name, *words)
    (plan,) = ITARFlowPipeline.from_pretrained(folder).inverse_plans
    assert asked == [plan.solvers_of(ITARFlowPipeline.from_pretrained(folder).flow), sequential]
    difference = np.abs(pixels(Path("planned.png")).astype(int) - pixels(Path("exact.png")))
    assert difference.max() <= 2  # one grey level, and rounding


@pytest.mark.slow
def test_profile_keeps_plans_for_other_batch_sizes_and_nothing_without_write(run, save_long):
    folder = save_long()
    run("profile", folder, *PROFILE)
    run("profile", folder, "--num-images", 4, *PROFILE[4:], "--batch-sizes", 1)
    before = (folder / "model_index.json").read_bytes()
    assert [plan["batch_size"] for plan in json.loads(before)["plans"]] == [1, 2]
    run("profile", folder, *PROFILE, "--no-write")
    assert (folder / "model_index.json").read_bytes() == before
    assert ITARFlowPipeline.from_pretrained(folder).config.class_names == ["cat", "dog", "bird"]


@pytest.mark.slow
def test_profile_measures_the_metrics_on_real_images(run, save_long):
    shapes = run("profile", save_long(), *PROFILE, "--data", "digits", "--no-write") and Path("profile/profile.json")
    on_digits = json.loads(shapes.read_text())["metrics"]
    run("profile", save_long(), *PROFILE, "--no-write", "--output", "generated")
    on_samples = json.loads(Path("generated/profile.json").read_text())["metrics"]
    assert on_digits != on_samples


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch-sizes", 0), "--batch-sizes is [0]"),
        (("--largest-difference", -1), "largest_difference is -1.0"),
        (("--windows", 1), "windows are [1]"),
        (("--class-labels", "mouse"), "class label 'mouse' is not known"),
    ],
)
def test_profiles_that_make_no_sense_are_refused(refused, save_long, words, message):
    assert message in refused("profile", save_long(), *words)


def test_nothing_is_computed_before_options_are_refused(refused, save_long, monkeypatch):
    monkeypatch.setattr(TARFlow, "inverse", None)
    folder = save_long()
    for words in (("--repeats", 0), ("--guidance-weight", -1), ("--class-labels", "mouse")):
        assert "expected" in refused("profile", folder, *words) or "mouse" in words


@pytest.mark.slow
def test_a_model_card_that_somebody_has_written_stays(run, save_long):
    folder = save_long()
    (folder / "README.md").write_text("# Our pets\n")
    run("profile", folder, *PROFILE)
    assert (folder / "README.md").read_text() == "# Our pets\n"


@pytest.mark.slow
def test_profile_denoises_as_the_checkpoint_does(run, save_long, monkeypatch):
    folder, asked = save_long(), []
    scheduler = DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2, spacing="quadratic", clip=True)
    scheduler.save_pretrained(folder / "scheduler")
    denoise = command.denoise
    monkeypatch.setattr(command, "denoise", lambda *a, **k: asked.append(a[3].config) or denoise(*a, **k))
    run("profile", folder, *PROFILE, "--no-write")
    assert {(c.spacing, c.clip, c.num_denoise_steps) for c in asked} == {("quadratic", True, 2)}


def test_profile_wants_a_folder(refused):
    assert "hf download" in refused("profile", "someone/pets")


def test_a_checkpoint_with_a_plan_for_another_flow_is_refused(refused, save_long):
    plan = {"solvers": [{"window": 1}], "num_tokens": [16], "device": "cpu", "batch_size": 1}
    folder = save_long()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"plans": [plan]}))
    assert "the inverse plan is for blocks of (16,) tokens" in refused("sample", folder)


def test_a_folder_that_is_no_pipeline_is_refused(refused, tmp_path):
    assert "model_index.json is missing" in refused("info", tmp_path)


def test_an_official_file_is_not_a_pipeline(refused):
    assert "weights.pth is a file; expected the folder" in refused("info", GOLDEN / "itarflow_cond" / "weights.pth")


def test_a_checkpoint_that_does_not_exist_is_refused(refused):
    message = refused("sample", "runs/nothing/pipeline")
    assert "'runs/nothing/pipeline' is neither a folder here nor a Hub id (NAME/MODEL)" in message


def test_brackets_in_a_message_are_printed(refused):
    assert "'./[bold]/model[/]'" in refused("info", "./[bold]/model[/]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing.pth", "ours"), "nothing.pth: there is no such file"),
        ((GOLDEN / "itarflow_uncond" / "weights.pth", "ours", "--in-channels", "2"), "in_channels=2"),
        ((GOLDEN / "itarflow_cond" / "weights.pth", "ours", "--t-max", "0.1", "--t-min", "0.2"), "0.2"),
        (("nothing/at/all", "back.pth", "--to-official"), "neither a folder here nor a Hub id"),
        ((GOLDEN, "back.pth"), "is a folder; expected an official .pth file"),
        ((GOLDEN / "itarflow_uncond" / "weights.pth", "ours", "--in-channels", "5"), "(--in-channels)"),
    ],
)
def test_convert_refuses_with_a_message_and_writes_nothing(refused, words, message):
    assert message in refused("convert", *words)
    assert not Path("ours").exists()
    assert not Path("back.pth").exists()


def test_a_flow_that_the_official_code_has_no_class_for_is_refused(refused, save):
    message = refused("convert", save(), "back.pth", "--to-official")
    assert "head_dim=4 can't be exported" in message


def test_an_unwritable_output_is_refused_before_sampling(refused, save, monkeypatch):
    monkeypatch.setattr(ITARFlowPipeline, "__call__", lambda *args, **kwargs: pytest.fail("images were made"))
    Path("occupied").write_text("")
    assert "occupied" in refused("sample", save(), "--output", "occupied/images")
    Path("folder.png").mkdir()
    assert "folder.png is a folder" in refused("sample", save(), "--output", "folder.png")
    assert "can be made in /proc" in refused("sample", save(), "--output", "/proc/new/images.png")


# -- help -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "explanations"),
    [
        ((), ["train", "sample", "Generate images with a checkpoint", "itarflow train digits"]),
        (("train",), ["RECIPE", "accelerate launch recipes/digits.py", "--dry-run", "--resume"]),
        (("sample",), ["--class-labels", "by number as in Python", "itarflow sample runs/digits/pipeline", "0 = off"]),
        (("info",), ["A folder with a pipeline, or a Hugging Face Hub id"]),
        (("convert",), ["An official .pth file", "--to-official", "--t-max", "TARFlow's noise_std"]),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_help_explains(words, explanations, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*words, "--help"])
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for explanation in explanations:
        assert explanation in printed


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_of_the_table_is_there(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    assert f"itarflow {name}" in capsys.readouterr().out


def test_a_page_of_help_imports_neither_torch_nor_diffusers():
    script = (
        "import sys\nfrom itarflow.commands.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(len(sys.modules), *{'torch', 'diffusers', 'accelerate', 'numpy', 'tyro'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    count, *heavy = done.stdout.splitlines()[-1].split()
    assert not heavy
    assert int(count) < 500  # of some 3,900 when all commands are imported


@pytest.mark.slow
def test_the_package_imports_what_is_asked_for_and_knows_its_names():
    script = (
        "import sys, itarflow\nassert 'torch' not in sys.modules\nassert set(itarflow.__all__) <= set(dir(itarflow))\n"
        "names = [getattr(itarflow, name) for name in itarflow.__all__]\nassert 'torch' in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith(('itarflow.training', 'itarflow.evaluation'))]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_command_that_there_is_not_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sampel"])
    assert exit_.value.code == 2
    assert "did you mean sample?" in capsys.readouterr().err


def test_train_runs_a_recipe_by_file_or_name_and_refuses_others(run, refused, tmp_path):
    recipes = Path.cwd() / "recipes"
    recipes.mkdir()
    (recipes / "tiny.py").write_text("import sys\nif __name__ == '__main__':\n    print(sys.argv)\n")
    assert "recipes/tiny.py', '--dry-run'" in run("train", recipes / "tiny.py", "--dry-run")
    assert run("train", "tiny", "--resume").strip() == "['recipes/tiny.py', '--resume']"
    assert "'digits'" in (message := refused("train", "digits"))
    assert "tiny" in message


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sample", "somewhere", "--classes", "3"])
    assert exit_.value.code == 2
    assert "--classes" in capsys.readouterr().err


# -- prepare ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prepare_writes_a_folder_and_says_how_to_train(run: Run) -> None:
    words = ("prepare", "digits", "small digits", "--size", 8, "--in-channels", 1, "--num-workers", 0)
    printed = run(*words)
    assert Path("small digits/train-00000-of-00001.parquet").exists()
    for part in ("images in train", "1,797", "broken, left out │ none", "MB", "images/s"):
        assert part in printed
    assert (
        "--data.path 'small digits' --data.split train --data.held-out-split None "
        "--model.image-size 8 --model.in-channels 1 --model.num-classes 10 --model.patch-size 2"
    ) in printed
    assert "nothing was left to do" in run(*words)


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 9, 17, 40])
def test_the_command_that_prepare_ends_with_runs_as_it_stands(
    run: Run, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures" / "a"
    folder.mkdir(parents=True)
    for index in range(20):
        Image.new("RGB", (size, size), (index, 0, 0)).save(folder / f"{index}.png")
    printed = run("prepare", folder.parent, tmp_path / "out", "--size", size, "--num-workers", 0)
    (words,) = re.findall(r"itarflow train (.*)", printed)
    recipe, *options = shlex.split(words)
    file = str(Path(__file__).parents[2] / "recipes" / f"{recipe}.py")
    monkeypatch.setattr("sys.argv", [file, *options, "--dry-run"])
    runpy.run_path(file, run_name="__main__")


def test_prepare_refuses(refused: Run) -> None:
    assert "size is 0; expected 1 or more" in refused("prepare", "digits", "out", "--size", 0)
    assert "no split 'test'" in refused("prepare", "digits", "out", "--size", 8, "--split", "train", "test")
    Path("file").touch()
    assert "file can't be written" in refused("prepare", "digits", "file", "--size", 8)


def test_prepare_that_is_stopped_says_that_it_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("itarflow.commands.prepare.prepare", stop)
    with pytest.raises(SystemExit) as exit_:
        run("prepare", "digits", "out", "--size", 8)
    assert exit_.value.code == 130
    assert "The same command goes on with out later." in capsys.readouterr().err


def test_plot_draws_runs_and_refuses_what_is_none(run, refused, tmp_path):
    folder = tmp_path / "some-run"
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert "curves in new/curves.png" in run("plot", folder, "--output", "new/curves.png")
    assert pixels(Path("new/curves.png")).std() > 1
    assert "holds no run" in refused("plot", tmp_path / "nothing")
    assert "unknown image format" in refused("plot", folder, "--output", "curves.doc")


def test_warnings_are_told_without_their_place_in_the_code():
    usual = warnings.formatwarning
    with plain_output():
        assert warnings.formatwarning("a prompt is cut", UserWarning, "some.py", 3) == "Warning: a prompt is cut\n"
        assert "some.py:3" in warnings.formatwarning("old", DeprecationWarning, "some.py", 3)
    assert warnings.formatwarning is usual
