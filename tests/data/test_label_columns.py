"""Columns of images and labels: the right one is found, and labels that are no classes are refused when opened."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_files import encoded, load, values, write_parquet

from itarflow.data import DataConfig
from itarflow.data.labels import read_labels
from itarflow.data.load import load_splits
from itarflow.runtime.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, labels: list[Any], kind: Any = None, **more: Any) -> Path:
    """Parquet file whose images have grey values 0, 1, ..., and that may state wrong labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(value % 256), "path": None} for value in range(len(labels))]
    if kind is None:
        pq.write_table(pa.table({"image": images, "label": labels} | more), path, row_group_size=4)
        return path
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = pa.Table.from_pydict({"image": images, "label": labels}, features.arrow_schema)
    pq.write_table(rows, path, row_group_size=4)
    return path


def names(*classes: str) -> datasets.ClassLabel:
    return datasets.ClassLabel(names=list(classes))


def table(labels: Any, kind: Any) -> datasets.Dataset:
    return datasets.Dataset(pa.table({"label": labels}, datasets.Features({"label": kind}).arrow_schema))


# Columns


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"bytes": data, "path": None}])
def test_parquet_of_other_writers(tmp_path: Path, wrap: Callable[[bytes], Any]) -> None:
    columns = {"pic": [wrap(encoded(value)) for value in range(4)], "label": pa.array([0, 2, None, 1])}
    data = load(write_parquet(tmp_path / "any.parquet", columns))
    assert values(data.train) == [0, 1, 2, 3]
    assert data.class_names == ("0", "1", "2")
    assert data.train.labels.tolist() == [0, 2, -1, 1]


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
    columns = {"image": images, "label": [True, False], "negative": [-1, 0], "half": [0.5, 1.0]}
    file = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=r"'label' is Value.'bool'.*ClassLabel"):
        load(file, label_column="label")
    with pytest.raises(DataError, match="'half'"):
        load(file, label_column="half")
    with pytest.raises(DataError, match="'gone' is missing"):
        load(file, label_column="gone")
    with pytest.raises(DataError, match="'negative' holds -1"):
        load(file, label_column="negative")
    with pytest.raises(DataError, match=r"image_column 'half' has no images.*image"):
        load(file, image_column="half")
    with pytest.warns(UserWarning, match=r"'label'.*unlabelled"):
        assert load(file).class_names == ()
    with pytest.raises(DataError, match="no column of type Image among"):
        load(write_parquet(tmp_path / "b.parquet", {"text": ["a"]}))


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        (("mask", "image"), "image"),
        (("conditioning_image", "pixel_values"), "pixel_values"),
        (("png", "jpg"), "jpg"),
        (("depth", "img", "photo"), "img"),
        (("anything",), "anything"),
        (("source", "target"), None),
    ],
)
def test_of_several_images_the_usual_name_is_taken(
    tmp_path: Path, columns: tuple[str, ...], taken: str | None, typed: bool
) -> None:
    features = datasets.Features(dict.fromkeys(columns, datasets.Image())) if typed else None
    rows: dict[str, Any] = {
        name: [{"bytes": encoded(number), "path": None} if typed else encoded(number)]
        for number, name in enumerate(columns)
    }
    file = write_parquet(tmp_path / "a.parquet", rows, features)
    if taken is None:
        with pytest.raises(DataError, match=r"\[source, target\] all hold images.*image_column"):
            load(file)
        assert values(load(file, image_column="target").train) == [1]
    else:
        data = load(file)
        assert values(data.train) == [columns.index(taken)]
        assert data.identity.columns == {"image": taken}


# Text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_becomes_classes_in_the_order_of_their_names(tmp_path: Path, streaming: bool, kind: pa.DataType) -> None:
    labels = pa.array(["red", "blue", None, "", "red", "a b"], pa.string()).cast(kind)
    data = load(write(tmp_path / "a.parquet", labels), streaming=streaming)
    assert data.class_names == ("a b", "blue", "red")
    assert data.train.labels.tolist() == [2, 1, -1, -1, 2, 0]
    assert data.identity.class_counts == (1, 1, 2)
    assert data.identity.columns == {"image": "image", "label": "label"}


def test_text_has_the_same_classes_in_all_parts(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ["b", "c", "b"])
    write(tmp_path / "test.parquet", ["c", "a"])
    data = load(tmp_path, held_out_split="test")
    assert data.class_names == ("a", "b", "c")
    assert (data.train.labels.tolist(), data.held_out.labels.tolist()) == ([1, 2, 1], [2, 0])


def test_text_that_says_something_of_each_image_is_no_class() -> None:
    rows = table([f"a picture of number {row}" for row in range(2000)], datasets.Value("string"))
    with pytest.raises(DataError, match="2,000 different texts in 2,000 images"):
        read_labels({"train": rows}, "label", wanted=True)
    with pytest.warns(UserWarning, match="unlabelled: .*2,000 different texts"):
        assert read_labels({"train": rows}, "label", wanted=False).names == ()


# Numbers


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["int64", "uint64", "int32"])
def test_ids_are_no_classes(tmp_path: Path, streaming: bool, kind: str) -> None:
    ids = pa.array([1440764, 2102040, 13133613, 1440764] * 3, kind)
    file = write(tmp_path / "train.parquet", ids)
    with pytest.raises(DataError, match=r"3 different values, 1440764 to 13133613 .*row 2.*renumber them"):
        load(file, label_column="label", streaming=streaming)
    with pytest.warns(UserWarning, match="unlabelled: .*3 different values"):
        data = load(file, streaming=streaming)  # such as to train without labels
    assert data.class_names == ()
    assert set(data.train.labels.tolist()) == {-1}
    assert data.identity.columns == {"image": "image"}
    assert "3 different values, 1440764 to 13133613" in data.identity.left_out[0]


@pytest.mark.parametrize(
    "labels", [[2**64 - 1, 0], [-(2**63), 0], [2**40, 5], [1700000000, 1700000001], [2**30, *range(10)]]
)
def test_numbers_of_any_size_cost_no_memory(labels: list[int]) -> None:
    rows = datasets.Dataset(
        pa.table({"label": pa.array(map(int, labels), "uint64" if max(labels) > 2**63 else "int64")})
    )
    tracemalloc.start()
    with pytest.raises(DataError, match=f"{len(labels)} different values"):
        read_labels({"train": rows}, "label", wanted=True)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_of_many_ids_not_all_are_counted() -> None:
    rows = datasets.Dataset(pa.table({"label": pa.array(np.arange(10**6 + 5) + 10**8)}))
    with pytest.raises(DataError, match="at least 1,000,000 different values"):
        read_labels({"train": rows}, "label", wanted=True)
    few = datasets.Dataset(pa.table({"label": pa.array(np.arange(10**6 + 5) % 7, "int8")}))
    assert read_labels({"train": few, "test": rows.select([])}, "label", wanted=True).names == tuple("0123456")


@given(st.lists(st.none() | st.integers(0, 300), min_size=1, max_size=30))
def test_numbers_are_classes_from_0_to_the_largest(labels: list[int | None]) -> None:
    found = read_labels({"train": table(labels, datasets.Value("int64"))}, "label", wanted=True)
    assert found.classes["train"].tolist() == [-1 if label is None else label for label in labels]
    assert found.names == tuple(map(str, range(max((label for label in labels if label is not None), default=-1) + 1)))


def test_negative_numbers_are_refused_with_their_place(tmp_path: Path) -> None:
    file = write(tmp_path / "train.parquet", [0, 1, 2, 1, 0, -3, 1])
    with pytest.raises(DataError, match="'label' holds -3 in row 5 of split 'train'"):
        load(file)
    with pytest.raises(DataError, match=r"'label' holds -3 in .*train\.parquet, row 5"):
        load(file, streaming=True)


# Numbers with names


@pytest.mark.parametrize("wrong", [3, 57, -2, 2**30])
@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_that_have_no_name_are_refused_when_opened(tmp_path: Path, wrong: int, part: str) -> None:
    for name in ("train", "test"):
        labels = [row % 3 for row in range(12)]
        if name == part:
            labels[9] = wrong
        write(tmp_path / f"{name}.parquet", labels, names("a", "b", "c"))
    said = rf"'label' holds {wrong} in .*row 9.*ClassLabel has 3 names \(0 \.\. 2\)"
    with pytest.raises(DataError, match=said) as refused:
        load(tmp_path, held_out_split="test")
    assert repr(part) in str(refused.value)
    with pytest.raises(DataError, match=said) as refused:
        load(tmp_path, held_out_split="test", streaming=True)
    assert f"{part}.parquet, row 9" in str(refused.value)
    with pytest.raises(DataError, match=said):
        load_splits(DataConfig(path=str(tmp_path)), ["train", "test"], image_size=8, in_channels=3)


def test_labels_of_another_split_are_found_by_their_names() -> None:
    train = table([0, 1, 2], names("a", "b", "c"))
    test = table([0, 1, 2, -1], names("c", "a", "b"))
    found = read_labels({"train": train, "test": test}, "label", wanted=False)
    assert found.names == ("a", "b", "c")
    assert found.classes["test"].tolist() == [2, 0, 1, -1]


@given(st.permutations(list("abcd")), st.lists(st.integers(-1, 3), min_size=1, max_size=20))
def test_each_image_keeps_the_class_that_its_own_part_names(order: list[str], labels: list[int]) -> None:
    parts = {"train": table([0], names(*"abcd")), "test": table(labels, names(*order))}
    found = read_labels(parts, "label", wanted=False)
    for label, now in zip(labels, found.classes["test"].tolist(), strict=True):
        assert (now == -1) if label == -1 else (found.names[now] == order[label])


def test_classes_that_are_not_trained_are_refused_if_they_are_used() -> None:
    train = table([0, 1], names("a", "b"))
    unused = table([0, 0], names("b", "new"))
    assert read_labels({"train": train, "test": unused}, "label", wanted=False).classes["test"].tolist() == [1, 1]
    with pytest.raises(DataError, match="test has classes that train doesn't know: new"):
        read_labels({"train": train, "test": table([1, 0], names("b", "new"))}, "label", wanted=False)


def test_parts_that_label_in_other_ways_are_refused(tmp_path: Path) -> None:
    kinds = [table([0], names("a")), table([0], datasets.Value("int64")), table(["a"], datasets.Value("string"))]
    for one, other in itertools.permutations(kinds, 2):
        with pytest.raises(DataError, match=r"expected the same"):
            read_labels({"train": one, "test": other}, "label", wanted=False)
    write(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", {"image": [{"bytes": encoded(1), "path": None}]})
    with pytest.raises(DataError, match=r"held_out_split 'test' has no column 'label'"):
        load(tmp_path, held_out_split="test", streaming=True)
    write_parquet(tmp_path / "test.parquet", {"pic": [{"bytes": encoded(1), "path": None}], "label": [1]})
    with pytest.raises(DataError, match=r"held_out_split 'test' has no column 'image'"):
        load(tmp_path, held_out_split="test", streaming=True)


def test_two_classes_of_one_name_are_refused() -> None:
    label = names("a", "b")
    label.names = ["a", "a"]
    rows = table([0, 1], names("a", "b"))
    rows._info.features = datasets.Features({"label": label})
    with pytest.raises(DataError, match="two classes 'a'"):
        read_labels({"train": rows}, "label", wanted=False)


def test_held_out_images_are_in_proportion_even_of_ids(tmp_path: Path) -> None:
    file = write(tmp_path / "train.parquet", [1440764] * 20 + [13133613] * 20)
    with pytest.warns(UserWarning, match="unlabelled"):
        held_out = load(file, held_out_images=4).held_out
    assert torch.equal(held_out.indices, torch.tensor([5, 15, 25, 35]))
