"""Pictures that a file describes: metadata.csv, .jsonl, .parquet, and dataset.json of EDM's tools."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from image_files import load, values, write_classes, write_image, write_parquet

from itarflow.data.sources import open_splits
from itarflow.runtime.errors import DataError


def rows(path: Path, column: str, **options: str) -> list[object]:
    return open_splits(str(path), **options).train.with_format("arrow")[:][column].to_pylist()


def test_captions_leave_the_labels_of_the_folders(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "metadata.csv").write_text("file_name,text\na/000.png,one\na/001.png,two\nb/000.png,three\n")
    data = load(tmp_path)
    assert (data.class_names, data.train.labels.tolist()) == (("a", "b"), [0, 0, 1])
    assert data.left_out == ()
    assert rows(tmp_path, "text") == ["one", "two", "three"]


def test_pictures_that_are_not_listed_are_counted(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", {".": 5})
    lines = ["file_name,label", "003.png,1", "001.png,0", "gone.png,1", "003.png,0", "../x/000.png,0"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    data = load(folder)
    assert (values(data.train), data.train.labels.tolist()) == ([3, 1], [1, 0])
    assert data.left_out == (
        "2 lines of x/metadata.csv without a picture, such as gone.png",
        "1 line of x/metadata.csv that describe a picture again, such as 003.png",
        "3 pictures of 5 that x/metadata.csv says nothing of, such as x/000.png",
    )


def test_labels_of_the_file_win_over_folders_and_it_is_said(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", {"a": 1, "b": 1})
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a/000.png", "label": 1}\n\n{"file_name": "b/000.png", "label": 0, "more": 2}\n'
    )
    data = load(folder)
    assert data.train.labels.tolist() == [1, 0]
    assert data.left_out == (
        "the class folders a, b: the labels are those of column 'label' of x/metadata.jsonl; for labels by folder "
        "rename the column, or remove the file",
    )


def test_texts_arrive_as_a_column_of_texts(tmp_path: Path) -> None:
    write_classes(tmp_path, {".": 3})
    (tmp_path / "metadata.csv").write_text("file_name,label\n000.png,red\n001.png,NA\n002.png,blue\n")
    opened = open_splits(str(tmp_path)).train
    assert opened.features["label"].dtype == "string"
    assert rows(tmp_path, "label") == ["red", "NA", "blue"]


def test_metadata_of_parquet_keeps_the_names_of_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, {".": 3})
    features = datasets.Features(
        {"file_name": datasets.Value("string"), "label": datasets.ClassLabel(names=["dog", "cat"])}
    )
    columns = {"file_name": ["000.png", "001.png", "002.png"], "label": [0, 1, -1]}
    write_parquet(tmp_path / "metadata.parquet", columns, features)
    assert rows(tmp_path, "label") == ["dog", "cat", None]


def test_one_folder_of_described_pictures_is_no_class(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", {"images": 2, "masks": 2})
    (folder / "metadata.csv").write_text("file_name,text\nimages/000.png,one\nimages/001.png,two\n")
    data = load(folder)
    assert data.class_names == ()
    assert len(data.train) == 2
    assert "2 pictures of 4 that x/metadata.csv says nothing of, such as x/masks/000.png" in data.left_out


def test_metadata_of_one_split_only(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_classes(tmp_path / name, {"a": 1, "b": 1})
    described = tmp_path / "train" / "metadata.csv"
    described.write_text("file_name,text\na/000.png,one\nb/000.png,two\n")
    data = load(tmp_path, held_out_split="test")
    assert data.held_out.labels.tolist() == [0, 1]
    assert data.left_out == ("columns that not all splits have: text",)
    described.write_text("file_name,label\na/000.png,1\nb/000.png,0\n")
    with pytest.raises(DataError, match=r"/test/ has none; expected labels in both"):
        load(tmp_path, held_out_split="test")
    assert load(tmp_path).train.labels.tolist() == [1, 0]


def test_one_file_may_describe_all_splits(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_classes(tmp_path / name, {".": 2})
    lines = ["file_name,label", *(f"{name}/00{i}.png,{i}" for name in ("train", "test") for i in range(2))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    data = load(tmp_path, held_out_split="test")
    assert (data.train.labels.tolist(), data.held_out.labels.tolist()) == ([0, 1], [0, 1])
    assert data.left_out == ()


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("metadata.csv", "name,label\n000.png,1\n", "has the columns name, label; expected one file_name"),
        ("metadata.csv", "file_name,a,a\n000.png,1,1\n", "others of different names"),
        ("metadata.csv", "file_name,label\n000.png,1,2\n", "can't be read"),
        ("metadata.csv", "", "can't be read"),
        ("metadata.csv", "file_name,label\nother.png,1\n", "names no picture that is there"),
        ("metadata.csv", b"file_name,label\n\xff\xfe,1\n", "can't be read"),
        ("metadata.jsonl", "[" * 100_000, "nested too deeply"),
        ("metadata.jsonl", "[1]", "line 1 is damaged"),
        ("metadata.jsonl", '{"file_name": 3}', "is no text"),
        ("metadata.jsonl", '{"file_name": "000.png", "label": 1' + "0" * 30 + "}", "can't be read"),
        ("metadata.jsonl", '{"file_name": "000.png", "x": 1}\n{"file_name": "001.png", "x": "y"}', "can't be read"),
        ("metadata.parquet", "?", "can't be read"),
        ("dataset.json", "{", "damaged"),
        ("dataset.json", "{}", 'has no "labels"'),
        ("dataset.json", '{"labels": 3}', "damaged"),
        ("dataset.json", '{"labels": [["000.png", [0, 1]]]}', "damaged"),
        ("dataset.json", '{"labels": [["000.png", -1]]}', "damaged"),
    ],
)
def test_damaged_descriptions_are_named(tmp_path: Path, name: str, text: str | bytes, problem: str) -> None:
    write_classes(tmp_path, {".": 2})
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=problem) as error:
        load(tmp_path)
    assert name in str(error.value)


def test_columns_without_plain_values_are_told(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", {".": 1})
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png", "boxes": [{"x": 1}], "label": 0, "image": 1}')
    data = load(folder)
    assert data.train.labels.tolist() == [0]
    assert data.left_out == ("columns of x/metadata.jsonl without texts or numbers: boxes",)


# dataset.json


def write_edm(folder: Path, labels: list[int] | None) -> Path:
    """Four pictures of grey values 0..3 in two buckets."""
    names = [f"{number // 2:05}/img{number:08}.png" for number in range(4)]
    for number, name in enumerate(names):
        write_image(folder / name, number)
    pairs = labels and [list(pair) for pair in zip(names, labels, strict=False)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return folder


def test_labels_of_edm(tmp_path: Path) -> None:
    data = load(write_edm(tmp_path, [2, 0, 1, 2]))
    assert (values(data.train), data.train.labels.tolist()) == ([0, 1, 2, 3], [2, 0, 1, 2])
    assert data.class_names == ("0", "1", "2")
    assert data.left_out == ()


def test_edm_without_labels(tmp_path: Path) -> None:
    data = load(write_edm(tmp_path, None))
    assert (len(data.train), data.class_names) == (4, ())


def test_pictures_that_edm_does_not_label_are_counted(tmp_path: Path) -> None:
    data = load(write_edm(tmp_path / "x", [1, 0, 1]))
    assert data.train.labels.tolist() == [1, 0, 1]
    assert data.left_out == ("1 picture of 4 that x/dataset.json says nothing of, such as x/00001/img00000003.png",)


def test_edm_in_splits(tmp_path: Path) -> None:
    write_edm(tmp_path / "train", [0, 1, 0, 1])
    write_edm(tmp_path / "val", [1, 1, 0, 0])
    data = load(tmp_path, held_out_split="val")
    assert (data.train.labels.tolist(), data.held_out.labels.tolist()) == ([0, 1, 0, 1], [1, 1, 0, 0])


def test_nothing_is_written(tmp_path: Path) -> None:
    write_classes(tmp_path, {".": 1})
    (tmp_path / "metadata.csv").write_text("file_name,label\n000.png,0\n")
    before = sorted(tmp_path.rglob("*"))
    load(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
