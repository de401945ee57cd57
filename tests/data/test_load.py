"""A set has the promised images, labels and held-out part, and broken images are replaced, named and counted."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
from image_files import (
    TYPED,
    damage,
    encoded,
    load,
    typed_columns,
    values,
    write_classes,
    write_image,
    write_one_broken,
    write_parquet,
    write_row_groups,
)
from PIL import Image
from sklearn.datasets import load_digits

from itarflow.data import DataConfig, load_data
from itarflow.data.codes import CodeDecoder
from itarflow.data.dataset import ImageDataset, PictureDecoder
from itarflow.runtime.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# Training and held-out images


def test_digits_need_nothing_and_keep_their_grey_values() -> None:
    data = load_data(DataConfig(path="digits"), image_size=8, in_channels=1)
    assert data.class_names == tuple("0123456789")
    assert (len(data.train), len(data.held_out)) == (1797 - 179, 179)
    kept = torch.ones(1797, dtype=torch.bool)
    kept[data.held_out._indices] = False
    expected = np.round(load_digits().images * 255 / 16)[kept.numpy()]
    np.testing.assert_array_equal(data.train[100].image[0], expected[100])
    assert data.train[100].label == load_digits().target[kept.numpy()][100]


def test_held_out_images_are_fixed_apart_and_in_proportion() -> None:
    first, again = (load("digits", in_channels=1, held_out_images=100) for _ in range(2))
    assert torch.equal(first.held_out._indices, again.held_out._indices)
    assert len(first.held_out) == 100
    together = torch.cat([first.train._indices, first.held_out._indices])
    assert together.sort().values.tolist() == list(range(1797))
    counts = first.held_out.labels.bincount(minlength=10)
    assert counts.min() >= 9
    assert counts.max() <= 11


def test_held_out_images_cannot_be_all(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 1})
    with pytest.raises(DataError, match="nothing of 1 image to train on"):
        load(tmp_path, held_out_images=5)
    write_image(tmp_path / "a" / "more.png")
    data = load(tmp_path, held_out_images=5)
    assert (len(data.train), len(data.held_out)) == (1, 1)


def test_held_out_split_is_measured_in_part(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 2, "b": 1, "c": 1})
    write_classes(tmp_path / "test", {"a": 6, "b": 3, "c": 3})

    def held_out(count: int) -> ImageDataset:
        data = load(tmp_path, held_out_split="test", held_out_images=count)
        assert len(data.train) == 4
        assert data.class_names == ("a", "b", "c")
        return data.held_out

    assert held_out(4).labels.tolist() == [0, 0, 1, 2]  # in proportion, and more than a tenth
    assert values(held_out(4)) == values(held_out(4)) == [1, 4, 7, 10]
    assert held_out(1).labels.tolist() == [1]
    for count in (0, 12, 1000):
        assert values(held_out(count)) == list(range(12))


def test_chosen_part_of_a_held_out_split_keeps_its_order(tmp_path: Path) -> None:
    columns = typed_columns(8)
    write_parquet(tmp_path / "train.parquet", columns, TYPED)
    write_parquet(tmp_path / "test.parquet", columns, TYPED)
    held_out = load(tmp_path, held_out_split="test", held_out_images=4, in_memory=True).held_out
    assert values(held_out) == [2, 3, 6, 7]
    assert held_out.labels.tolist() == [0, 1, 0, 1]
    assert held_out.images is not None
    assert len(held_out.images) == 4  # what is not measured on is not decoded


def test_missing_path_is_refused() -> None:
    with pytest.raises(DataError, match="path is missing"):
        load_data(DataConfig(), image_size=8, in_channels=3)


@pytest.mark.parametrize(
    "options",
    [
        {"held_out_images": -1},
        {"num_workers": -1},
        {"max_broken": -1},
        {"shuffle_buffer": 0},
        {"streaming": True, "in_memory": True},
        {"crop": "x"},
        {"name": "x"},
        {"image_size": 0},
        {"in_channels": 2},
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any]) -> None:
    write_classes(tmp_path, {"a": 2})
    with pytest.raises(DataError, match=next(iter(options))):
        load(tmp_path, **options)


# Images of a set


def test_images_are_cropped_and_resized_on_the_way(tmp_path: Path) -> None:
    write_image(tmp_path / "wide.png", 9, (40, 20))
    example = load(tmp_path, image_size=5, in_channels=1, crop="adm").train[0]
    assert torch.equal(example.image, torch.full((1, 5, 5), 9, dtype=torch.uint8))


@pytest.mark.parametrize(("image_size", "size"), [(8, ""), (512, " into 2 MB")])
def test_progress_names_the_memory_once_it_is_worth_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image_size: int, size: str
) -> None:
    load(write_classes(tmp_path, {"a": 2}), image_size=image_size, in_memory=True)
    assert f"reading 2 images{size} " in capsys.readouterr().err


def test_sets_can_be_sent_to_workers_by_pickle(tmp_path: Path) -> None:
    for in_memory in (False, True):
        train = load(write_classes(tmp_path, {"a": 2}), in_memory=in_memory).train
        assert values(pickle.loads(pickle.dumps(train))) == [0, 1]


def test_streamed_sets_can_be_sent_to_workers_by_pickle(tmp_path: Path) -> None:
    train = load(write_row_groups(tmp_path / "a.parquet", 5, 2), streaming=True).train
    size = len(pickle.dumps(train))
    assert values(pickle.loads(pickle.dumps(train))) == values(train) == list(range(5))
    assert len(pickle.dumps(train)) == size


def test_row_groups_of_a_set(tmp_path: Path) -> None:
    file = write_row_groups(tmp_path / "a.parquet", 40, 12)
    data = load(file, streaming=True, held_out_images=4)
    assert data.train.row_groups is not None
    assert data.held_out.row_groups is not None
    assert (data.train.row_groups + data.held_out.row_groups).tolist() == [12, 12, 12, 4]
    assert data.held_out.row_groups.sum() == 4
    assert load(file).train.row_groups is None
    assert data.train.decoded().row_groups is None


def test_index_out_of_range(tmp_path: Path) -> None:
    train = load(write_classes(tmp_path, {"a": 2})).train
    for index in (-1, 2):
        with pytest.raises(IndexError):
            train[index]


# Broken images


@pytest.fixture
def one_broken(tmp_path: Path) -> Path:
    return write_one_broken(tmp_path)


def test_broken_image_is_replaced_by_the_next(one_broken: Path) -> None:
    train = load(one_broken).train
    assert values(train) == [0, 1, 3, 3, 4]
    assert train[2].label == 1  # the label of the image that is shown
    assert train[2].broken is not None
    assert str(one_broken / "a" / "002.png") in train[2].broken
    assert "truncated" in train[2].broken
    assert [train[index].broken for index in (1, 3)] == [None, None]


@pytest.mark.parametrize("kind", ["jpg", "webp", "gif", "bmp", "tif"])
def test_files_cut_short_are_broken_whatever_their_kind(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"a.{kind}")
    damage(tmp_path / f"a.{kind}")
    write_image(tmp_path / "b.png", 7)
    example = load(tmp_path).train[0]
    assert f"a.{kind}: " in str(example.broken)
    assert example.image.unique().tolist() == [7]


def test_replacement_wraps_around(one_broken: Path) -> None:
    damage(one_broken / "b" / "001.png")
    train = load(one_broken).train
    assert values(train) == [0, 1, 3, 3, 0]


def test_broken_image_in_memory_is_named(one_broken: Path) -> None:
    train = load(one_broken, in_memory=True).train
    (name,) = train.broken
    assert name.startswith(f"{one_broken / 'a' / '002.png'}: ")
    streamed = load(one_broken).train
    assert values(train) == values(streamed)
    assert train.labels.tolist() == [streamed[index].label for index in range(5)] == [0, 0, 1, 1, 1]


def test_too_many_broken_images_stop_the_run(one_broken: Path) -> None:
    with pytest.raises(DataError, match=r"1 images .*max_broken is 0(.|\n)*002\.png"):
        load(one_broken, in_memory=True, max_broken=0)
    with pytest.raises(DataError, match="max_broken"):
        load(one_broken, max_broken=0).train[2]


def test_set_of_broken_images_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(DataError, match=r"none of 2 images (.|\n)*a\.png: "):
        load(tmp_path)


def test_a_set_of_12_bits_in_16_is_refused_with_the_reason_and_a_single_one_counted(tmp_path: Path) -> None:
    pixels = np.full((8, 8), 3900, np.uint16)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(DataError, match=r"none of 2 images (.|\n)*a\.png: .*3,900 of 65,535: 12 bits.*convert it"):
        load(tmp_path)
    Image.fromarray(pixels * 16).save(tmp_path / "c.png")
    train = load(tmp_path, in_memory=True).train
    assert values(train) == [round(3900 * 16 / 257)] * 3
    assert [reason.partition(": ")[0] for reason in train.broken] == [
        f"{tmp_path / name}" for name in ("a.png", "b.png")
    ]


def test_image_bomb_missing_bytes_and_missing_file_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [encoded(1, 64), None, encoded(3)]
    columns = {"image": pa.array(rows, pa.binary())}
    train = load(write_parquet(tmp_path / "a.parquet", columns)).train
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert values(train) == [3, 3, 3]
        assert "decompression bomb" in str(train[0].broken)
    assert "row 1: there is no image" in str(train[1].broken)
    folder = load(write_classes(tmp_path / "folder", {"a": 2})).train
    (tmp_path / "folder" / "a" / "000.png").unlink()
    assert "No such file" in str(folder[0].broken)


def test_row_of_a_broken_image_is_that_of_the_table(tmp_path: Path) -> None:
    columns = {"image": [encoded(value) if value != 7 else b"junk" for value in range(10)]}
    data = load(write_parquet(tmp_path / "a.parquet", columns), held_out_images=1)
    assert "row 7: it is no image" in str(data.train[6].broken)  # row 5 is held out


def test_images_in_archives_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", encoded(5))
    paths = {"image": [f"zip://a.png::{tmp_path / 'set.zip'}"]}
    rows = datasets.Dataset.from_dict(paths, datasets.Features({"image": datasets.Image()}))
    dataset = ImageDataset(
        rows,
        decoder=PictureDecoder("image", image_size=8, in_channels=1),
        indices=torch.tensor([0]),
        labels=torch.tensor([-1]),
    )
    assert values(dataset) == [5]


def test_decoders_keep_the_names_that_kept_statistics_and_figures_rest_on():
    """Fingerprints of data sets hash them: under other names, figures and statistics of earlier versions are lost."""
    decoder = PictureDecoder("image", image_size=8, in_channels=1)
    assert repr(decoder) == "PictureDecoder(column='image', image_size=8, in_channels=1, crop='center')"
    codes = CodeDecoder(card=None, flips=True, variance=False)
    assert repr(codes) == "CodeDecoder(card=None, flips=True, variance=False)"
