"""A data set of codes: its card, its rows, and what is refused before work starts."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch
from tiny_codes import IDENTITY, make_card, write_codes

from itarflow.data import DataConfig, load_data
from itarflow.data.codes import CARD, CodeDecoder, CodesCard, check_card, find_card, read_card, to_bytes
from itarflow.runtime.errors import DataError
from itarflow.runtime.json_file import as_type
from itarflow.runtime.text import display_name


def posteriors(count=20, columns=4):
    return torch.randn((count, columns, 4, 4, 4), generator=torch.Generator().manual_seed(0)).half()


def load(folder, card, **options):
    config = DataConfig(path=str(folder), held_out_images=2, **options)
    return load_data(config, image_size=4, in_channels=4, vae=card.identity)


def test_a_card_survives_its_file(tmp_path):
    card = make_card()
    write_codes(tmp_path / "codes", card, posteriors(3), [0, 1, 0])
    assert read_card(tmp_path / "codes" / CARD) == card
    assert card.shape == (4, 4, 4)
    assert card.columns(flips=True, variance=True) == ("mean", "log_variance", "mean_flipped", "log_variance_flipped")
    assert make_card(variance=False).columns(flips=False, variance=True) == ("mean",)


def test_a_card_is_found_wherever_the_codes_are_named(tmp_path):
    folder = write_codes(tmp_path / "codes", make_card(), posteriors(3), [0, 1, 0])
    for name in (folder, folder / "train-00000-of-00001.parquet", folder / "*.parquet"):
        assert find_card(str(name)) == make_card()
    (tmp_path / "images").mkdir()
    for name in (tmp_path / "images", "digits", "someone/images", tmp_path / "nowhere"):
        assert find_card(str(name)) is None


@pytest.mark.parametrize("text", ["{", "{}", '{"card": {"vae": "x"}}', "[]"])
def test_a_damaged_card_is_refused(tmp_path, text):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(DataError, match=r"codes\.json is damaged"):
        find_card(str(tmp_path))


@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"in_memory": True}])
def test_codes_are_read_as_they_were_written(tmp_path, options, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    card, stored = make_card(), posteriors()
    data = load(write_codes(tmp_path / "codes", card, stored, [index % 2 for index in range(20)]), card, **options)
    if options.get("in_memory"):
        data = data.decoded()
    assert data.class_names == ("a", "b")
    assert len(data.train) == 18
    held = {tuple(image.flatten().tolist()) for image, *_ in (data.held_out[index] for index in range(2))}
    kept = [row for row in stored if tuple(row[:2].flatten().tolist()) not in held]
    assert len(kept) == 18
    for index, row in enumerate(kept):
        example = data.train[index]
        assert example.image.dtype == torch.float16
        assert torch.equal(example.image, row.reshape(2, 2, 4, 4, 4))
    assert data.held_out[0].image.shape == (1, 2, 4, 4, 4)  # mirrored images are for training


def test_a_decoder_reads_what_is_asked_for():
    card = make_card()
    row = dict(zip(card.columns(flips=True, variance=True), map(to_bytes, posteriors(1)[0]), strict=True))
    for flips, variance in ((False, False), (True, False), (False, True)):
        decoder = CodeDecoder(card, flips, variance)
        assert decoder(row).shape == decoder.shape == (1 + flips, 1 + variance, 4, 4, 4)
    assert torch.equal(CodeDecoder(card, True, False)(row)[1, 0], posteriors(1)[0, 2])


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (b"short", "5 bytes.*128 bytes of float16"),
        (None, "NoneType.*128 bytes"),
        (np.full(64, np.inf, "<f2").tobytes(), "not finite"),
    ],
)
def test_a_damaged_row_is_named(column, words):
    with pytest.raises(DataError, match=words):
        CodeDecoder(make_card(), False, False)({"mean": column})


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"finished": False}, "are not finished"),
        (
            {"identity": dataclasses.replace(IDENTITY, encoder="0")},
            r"made by another VAE \(tiny\)(.|\n)*encoder: 0 -> ",
        ),
        ({"identity": dataclasses.replace(IDENTITY, scaling_factor=0.5)}, r"scaling_factor: 0\.5 -> 0\.4"),
        ({"image_size": 16}, r"shape \(4, 8, 8\).* 16 pixels.*--model.in-channels 4 --model.image-size 8"),
        ({"crop": "adm"}, "data.crop is 'center'.*'adm'; set --data.crop adm"),
        ({"flips": False}, "horizontal_flip is on.* codes/"),
    ],
)
def test_codes_that_a_recipe_does_not_ask_for_are_refused(card, words):
    with pytest.raises(DataError, match=words):
        check_card(make_card(**card), "codes/", IDENTITY, (4, 4, 4), flips=True, crop="center")


@pytest.mark.parametrize(("stored", "asked"), [(True, True), (True, False), (False, False)])
def test_codes_that_are_asked_for_are_read(tmp_path, monkeypatch, stored, asked):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    card = make_card(flips=stored)
    rows = posteriors(4, columns=4 if stored else 2)
    data = load(write_codes(tmp_path / "codes", card, rows, [0, 1, 0, 1]), card, horizontal_flip=asked)
    assert data.train[0].image.shape == (1 + asked, 2, 4, 4, 4)


def test_a_card_of_an_earlier_version_lacks_what_came_later():
    values = make_card().to_json()
    for name in ("code_mean", "code_std"):
        del values[name]
    del values["identity"]["latents_mean"]
    assert as_type(values, CodesCard, "codes.json") == make_card(code_mean=(), code_std=())


def test_images_and_codes_are_not_mistaken_for_one_another(tmp_path):
    folder = write_codes(tmp_path / "codes", make_card(), posteriors(3), [0, 1, 0])
    with pytest.raises(DataError, match=r"codes of the VAE tiny.*codec\.vae"):
        load_data(DataConfig(path=str(folder)), image_size=8, in_channels=3)
    with pytest.raises(DataError, match=r"digits .*encode_dataset.py digits OUT --vae VAE --size 8"):
        load_data(DataConfig(path="digits"), image_size=4, in_channels=4, vae=IDENTITY)


def test_others_read_the_name_of_a_vae_and_no_path(tmp_path):
    (tmp_path / "my-vae").mkdir()
    assert display_name(str(tmp_path / "my-vae")) == "my-vae"
    assert display_name("stabilityai/sd-vae-ft-ema") == "stabilityai/sd-vae-ft-ema"
    assert display_name("digits") == "digits"
    assert display_name(str(tmp_path / "train" / "*.parquet")) == "*.parquet"
    assert display_name("/home/me/gone/photos/") == "photos"
    assert display_name("~/photos/all.parquet") == "all.parquet"
