"""Tests of itarflow/data.py: images of every kind become the promised batches, in the promised order."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before `datasets` is imported, which reads it once

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image

from itarflow.data import (
    Batch,
    DataConfig,
    DataError,
    GlobalBatchSampler,
    ImageData,
    ImageDataset,
    batches,
    convert_image,
    crop_image,
    in_order,
    load_data,
    to_array,
    to_pixels,
    to_uint8,
)


@pytest.fixture(autouse=True)
def offline_and_cached_in_tmp(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    value = 0
    for name, count in counts.items():
        for index in range(count):
            write_image(folder / name / f"{index:03}.png", value)
            value += 1
    return folder


def encoded(value: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, columns: dict[str, Any], features: datasets.Features | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if features is None:
        pq.write_table(pa.table(columns), path)
    else:
        datasets.Dataset.from_dict(columns, features).to_parquet(str(path))
    return path


def load(path: Path | str, *, image_size: int = 8, in_channels: int = 3, **options: Any) -> ImageData:
    options = {"held_out_images": 0, "num_workers": 0} | options
    return load_data(DataConfig(path=str(path), **options), image_size=image_size, in_channels=in_channels)


def values(dataset: ImageDataset) -> list[int]:
    """Grey value of each image: the tests' images are flat, and tell themselves apart by it."""
    return [int(dataset[index].image[0, 0, 0]) for index in range(len(dataset))]


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


# ------------------------------------------------------------------------------------------ one image


def through_file(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


GREY = np.array([[0, 100], [200, 255]], dtype=np.uint8)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY), GREY),
        (Image.fromarray(GREY).convert("P"), GREY),
        (Image.fromarray(GREY).convert("RGB"), GREY),
        (Image.fromarray(GREY > 128), np.where(GREY > 128, 255, 0)),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        (Image.fromarray((GREY * 257.0 - 100 * (GREY > 0)).astype(np.int32)), GREY),
        (Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (2, 2), 0)]), np.full((2, 2), 255)),
        (Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (2, 2), 255)]), GREY),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), np.full((2, 2), 204)),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 155)), np.full((2, 2), 100)),
        (through_file(Image.fromarray(GREY), "PNG", transparency=0), np.array([[255, 100], [200, 255]])),
        (
            through_file(Image.fromarray(GREY).convert("P"), "GIF", transparency=0),
            np.array([[255, 100], [200, 255]]),
        ),
        (through_file(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), GREY),
    ],
    ids=[
        "L",
        "P",
        "RGB",
        "1",
        "I;16",
        "I",
        "LA-clear",
        "LA-opaque",
        "RGBA",
        "CMYK",
        "L-tRNS",
        "P-clear",
        "16-bit-PNG",
    ],
)
def test_every_mode_becomes_8_bit(image: Image.Image, expected: np.ndarray, in_channels: int) -> None:
    before = image.tobytes()
    array = to_array(image, in_channels)
    assert array.dtype == np.uint8
    assert array.shape == (in_channels, 2, 2)
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, np.broadcast_to(expected, array.shape))
    assert image.tobytes() == before


def test_colour_keeps_its_channel_order() -> None:
    assert to_array(Image.new("RGB", (1, 1), (1, 2, 3)), 3).ravel().tolist() == [1, 2, 3]


def test_exif_orientation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photo = through_file(Image.fromarray(np.array([[10, 20, 30]], dtype=np.uint8)), "PNG", exif=exif)
    assert to_array(photo, 1)[0].tolist() == [[10], [20], [30]]
    assert convert_image(convert_image(photo, 1), 1).size == (1, 3)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2), np.float32), np.full((2, 2), 70000, np.int32), -np.eye(2)]
)
def test_pixels_of_unknown_range_are_refused(array: np.ndarray) -> None:
    image = Image.fromarray(array.astype(np.int32) if array.dtype == np.float64 else array)
    with pytest.raises(DataError, match="expected"):
        convert_image(image, 3)


@pytest.mark.parametrize("in_channels", [0, 2, 4])
def test_other_channel_counts_are_refused(in_channels: int) -> None:
    with pytest.raises(DataError, match=f"in_channels is {in_channels}"):
        to_array(Image.new("L", (2, 2)), in_channels)
    with pytest.raises(DataError, match="in_channels"):
        load("digits", in_channels=in_channels)


RAMP = np.tile(np.array([0, 70, 140, 210], dtype=np.uint8), (4, 1))


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("center", [50, 160]),  # triangle filter: (0.75 * 0 + 0.75 * 70 + 0.25 * 140) / 1.75
        ("adm", [35, 175]),  # one box halving reaches the size, bicubic then changes nothing
        ("edm", np.asarray(Image.fromarray(RAMP).resize((2, 2), Image.Resampling.LANCZOS))[0].tolist()),
    ],
)
def test_crop_resizes_as_published(protocol: Any, expected: list[int]) -> None:
    image = crop_image(Image.fromarray(RAMP), 2, protocol)
    np.testing.assert_array_equal(np.asarray(image), [expected, expected])


@pytest.mark.parametrize(("protocol", "left"), [("center", 2), ("adm", 1), ("edm", 1)])
@pytest.mark.parametrize("upright", [False, True])
def test_crop_cuts_where_published(protocol: Any, left: int, upright: bool) -> None:
    array = np.arange(28, dtype=np.uint8).reshape(4, 7)  # torchvision rounds 1.5 to 2, the others to 1
    expected = array[:, left : left + 4]
    image = crop_image(Image.fromarray(array.T if upright else array), 4, protocol)
    np.testing.assert_array_equal(np.asarray(image), expected.T if upright else expected)


def test_adm_halves_before_bicubic() -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    halved = Image.fromarray(array).resize((15, 20), Image.Resampling.BOX)
    expected = halved.resize((9, 12), Image.Resampling.BICUBIC).crop((0, 1, 9, 10))
    assert crop_image(Image.fromarray(array), 9, "adm").tobytes() == expected.tobytes()


def test_edm_crops_before_lanczos() -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, 31), dtype=np.uint8)
    expected = Image.fromarray(array[4:35]).resize((9, 9), Image.Resampling.LANCZOS)
    assert crop_image(Image.fromarray(array), 9, "edm").tobytes() == expected.tobytes()


@pytest.mark.parametrize("protocol", ["center", "adm", "edm"])
@pytest.mark.parametrize("size", [(5, 5), (3, 9), (9, 2), (1, 1), (64, 11)])
def test_crop_gives_the_size_whatever_comes_in(protocol: Any, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    square = crop_image(image, 5, protocol)
    assert square.size == (5, 5)
    if size == (5, 5):
        assert square.tobytes() == image.tobytes()


def test_unknown_crop_is_refused() -> None:
    with pytest.raises(DataError, match=r"crop 'top'.*center, adm, edm"):
        crop_image(Image.new("L", (2, 2)), 2, "top")  # type: ignore[arg-type]


def test_pixels_round_trip_for_all_values() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    pixels = to_pixels(images)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    torch.testing.assert_close(pixels, images.double().div(127.5).sub(1).float(), rtol=0, atol=1e-7)
    assert torch.equal(to_uint8(pixels), images)
    assert torch.equal(to_uint8(pixels + 0.0038), images)  # half a grey level is 0.00392


def test_to_uint8_clamps_and_takes_half_precision() -> None:
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]
    assert to_uint8(torch.tensor([-1.0, 1.0], dtype=torch.bfloat16)).tolist() == [0, 255]


def test_pixels_are_not_converted_twice() -> None:
    with pytest.raises(ValueError, match="uint8"):
        to_pixels(torch.zeros(1))


# ------------------------------------------------------------------------------------------ digits


def test_digits_need_nothing_and_keep_their_grey_values() -> None:
    data = load_data(DataConfig(path="digits"), image_size=8, in_channels=1)
    assert data.class_names == tuple("0123456789")
    assert (len(data.train), len(data.held_out)) == (1797 - 179, 179)
    from sklearn.datasets import load_digits

    kept = torch.ones(1797, dtype=torch.bool)
    kept[data.held_out._indices] = False
    expected = np.round(load_digits().images * 255 / 16)[kept.numpy()]
    np.testing.assert_array_equal(data.train[100].image[0], expected[100])
    assert data.train[100].label == load_digits().target[kept.numpy()][100]
    with pytest.raises(DataError, match="no split 'test'; use one of train"):
        load("digits", split="test")


def test_held_out_images_are_fixed_apart_and_in_proportion() -> None:
    first, again = (load("digits", in_channels=1, held_out_images=100) for _ in range(2))
    assert torch.equal(first.held_out._indices, again.held_out._indices)
    assert len(first.held_out) == 100
    together = torch.cat([first.train._indices, first.held_out._indices])
    assert together.sort().values.tolist() == list(range(1797))
    counts = first.held_out.labels.bincount(minlength=10)
    assert counts.min() >= 9
    assert counts.max() <= 11


# ------------------------------------------------------------------------------------------ folders


def test_folder_of_classes(tmp_path: Path) -> None:
    data = load(write_classes(tmp_path, {"dog": 2, "cat": 3}))
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.train.labels.dtype == torch.int64
    assert values(data.train) == [2, 3, 4, 0, 1]
    example = data.train[0]
    assert (example.image.dtype, tuple(example.image.shape)) == (torch.uint8, (3, 8, 8))
    assert (example.label, example.broken) == (0, None)
    assert len(data.held_out) == 0


def test_single_class_keeps_its_label(tmp_path: Path) -> None:
    data = load(write_classes(tmp_path, {"cat": 2}))
    assert data.class_names == ("cat",)
    assert data.train.labels.tolist() == [0, 0]


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    data = load(write_classes(tmp_path, {".": 3}))
    assert data.class_names == ()
    assert [data.train[index].label for index in range(3)] == [-1, -1, -1]
    assert values(data.train) == [0, 1, 2]


@pytest.mark.parametrize("name", ["bullet_train", "test", "dev"])
def test_class_with_the_name_of_a_split_is_a_class(tmp_path: Path, name: str) -> None:
    data = load(write_classes(tmp_path, {"bird": 2, name: 1}))
    assert data.class_names == tuple(sorted(["bird", name]))
    assert len(data.train) == 3


def test_image_names_that_look_like_splits_are_images(tmp_path: Path) -> None:
    for name in ("train_1.png", "test.png", "other.png"):
        write_image(tmp_path / name)
    assert len(load(tmp_path).train) == 3


def test_folder_with_splits(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 2, "b": 1})
    write_classes(tmp_path / "val", {"a": 1, "b": 1})
    data = load(tmp_path, held_out_split="val", held_out_images=1)
    assert data.class_names == ("a", "b")
    assert (data.train.labels.tolist(), data.held_out.labels.tolist()) == ([0, 0, 1], [0, 1])
    assert load(tmp_path, split="val").train.labels.tolist() == [0, 1]
    assert len(load(tmp_path, split="train+val").train) == 5
    with pytest.raises(DataError, match="no split 'test'; use one of train, val"):
        load(tmp_path, held_out_split="test")
    with pytest.raises(DataError, match="shares images with split 'train'"):
        load(tmp_path, held_out_split="train")


def test_one_class_in_splits_keeps_its_label(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 2})
    write_classes(tmp_path / "test", {"a": 1})
    assert load(tmp_path, held_out_split="test").class_names == ("a",)


def test_split_without_labels_does_not_disturb_another(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 2, "b": 1})
    write_classes(tmp_path / "test", {".": 2})
    assert load(tmp_path).train.labels.tolist() == [0, 0, 1]
    with pytest.raises(DataError, match="several depths"):
        load(tmp_path, held_out_split="test")


def test_parts_of_a_split(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 3, "b": 3})
    data = load(tmp_path, split="train[:50%]", held_out_split="train[-2:]")
    assert (values(data.train), values(data.held_out)) == ([0, 1, 2], [4, 5])
    assert values(load(tmp_path, split="train[5:]+train[:1]").train) == [5, 0]
    with pytest.raises(DataError, match="shares images"):
        load(tmp_path, split="train[:50%]", held_out_split="train[2:4]")


def test_folder_name_may_hold_glob_characters(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "my [new] *set?", {"a": 1, "b [x]": 1})
    assert len(load(folder).train) == 2
    (folder / "metadata.csv").write_text("file_name,label\na/000.png,1\n")
    assert load(folder).train.labels.tolist() == [1]
    write_parquet(folder / "part[0].parquet", typed_columns(3), TYPED)
    assert len(load(folder).train) == len(load(folder / "part[0].parquet").train) == 3


@pytest.mark.parametrize("counts", [{".": 1, "a": 1}, {"a/b": 1}, {"a": 1, "b/c": 1}])
def test_mixed_and_deep_folders_are_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(DataError, match="several depths or too deep"):
        load(write_classes(tmp_path, counts))


def test_hidden_files_are_left_alone(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2, ".thumbnails": 1})
    (tmp_path / "a" / "._000.png").write_bytes(b"junk")
    assert len(load(tmp_path).train) == 2


def test_metadata_file_gives_the_labels(tmp_path: Path) -> None:
    write_classes(tmp_path, {".": 3})
    (tmp_path / "metadata.csv").write_text("file_name,label\n002.png,1\n000.png,0\n001.png,1\n")
    data = load(tmp_path)
    assert (values(data.train), data.train.labels.tolist()) == ([2, 0, 1], [1, 0, 1])


def test_changed_folder_is_seen_and_left_untouched(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2, "b": 1})
    before = sorted(tmp_path.rglob("*"))
    assert len(load(tmp_path).train) == 3
    assert sorted(tmp_path.rglob("*")) == before
    write_image(tmp_path / "c" / "new.png", 9)
    data = load(tmp_path)
    assert (values(data.train), data.class_names) == ([0, 1, 2, 9], ("a", "b", "c"))
    write_image(tmp_path / "a" / "000.png", 77)
    (tmp_path / "c" / "new.png").unlink()
    assert values(load(tmp_path).train) == [77, 1, 2]


def test_relative_path_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path / "set", {"a": 2})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load("set").train) == len(load("./set").train) == len(load("~/set").train) == 2


# ------------------------------------------------------------------------------------------ parquet


TYPED = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})


def typed_columns(count: int, first: int = 0) -> dict[str, Any]:
    return {
        "image": [{"bytes": encoded(first + index), "path": f"{index}.png"} for index in range(count)],
        "label": [index % 2 for index in range(count)],
    }


def test_parquet_folder_with_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", typed_columns(2), TYPED)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", typed_columns(2, 10), TYPED)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", typed_columns(1, 20), TYPED)
    write_image(tmp_path / "overview.png")  # a picture beside the tables is not the data set
    data = load(tmp_path, held_out_split="test")
    assert (values(data.train), values(data.held_out)) == ([0, 1, 10, 11], [20])
    assert data.class_names == ("a", "b")
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert values(load(tmp_path / "train-*.parquet").train) == [0, 1, 10, 11]
    assert values(load(tmp_path / "test-00000-of-00001.parquet").train) == [20]
    with pytest.raises(DataError, match="no split 'val'; use one of test, train"):
        load(tmp_path, held_out_split="val")


@pytest.mark.parametrize(
    "names", [["x.parquet", "y.parquet"], ["train/x.parquet", "test/x.parquet"], ["train_0.parquet"]]
)
def test_parquet_names_that_tell_the_split_or_none(tmp_path: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        write_parquet(tmp_path / name, typed_columns(1, index), TYPED)
    assert values(load(tmp_path).train) == ([0, 1] if names[0] == "x.parquet" else [0])


def test_parquet_file_without_split_among_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train", "extra"):
        write_parquet(tmp_path / f"{name}.parquet", typed_columns(1), TYPED)
    with pytest.raises(DataError, match=r"extra\.parquet' is of no split"):
        load(tmp_path)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"bytes": data, "path": None}])
def test_parquet_of_other_writers(tmp_path: Path, wrap: Callable[[bytes], Any]) -> None:
    columns = {"pic": [wrap(encoded(value)) for value in range(4)], "label": pa.array([0, 2, None, 1])}
    data = load(write_parquet(tmp_path / "any.parquet", columns))
    assert values(data.train) == [0, 1, 2, 3]
    assert data.class_names == ("0", "1", "2")
    assert data.train.labels.tolist() == [0, 2, -1, 1]


def test_changed_parquet_is_seen(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", typed_columns(2), TYPED)
    assert values(load(file).train) == [0, 1]
    write_parquet(file, typed_columns(2, 5), TYPED)
    os.utime(file, (1, 1))  # as after a copy that keeps times: older than what was there
    assert values(load(file).train) == [5, 6]


def test_labels_are_found_by_name_before_type(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "coarse_label": datasets.ClassLabel(names=["x"]),
            "fine_label": datasets.ClassLabel(names=["p", "q"]),
            "img": datasets.Image(),
            "number": datasets.Value("int16"),
        }
    )
    images = [{"bytes": encoded(1), "path": None}] * 2
    columns = {"coarse_label": [0, 0], "fine_label": [1, -1], "img": images, "number": [3, 1]}
    file = write_parquet(tmp_path / "a.parquet", columns, features)
    assert load(file).class_names == ("p", "q")
    assert load(file).train.labels.tolist() == [1, -1]
    assert load(file, label_column="coarse_label", image_column="img").class_names == ("x",)
    assert load(file, label_column="number").train.labels.tolist() == [3, 1]
    assert load(file, label_column="number").class_names == ("0", "1", "2", "3")


def test_columns_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    images = [encoded(1)] * 2
    columns = {"image": images, "label": ["x", "y"], "negative": [-1, 0], "half": [0.5, 1.0]}
    file = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=r"'label' is Value.'string'.*expected ClassLabel or ints"):
        load(file, label_column="label")
    with pytest.raises(DataError, match="'half'"):
        load(file, label_column="half")
    with pytest.raises(DataError, match="'gone' is missing"):
        load(file, label_column="gone")
    with pytest.raises(DataError, match="'negative' holds -1"):
        load(file, label_column="negative")
    with pytest.raises(DataError, match=r"image_column 'half' has no images.*'image'"):
        load(file, image_column="half")
    with pytest.warns(UserWarning, match=r"'label'.*unlabelled"):
        assert load(file).class_names == ()
    with pytest.raises(DataError, match="no column of type Image among"):
        load(write_parquet(tmp_path / "b.parquet", {"text": ["a"]}))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.parquet"
    file.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"bad\.parquet' is not a readable parquet file"):
        load(tmp_path)
    write_parquet(file, {"image": [encoded(1, 64)] * 20, "label": list(range(20))})
    content = bytearray(file.read_bytes())
    content[4:60] = b"\xff" * 56
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read; repair"):
        load(tmp_path)


def test_empty_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.*no data"):
        load(write_parquet(tmp_path / "a.parquet", typed_columns(0), TYPED))


@pytest.mark.parametrize("split", ["train[:0%]", "train[99:]", "train[:x]"])
def test_part_of_a_split_that_is_empty_or_nonsense(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match=r"split 'train.*(has no rows|write it like)"):
        load(write_parquet(tmp_path / "a.parquet", typed_columns(4), TYPED), split=split)


# ------------------------------------------------------------------------------------------ wrong paths


def test_missing_path_is_refused() -> None:
    with pytest.raises(DataError, match="path is missing"):
        load_data(DataConfig(), image_size=8, in_channels=3)


@pytest.mark.parametrize(
    "path", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "gone.parquet", "gone/*.parquet"]
)
def test_local_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(path)


def test_name_that_is_neither_here_nor_on_the_hub() -> None:
    with pytest.raises(DataError, match="'some/set' is no file or folder here, nor to be had from the Hub"):
        load("some/set")


def test_name_of_a_file_format_is_not_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_classes(tmp_path, {"a": 2}))
    with pytest.raises(DataError, match="name of a file format"):
        load("imagefolder")


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(DataError, match="has no images"):
        load(tmp_path)
    with pytest.raises(DataError, match="not a readable parquet"):
        load(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "options",
    [
        {"held_out_images": -1},
        {"num_workers": -1},
        {"max_broken": -1},
        {"crop": "x"},
        {"name": "x"},
        {"image_size": 0},
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any]) -> None:
    write_classes(tmp_path, {"a": 2})
    with pytest.raises(DataError, match=next(iter(options))):
        load(tmp_path, **options)


def test_held_out_images_cannot_be_all(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 1})
    with pytest.raises(DataError, match="nothing of 1 image to train on"):
        load(tmp_path, held_out_images=5)
    write_image(tmp_path / "a" / "more.png")
    data = load(tmp_path, held_out_images=5)
    assert (len(data.train), len(data.held_out)) == (1, 1)


# ------------------------------------------------------------------------------------------ broken images


@pytest.fixture
def one_broken(tmp_path: Path) -> Path:
    """Five images in two classes, of which the third (the last of class a) is cut short."""
    write_classes(tmp_path, {"a": 3, "b": 2})
    damage(tmp_path / "a" / "002.png")
    return tmp_path


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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_reach_the_batch(one_broken: Path, num_workers: int) -> None:
    (batch,) = in_order(load(one_broken).train, 5, num_workers)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 3, 3, 4]
    assert batch.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(batch.broken) == 1
    assert "002.png" in batch.broken[0]


def test_broken_image_in_memory_is_warned_of(one_broken: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 of 5 images could not be read(.|\n)*002\.png"):
        train = load(one_broken, in_memory=True).train
    streamed = load(one_broken).train
    assert values(train) == values(streamed)
    assert train.labels.tolist() == [streamed[index].label for index in range(5)] == [0, 0, 1, 1, 1]


def test_too_many_broken_images_stop_the_run(one_broken: Path) -> None:
    with pytest.raises(DataError, match=r"1 images could not be read \(max_broken is 0\)(.|\n)*002\.png"):
        load(one_broken, in_memory=True, max_broken=0)
    with pytest.raises(DataError, match="max_broken"):
        load(one_broken, max_broken=0).train[2]
    with pytest.raises(DataError, match="max_broken"):
        list(in_order(load(one_broken, max_broken=0).train, 5, num_workers=1))


def test_set_of_broken_images_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(DataError, match=r"2 images could not be read(.|\n)*a\.png: cannot identify image"):
        load(tmp_path)


def test_image_bomb_missing_bytes_and_missing_file_are_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert "row 7: cannot identify" in str(data.train[6].broken)  # row 5 is held out


def test_images_in_archives_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", encoded(5))
    paths = {"image": [f"zip://a.png::{tmp_path / 'set.zip'}"]}
    rows = datasets.Dataset.from_dict(paths, datasets.Features({"image": datasets.Image()}))
    dataset = ImageDataset(
        rows,
        image_column="image",
        indices=torch.tensor([0]),
        labels=torch.tensor([-1]),
        image_size=8,
        in_channels=1,
    )
    assert values(dataset) == [5]


# ------------------------------------------------------------------------------------------ batches


def steps(count: int, **options: Any) -> list[list[int]]:
    return list(islice(GlobalBatchSampler(**options), count))


def test_every_image_once_an_epoch_and_epochs_differ() -> None:
    flat = [index for batch in steps(15, num_images=10, global_batch_size=4) for index in batch]
    epochs = [flat[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert {len(batch) for batch in steps(15, num_images=10, global_batch_size=4)} == {4}


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("start_step", [0, 3])
def test_step_is_the_same_however_it_is_cut(num_processes: int, accumulation: int, start_step: int) -> None:
    shared = {"num_images": 37, "global_batch_size": 24, "seed": 5}
    expected = steps(8, **shared)[start_step:]
    parts = [
        steps(
            (8 - start_step) * accumulation,
            **shared,
            num_processes=num_processes,
            process_index=process,
            accumulation=accumulation,
            start_step=start_step,
        )
        for process in range(num_processes)
    ]
    for step, whole in enumerate(expected):
        cuts = [parts[p][step * accumulation + a] for a in range(accumulation) for p in range(num_processes)]
        assert [index for cut in cuts for index in cut] == whole


def test_batch_larger_than_the_set() -> None:
    first, second = steps(2, num_images=3, global_batch_size=8)
    assert [sorted((first + second)[start : start + 3]) for start in range(0, 15, 3)] == [[0, 1, 2]] * 5


def test_order_is_stable_across_versions_and_iterations() -> None:
    sampler = GlobalBatchSampler(num_images=8, global_batch_size=8, seed=1)
    pinned = [2, 5, 1, 3, 0, 4, 7, 6]
    assert next(iter(sampler)) == next(iter(sampler)) == pinned
    assert steps(1, num_images=8, global_batch_size=8, seed=2) != [pinned]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"global_batch_size": 10, "num_processes": 4},
            "10 is not divisible by num_processes 4.*multiple of 4",
        ),
        ({"global_batch_size": 10, "num_processes": 2, "accumulation": 2}, "accumulation 2"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_processes": 0}, "num_processes is 0"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"num_processes": 2, "process_index": 2}, "process 2 of 2"),
        ({"start_step": -1}, "start_step -1"),
    ],
)
def test_sampler_refuses(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(**({"num_images": 10, "global_batch_size": 4} | options))


def first_batches(dataset: ImageDataset, num_workers: int) -> Iterator[Batch]:
    sampler = GlobalBatchSampler(len(dataset), 4, seed=3)
    return islice(batches(dataset, sampler, num_workers), 5)


def test_batches_are_the_same_from_workers_and_memory(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 4, "b": 3})
    streamed, held = load(tmp_path).train, load(tmp_path, in_memory=True).train
    assert streamed.images is None
    assert held.images is not None
    assert (held.images.dtype, tuple(held.images.shape)) == (torch.uint8, (7, 3, 8, 8))
    state = torch.get_rng_state()
    runs = [list(first_batches(streamed, 0)), list(first_batches(streamed, 2)), list(first_batches(held, 0))]
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing from the global generator
    for batch, *others in zip(*runs, strict=True):
        assert isinstance(batch, Batch)
        assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.uint8, (4, 3, 8, 8))
        assert batch.labels.dtype == torch.int64
        assert batch.broken == ()
        for other in others:
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.labels, other.labels)
            assert other.broken == ()


@pytest.mark.parametrize("in_memory", [False, True])
def test_in_order_visits_each_image_once(tmp_path: Path, in_memory: bool) -> None:
    train = load(write_classes(tmp_path, {"a": 4, "b": 3}), in_memory=in_memory).train
    found = list(in_order(train, 3))
    assert [len(batch.labels) for batch in found] == [3, 3, 1]
    assert torch.cat([batch.images[:, 0, 0, 0] for batch in found]).tolist() == list(range(7))
    assert torch.cat([batch.labels for batch in found]).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert list(in_order(load(tmp_path, in_memory=in_memory).held_out, 3)) == []


def test_images_are_cropped_and_resized_on_the_way(tmp_path: Path) -> None:
    write_image(tmp_path / "wide.png", 9, (40, 20))
    example = load(tmp_path, image_size=5, in_channels=1, crop="adm").train[0]
    assert torch.equal(example.image, torch.full((1, 5, 5), 9, dtype=torch.uint8))


def test_sets_can_be_sent_to_workers_by_pickle(tmp_path: Path) -> None:
    for in_memory in (False, True):
        train = load(write_classes(tmp_path, {"a": 2}), in_memory=in_memory).train
        assert values(pickle.loads(pickle.dumps(train))) == [0, 1]


def test_index_out_of_range(tmp_path: Path) -> None:
    train = load(write_classes(tmp_path, {"a": 2})).train
    for index in (-1, 2):
        with pytest.raises(IndexError):
            train[index]
