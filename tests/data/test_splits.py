"""Splits by the names of parquet files; those of folders are in test_folders."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from image_files import TYPED, load, typed_columns, values, write_parquet

from itarflow.runtime.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("x") / "cache")


@pytest.mark.parametrize(
    "name",
    ["mnist_{}.parquet", "flowers-{}-00000-of-00001.parquet", "a b {}.parquet", "flowers_{}-00000-of-00001.parquet",
     "{}-2.parquet", "set_{}/x.parquet", "Data/{}.PARQUET"],
)  # fmt: skip
def test_split_anywhere_in_the_name_of_a_file(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / name.format("train"), typed_columns(3), TYPED)
    write_parquet(tmp_path / name.format("Test"), typed_columns(2, 10), TYPED)
    data = load(tmp_path, held_out_split="test")
    assert (values(data.train), values(data.held_out)) == ([0, 1, 2], [10, 11])


def test_shards_of_other_splits_stay_apart(tmp_path: Path) -> None:
    for count, name in enumerate(("train", "train_extra", "extra"), 1):
        write_parquet(tmp_path / f"{name}-00000-of-00001.parquet", typed_columns(count), TYPED)
    assert [len(load(tmp_path, split=name).train) for name in ("train", "train_extra", "extra")] == [1, 2, 3]


def test_name_of_two_splits_is_none(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train_and_test.parquet", typed_columns(1), TYPED)
    write_parquet(tmp_path / "train.parquet", typed_columns(1), TYPED)
    with pytest.raises(DataError, match=r"train_and_test\.parquet' is of no split"):
        load(tmp_path)


def test_usual_names_of_splits_in_parquet_and_digits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "training.parquet", typed_columns(2), TYPED)
    write_parquet(tmp_path / "valid.parquet", typed_columns(1, 5), TYPED)
    for streaming in (False, True):
        data = load(tmp_path, held_out_split="validation", streaming=streaming)
        assert (values(data.train), values(data.held_out)) == ([0, 1], [5])
    assert len(load("digits", split="training", in_channels=1).train) == 1797
