"""Images that are no plain folder and no parquet file are opened, or it is said what they are and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest
from image_files import TYPED, damage, load, typed_columns, values, write_classes

from itarflow.runtime.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("x.zip", "a zip archive: unpack it"),
        ("x.tar", "a tar archive: unpack it.*webdataset"),
        ("x.tar.gz", "packed by gzip: unpack it"),
        ("x.NPZ", r"NumPy's arrays, such as ADM's.*Image.fromarray"),
        ("x.arrow", r"an Arrow file.*to_parquet"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_bytes(b"?")
    for path in (tmp_path, tmp_path / name, tmp_path / "x*"):
        with pytest.raises(DataError, match=advice):
            load(path)


def test_an_archive_beside_pictures_is_told(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", {"a": 1})
    (folder / "x.zip").write_bytes(b"?")
    assert load(folder).left_out == ("1 file of an unknown kind (1 .zip) in x/, such as x/x.zip",)


def saved(folder: Path) -> Path:
    tables = {
        name: datasets.Dataset.from_dict(typed_columns(count, first), TYPED)
        for name, count, first in (("train", 3, 0), ("test", 2, 10))
    }
    datasets.DatasetDict(tables).save_to_disk(str(folder))
    return folder


def test_folder_of_save_to_disk_is_opened(tmp_path: Path) -> None:
    data = load(saved(tmp_path), held_out_split="test")
    assert (values(data.train), values(data.held_out)) == ([0, 1, 2], [10, 11])
    assert data.class_names == ("a", "b")
    assert values(load(tmp_path / "test").train) == [10, 11]
    with pytest.raises(DataError, match=r"no split 'val'; use one of test, train"):
        load(tmp_path, held_out_split="val")


def test_folder_of_save_to_disk_that_is_damaged(tmp_path: Path) -> None:
    folder = saved(tmp_path) / "train"
    state = json.loads((folder / "state.json").read_text())
    arrow = folder / state["_data_files"][0]["filename"]
    for text, problem in [
        ("[" * 100_000, r"state\.json is damaged"),
        ("{}", r"state\.json is damaged"),
        (json.dumps({"_data_files": [{"filename": "../x.arrow"}]}), "is no file of that folder"),
        (json.dumps({"_data_files": [{"filename": "/etc/passwd"}]}), "is no file of that folder"),
        (json.dumps({"_data_files": state["_data_files"]}), "can't be read as save_to_disk writes it"),
    ]:
        (folder / "state.json").write_text(text)
        with pytest.raises(DataError, match=problem):
            load(tmp_path)
    (folder / "state.json").write_text(json.dumps(state))
    whole = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text('{"features": {"label": {"_type": "ClassLabel", "names_file": "/x"}}}')
    with pytest.raises(DataError, match="names of classes to a file"):
        load(tmp_path)
    (folder / "dataset_info.json").write_text(whole)
    damage(arrow)
    with pytest.raises(DataError, match="can't be read as save_to_disk writes it"):
        load(tmp_path)
    arrow.unlink()
    os.mkfifo(arrow)
    with pytest.raises(DataError, match="is no file of that folder"):
        load(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "gone"]}')
    with pytest.raises(DataError, match="lacks the split 'gone'"):
        load(tmp_path)
