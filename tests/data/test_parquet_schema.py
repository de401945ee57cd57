"""What parquet files state of their columns: other names of classes are refused, foreign metadata can do no harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from image_files import encoded, load, typed_columns, write_parquet

from itarflow.runtime.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_named(path: Path, names: list[str]) -> Path:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return write_parquet(path, typed_columns(2), features)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "label", "shown"),
    [
        (["b", "a"], 0, r"\[b, a\]"),
        (["a", "c"], 1, r"\[a, c\]"),
        (["a", "b", "c"], 2, r"\[a, b, c\]"),
    ],
)
def test_other_names_of_classes_are_refused(
    tmp_path: Path, streaming: bool, names: list[str], label: int, shown: str
) -> None:
    write_named(tmp_path / "train-00000-of-00002.parquet", ["a", "b"])
    write_named(tmp_path / "train-00001-of-00002.parquet", names)
    problem = rf"label {label} of column 'label' .*00001-of-00002.parquet' \({shown}\) than in .*00000.*\(\[a, b\]\)"
    with pytest.raises(DataError, match=problem):
        load(tmp_path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_names_in_another_split_are_refused_where_it_is_opened(tmp_path: Path, streaming: bool) -> None:
    write_named(tmp_path / "train.parquet", ["a", "b"])
    write_named(tmp_path / "test.parquet", ["b", "a"])
    with pytest.raises(DataError, match=r"test.parquet' \(\[b, a\]\)"):
        load(tmp_path, streaming=streaming, held_out_split="test")
    assert load(tmp_path, streaming=streaming).class_names == ("a", "b")
    assert load(tmp_path, streaming=streaming, split="test").class_names == ("b", "a")


def test_labels_with_and_without_names_are_not_mixed(tmp_path: Path) -> None:
    write_named(tmp_path / "0.parquet", ["a", "b"])
    write_parquet(tmp_path / "1.parquet", {"image": [{"bytes": encoded(1), "path": None}], "label": [0]})
    with pytest.raises(DataError, match=r"1.parquet' \(\[\]\)"):
        load(tmp_path)


def write_stating(path: Path, stated: Any) -> Path:
    table = pa.table({"image": [encoded(1)] * 2, "label": [0, 1]})
    text = stated if isinstance(stated, str) else json.dumps(stated)
    pq.write_table(table.replace_schema_metadata({b"huggingface": text.encode()}), path)
    return path


LABEL = {"_type": "ClassLabel"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("stated", "problem"),
    [
        ("{", "damaged"),
        ([], "damaged"),
        ("[" * 100_000, "nested too deeply"),
        ({"info": []}, None),
        ({"info": [1]}, "damaged"),
        ({"info": {"features": [{"_type": "Value"}]}}, "damaged"),
        ({"info": {"features": {"label": 3}}}, "can't be understood"),
        ({"info": {"features": {"label": {"_type": "Unknown"}}}}, "can't be understood"),
        ({"info": {"features": {"label": {"_type": "Value", "dtype": "no"}}}}, "can't be understood"),
        ({"info": {"features": {"label": LABEL | {"num_classes": 10**12}}}}, "names of classes is damaged"),
        ({"info": {"features": {"label": LABEL | {"names_file": "/etc/passwd"}}}}, "to a file"),
        ({"info": {"features": {"label": LABEL | {"names": [1, 2]}}}}, "names of classes is damaged"),
        ({"info": {"features": {"label": LABEL | {"names": ["a", "a"]}}}}, "can't be understood"),
        ({"info": {"features": {"a": {"b": [LABEL | {"names_file": "/etc/passwd"}]}}}}, "to a file"),
        ({"info": {"features": None}}, None),
        ({}, None),
    ],
)
def test_foreign_metadata(tmp_path: Path, streaming: bool, stated: Any, problem: str | None) -> None:
    file = write_stating(tmp_path / "a.parquet", stated)
    if problem is None:
        assert len(load(file, streaming=streaming).train) == 2
        return
    with pytest.raises(DataError, match=problem) as error:
        load(file, streaming=streaming)
    assert "a.parquet: what it states of its columns" in str(error.value)


def test_deep_features_are_refused(tmp_path: Path) -> None:
    deep: Any = {"_type": "Value", "dtype": "int64"}
    for _ in range(400):
        deep = {"x": deep}
    with pytest.raises(DataError, match=r"a\.parquet: .*(nested too deeply|understood)"):
        load(write_stating(tmp_path / "a.parquet", {"info": {"features": {"label": deep}}}))
