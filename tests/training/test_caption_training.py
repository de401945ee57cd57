"""Training on captions: what reaches the flow, what a run leaves, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_training import losses, shared_weights, tiny_recipe

from itarflow import ITARFlowPipeline
from itarflow.data.context import read_null_context
from itarflow.data.load import load_data
from itarflow.data.prepare.crop import PrepareConfig, prepare
from itarflow.flow.block import FlowOutput
from itarflow.runtime.errors import DataError, RunError
from itarflow.text_encoder import TextEncoder
from itarflow.training import objective
from itarflow.training.captions import open_text_encoder, prompts_of
from itarflow.training.held_out import evaluate_held_out
from itarflow.training.recipe import TextConfig, open_data
from itarflow.training.train import train

pytest.importorskip("transformers")
from tiny_text import TOKENS, WIDTH, save_text_encoder

NAMES = ("one", "seven", "two")  # in the order of folders
STEPS = 4


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_text_encoder(tmp_path_factory.mktemp("encoder"))


def pictures(folder):
    """60 grey images of three classes."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            values = np.clip(rng.normal(60 + 60 * label, 20, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(values).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("captioned")
    prepare(
        PrepareConfig(
            source=str(pictures(folder / "source")), out=folder / "prepared", size=8, in_channels=1, num_workers=0,
            captions="a photo of {}", text_encoder=str(encoder), context_tokens=TOKENS,
        )
    )  # fmt: skip
    return folder / "prepared"


def text_recipe(path, encoder=None, **changes):
    """The tiny recipe with captions for labels, and STARFlow's blocks."""
    blocks = {"rotary_side": 2, "start_token": True, "final_norm": True, "soft_clip": 4.0, "softplus_scale": True}
    blocks |= {"first_block_reversed": True, "num_classes": 0, "context_dim": WIDTH, "context_tokens": TOKENS}
    data = {"path": str(path), "split": "train", "batch_size": 12, "held_out_images": 6, "save_every": 2}
    data |= {"evaluate_every_epochs": 100, "sample_every_epochs": 100, "num_images": 5, "batch_size": 12}
    recipe = tiny_recipe(**blocks | data | changes)
    return dataclasses.replace(recipe, text=TextConfig(encoder=None if encoder is None else str(encoder)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, captioned, encoder):
    run = tmp_path_factory.mktemp("text") / "run"
    return run, train(text_recipe(captioned, encoder), run, max_steps=STEPS)


def test_a_run_leaves_a_pipeline_that_takes_prompts(finished):
    run, summary = finished
    assert len(losses(run)) == STEPS
    assert np.isfinite(list(summary.held_out.nll.values())).all()
    assert Image.open(summary.grid).width > 100
    assert summary.prompt == "a photo of one"
    pipe = ITARFlowPipeline.from_pretrained(run / "pipeline")
    assert len(pipe(prompt=["a photo of seven", "a photo of one"]).images) == 2
    told = pipe.config.training
    assert (told["captions"], told["with_text_encoder"]) == ("a photo of {}", True)
    assert "/" not in told["captions_encoder"]
    assert "/" not in told["recipe"]["text"]["encoder"]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(finished, captioned, encoder, tmp_path):
    recipe = text_recipe(captioned, encoder, in_memory=False, num_workers=0)
    train(recipe, tmp_path / "run", max_steps=3)
    train(recipe, tmp_path / "run", start="resume", max_steps=STEPS)
    assert losses(tmp_path / "run") == losses(finished[0])
    resumed, expected = shared_weights(tmp_path / "run"), shared_weights(finished[0])
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_accumulation_gives_the_same_losses(finished, captioned, encoder, tmp_path):
    train(text_recipe(captioned, encoder, accumulation=3), tmp_path / "run", max_steps=STEPS)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished[0]), abs=1e-5)


class Watching(torch.nn.Module):
    """A flow that maps images to themselves, and keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, images, labels=None, noise_level=None, context=None):
        self.given.append((labels, context))
        return FlowOutput(images.flatten(2), images.new_zeros(len(images)))


def test_captions_are_dropped_by_the_draws_that_drop_labels(captioned):
    recipe = text_recipe(captioned, label_drop=0.5)
    draws = objective.draw(recipe, 0, torch.device("cpu"))
    labelled = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, num_classes=3, context_dim=4, context_tokens=1)
    )
    for one, other in zip(draws, objective.draw(labelled, 0, torch.device("cpu")), strict=True):
        assert one is other is None or torch.equal(one, other)
    assert 0 < draws.drop.sum() < len(draws.drop)
    context, empty, flow = torch.randn(12, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH), Watching()
    images = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)
    objective.training_losses(flow, recipe, images, torch.zeros(12).long(), draws, context, empty)
    labels, given = flow.given[0]
    assert labels is None
    assert torch.equal(given[draws.drop], empty.expand(int(draws.drop.sum()), -1, -1))
    assert torch.equal(given[~draws.drop], context[~draws.drop])


def test_held_out_images_are_judged_by_their_captions(captioned):
    recipe = text_recipe(captioned)
    data, flow = open_data(recipe, None), recipe.model.build(recipe.noise_range)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    found = evaluate_held_out(flow, data.held_out, recipe, Accelerator(cpu=True))
    swapped = flow.log_prob

    def with_the_empty_one(images, labels, level, context):
        assert context.shape == (6, TOKENS, WIDTH)
        return swapped(images, labels, level, context=data.null_context[None].float().expand_as(context))

    flow.log_prob = with_the_empty_one
    assert evaluate_held_out(flow, data.held_out, recipe, Accelerator(cpu=True)).nll != found.nll


def test_grids_show_held_out_captions_or_those_of_training_images(captioned):
    for held_out, first in ((6, "held_out"), (0, "train")):
        data = open_data(text_recipe(captioned, held_out_images=held_out), None)
        asked = prompts_of(data, [1, 1 + len(getattr(data, first))])
        context = getattr(data, first)[1].context
        assert torch.equal(asked["prompt_embeds"], context.float().expand(2, -1, -1))
        assert torch.equal(asked["negative_prompt_embeds"], data.null_context.float().expand(2, -1, -1))


def test_a_text_encoder_that_is_not_at_hand_is_said_and_added_later(captioned, encoder, tmp_path, capsys, finished):
    train(text_recipe(captioned), tmp_path / "run", max_steps=2)
    printed = " ".join(capsys.readouterr().out.split())
    assert "The pipeline will be without a text encoder" in printed
    assert "--text.encoder" in printed
    pipe = ITARFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    empty = read_null_context(captioned, (TOKENS, WIDTH)).float()[None]
    assert len(pipe(prompt_embeds=empty, negative_prompt_embeds=empty).images) == 1
    with pytest.raises(ValueError, match="text encoder"):
        pipe(prompt="a photo of one")
    train(text_recipe(captioned, encoder), tmp_path / "run", start="resume", max_steps=2)
    pipe = ITARFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert len(pipe(prompt="a photo of one").images) == 1


def test_a_run_that_goes_on_keeps_the_text_encoder_that_it_has(captioned, encoder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train(text_recipe(captioned, encoder), run, max_steps=2)
    capsys.readouterr()
    for steps in (2, 3):
        train(text_recipe(captioned), run, start="resume", max_steps=steps)
        assert len(ITARFlowPipeline.from_pretrained(run / "pipeline")(prompt="a photo of one").images) == 1
    assert "without a text encoder" not in capsys.readouterr().out
    monkeypatch.setattr(TextEncoder, "from_pretrained", missing)
    train(text_recipe(captioned), run, start="resume", max_steps=3)
    assert "without a text encoder" in " ".join(capsys.readouterr().out.split())
    monkeypatch.undo()
    assert ITARFlowPipeline.from_pretrained(run / "pipeline").text_encoder is not None


def missing(*args):
    raise ImportError("transformers is not installed")


def test_a_folder_that_is_named_as_the_encoder_by_chance_ends_no_training(captioned, encoder, tmp_path, monkeypatch):
    wrong = shutil.copytree(encoder, tmp_path / encoder.name)
    tokenizer = json.loads((wrong / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["corgis"] = 10_000
    (wrong / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.chdir(tmp_path)
    asked, load = [], TextEncoder.from_pretrained
    monkeypatch.setattr(TextEncoder, "from_pretrained", lambda *args: asked.append(args[0]) or load(*args))
    data = open_data(text_recipe(captioned), None)
    assert "has vectors of" in opened(text_recipe(captioned), data, tmp_path)
    assert asked == [encoder.name]
    card = data.captions.card
    nameless = dataclasses.replace(card, encoder=dataclasses.replace(card.encoder, name=None))
    data = dataclasses.replace(data, captions=data.captions._replace(card=nameless))
    assert "name none" in opened(text_recipe(captioned), data, tmp_path)
    assert asked == [encoder.name]


def opened(recipe, data, folder):
    """What is said where no encoder can be opened."""
    said = []
    assert open_text_encoder(recipe, data, folder / "pipeline", Accelerator(cpu=True), said.append) is None
    return said[0]


def refused(recipe, run, error, message):
    with pytest.raises(error, match=message):
        train(recipe, run)
    assert not run.exists()


def test_what_does_not_fit_together_is_refused_before_any_work(captioned, tmp_path):
    run = tmp_path / "run"
    plain = pictures(tmp_path / "plain")
    refused(text_recipe(plain), run, DataError, "have no captions .*but the model takes them")
    refused(text_recipe(tmp_path / "nowhere"), run, DataError, "nowhere' does not exist")
    refused(text_recipe(plain), run, DataError, "set --model.context-tokens 0 --model.context-dim 0 to train without")
    refused(text_recipe(captioned, context_tokens=4), run, DataError, rf"{TOKENS} vectors.*takes 4 of")
    refused(text_recipe(captioned, context_dim=16), run, DataError, rf"set .*--model.context-dim {WIDTH}")
    refused(text_recipe(captioned, num_classes=3), run, ValueError, "context_dim")
    as_vector = {"num_classes": 5, "context_dim": 6, "context_tokens": 1}
    fits = "--model.num-classes 3 --model.context-dim 4, or --model.num-classes 0 --model.context-tokens 0 --model.c"
    refused(text_recipe(captioned, **as_vector), run, DataError, fits)
    refused(text_recipe(captioned, tmp_path / "nowhere"), run, RunError, "nowhere")
    labelled = text_recipe(captioned, tmp_path / "nowhere", num_classes=3, context_dim=4, context_tokens=1)
    refused(labelled, run, ValueError, "text.encoder is .*nowhere.*takes no captions")
    other = save_text_encoder(tmp_path / "other", seed=1)
    refused(text_recipe(captioned, other), run, RunError, "encoded by another text encoder")


def test_captions_of_another_encoder_are_another_data_set(captioned, encoder, tmp_path):
    other = save_text_encoder(tmp_path / "other", seed=1)
    config = PrepareConfig(
        source=str(captioned.parent / "source"), out=tmp_path / "prepared", size=8, in_channels=1, num_workers=0,
        captions="a photo of {}", text_encoder=str(other), context_tokens=TOKENS,
    )  # fmt: skip
    prepare(config)
    train(text_recipe(captioned, encoder), tmp_path / "run", max_steps=2)
    with pytest.raises(RunError, match="others than those of"):
        train(text_recipe(tmp_path / "prepared", other), tmp_path / "run", start="resume")


def test_a_model_of_labels_does_not_read_the_captions_beside_its_images(captioned, tmp_path):
    labelled = text_recipe(captioned, num_classes=3, context_dim=4, context_tokens=1)
    summary = train(labelled, tmp_path / "run", max_steps=2)
    record = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())["training"]
    assert "captions" not in record
    assert summary.class_names == NAMES
    assert load_data(labelled.data, image_size=8, in_channels=1).null_context is None
