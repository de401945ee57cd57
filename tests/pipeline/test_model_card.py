"""The model card: metadata for the Hub, tables for people."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from itarflow.pipeline.model_card import is_generated, model_card, signed

TRAINING = {
    "name": "pets",
    "data": "someone/pets",
    "metrics": {"held-out nll": -1.25, "bits/dim": 2.0},
    "recipe": {"train": {"epochs": 3, "betas": [0.9, 0.95]}, "noise": {"t_max": 0.123456789}},
}


def card(**changes: Any) -> ModelCard:
    arguments: dict[str, Any] = {
        "architecture": {"parameters": "1,234", "channels": 64, "num_classes": 2, "noise_conditioned": True},
        "sampling": {"t_max": 0.5, "guidance weight": 2.0},
        "training": TRAINING,
        "class_names": ["cat", "dog"],
        "evaluations": {},
    }
    return model_card(**arguments | changes)


def section(of: ModelCard, title: str) -> list[str]:
    """The lines below a heading."""
    return of.text.split(f"## {title}\n")[1].split("\n## ")[0].strip().splitlines()


def test_metadata_survive_being_stored(tmp_path):
    card().save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "itarflow"
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.tags == ["itarflow", "normalizing-flow", "iTARFlow", "image-generation"]
    assert data.datasets == ["someone/pets"]
    results = [(one.metric_type, one.metric_name, one.metric_value, one.dataset_type) for one in data.eval_results]
    assert results == [
        ("bits-dim", "bits/dim", 2.0, "someone/pets"),
        ("held-out-nll", "held-out nll", -1.25, "someone/pets"),
    ]


@pytest.mark.parametrize("data", [None, "digits", "/home/someone/private", "./pets", "pets/*.parquet"])
def test_only_data_sets_of_the_hub_are_metadata(data):
    assert card(training=TRAINING | {"data": data}).data.datasets is None


def test_a_folder_here_is_not_taken_for_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "pets").mkdir(parents=True)
    assert card().data.datasets is None


@pytest.mark.parametrize(
    ("iterative", "name", "other"), [(True, "iTARFlow", "TARFlow"), (False, "TARFlow", "iTARFlow")]
)
def test_the_card_tells_itarflow_from_tarflow(iterative, name, other):
    made = card(architecture={"noise_conditioned": iterative})
    assert name in made.data.tags
    assert other not in made.data.tags
    assert f"generates images: {name} (" in made.text


def test_what_matters_has_its_row():
    made = card()
    assert "| parameters | 1,234 |" in section(made, "What it is")
    assert "| guidance weight | 2 |" in section(made, "How it samples")
    assert section(made, "How it was trained") == [
        "| setting | value |",
        "| --- | --- |",
        "| noise.t_max | 0.123457 |",
        "| train.epochs | 3 |",
        "",
        "`itarflow info` shows all settings of the training.",
    ]
    assert section(made, "Results")[2:] == ["| bits/dim | 2 |", "| held-out nll | -1.25 |"]


def test_private_entries_of_a_config_are_left_out():
    assert "_name_or_path" not in card(architecture={"_name_or_path": "/home/someone", "channels": 8}).content


def test_what_would_break_a_table_is_escaped():
    rows = section(card(sampling={"names": ["a|b", "c\nd"]}), "How it samples")
    assert rows[2:] == [r"| names | a\|b, c d |"]


@pytest.mark.parametrize("training", [None, {}, {"name": "pets"}])
def test_an_unknown_training_is_called_unknown(training):
    made = card(training=training)
    assert section(made, "How it was trained") == ["Not recorded."]
    assert section(made, "Results") == ["Not recorded."]
    assert made.data.datasets is None


@pytest.mark.parametrize(
    ("num_classes", "class_names", "example"),
    [(2, ["cat", "dog"], "class_labels=['cat']"), (2, None, "class_labels=[0]"), (0, None, "num_images=1")],
)
def test_the_example_suits_the_flow(num_classes, class_names, example):
    made = card(architecture={"num_classes": num_classes}, class_names=class_names)
    assert f"image = pipe({example}).images[0]" in made.text
    assert 'from_pretrained("path/to/this/folder")' in made.text
    assert "pip install itarflow" in made.text


def test_the_example_prompt_is_a_caption_of_the_training_if_one_is_known():
    for training, prompt in (({"example_prompt": "a red\ncircle"}, "a red circle"), ({}, "a corgi on the beach")):
        made = card(architecture={"prompts": "of T5"}, training=training)
        assert f"image = pipe(prompt='{prompt}').images[0]" in made.text
        assert "example_prompt" not in made.text


def test_evaluations_are_a_table_with_a_column_a_figure():
    many, one = "iterative, 10 steps: 50,000 samples", "raw"
    of = card(training=None, evaluations={many: "FID 2.5, precision 0.7 ± 0.01", one: "FID 9"})
    assert section(of, "Results") == [
        "| samples | FID | precision |",
        "| --- | --- | --- |",
        "| iterative, 10 steps: 50,000 samples | 2.5 | 0.7 ± 0.01 |",
        "| raw | 9 |  |",
    ]
    named = {one.metric_name: (one.metric_type, one.metric_value) for one in of.data.eval_results}
    assert named[f"precision, {many}"] == ("precision", 0.7)
    assert named["FID, raw"] == ("fid", 9.0)


def test_an_evaluation_in_other_words_is_told_as_it_is():
    assert section(card(training=None, evaluations={"raw": "good enough"}), "Results")[-1] == "| raw | good enough |"


def test_where_it_is_shared_and_under_which_license():
    made = card(repo_id="someone/pets-flow", license="mit", picture=True)
    assert 'from_pretrained("someone/pets-flow")' in made.text
    assert "![Samples](samples.png)" in made.text
    assert (made.data.license, made.data.model_name) == ("mit", "someone/pets-flow")


def test_no_name_leaves_its_line():
    made = card(training=TRAINING | {"name": "pets\n\n# Owned\x1b[2J"}, class_names=["a```\nb", "c"])
    assert "# pets  # Owned\\x1b[2J" in made.text.splitlines()
    assert "```\nb" not in made.text


def test_a_card_knows_whether_it_was_edited():
    text = signed(str(card()))
    assert is_generated(text)
    assert is_generated(text + "\n")
    assert not is_generated(text.replace("pets", "cats"))
    assert not is_generated(str(card()))
