"""Files of rows: full row groups, what was left out, and notes; whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from torch.utils.data import Dataset

from itarflow.data.dataset import ImageDataset
from itarflow.data.prepare.shards import (
    Reader,
    Shard,
    plan_shards,
    read_ahead,
    read_contents,
    show_shards,
    stored_files,
    write_shard,
)
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import file_sha256, folder_lock

FEATURES = datasets.Features({"value": datasets.Value("int64")})


def shard(folder: Path, count: int) -> Shard:
    return plan_shards(folder, {"train": count}, count, {})[0]


def test_each_row_lies_in_one_file(tmp_path: Path) -> None:
    shards = plan_shards(tmp_path, {"train": 7, "test": 2, "none": 0}, 3, {})
    assert [(one.path.name, list(one.rows)) for one in shards] == [
        ("train-00000-of-00003.parquet", [0, 1, 2]),
        ("train-00001-of-00003.parquet", [3, 4, 5]),
        ("train-00002-of-00003.parquet", [6]),
        ("test-00000-of-00001.parquet", [0, 1]),
    ]


def test_row_groups_are_full_whatever_is_left_out(tmp_path: Path) -> None:
    one = shard(tmp_path, 300)
    rows = [f"row {row}: broken" if row == 5 else {"value": row, "other": 0} for row in one.rows]
    content = write_shard(one, FEATURES, rows, lambda: {"sums": [0.1, 2]})
    assert (content.images, content.broken, content.notes) == (299, ("row 5: broken",), {"sums": [0.1, 2]})
    assert content.path == one.hidden(file_sha256(content.path))
    footer = pq.read_metadata(content.path)
    assert [footer.row_group(index).num_rows for index in range(3)] == [128, 128, 43]
    assert pq.read_table(content.path)["value"].to_pylist() == [row for row in range(300) if row != 5]
    assert read_contents([one], {}) == {one: content}
    recorded = stored_files({one: content})
    show_shards({one: content})
    assert read_contents([one], {}, recorded) == {one: replace(content, path=one.path)}
    assert os.listdir(tmp_path) == ["train-00000-of-00001.parquet"]


def test_a_file_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Any:
        yield from ({"value": row} for row in range(200))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(shard(tmp_path, 300), FEATURES, rows())
    assert os.listdir(tmp_path) == []


class _Rows(Dataset[tuple[str, int]]):
    def __getitem__(self, place: tuple[str, int]) -> tuple[str, int]:
        return place


def test_no_batch_lies_in_two_files(tmp_path: Path) -> None:
    shards = plan_shards(tmp_path, {"train": 5, "test": 1}, 3, {})
    state = torch.get_rng_state()
    batches = read_ahead(_Rows(), shards, batch_size=2, num_workers=0)
    assert list(batches) == [[("train", 0), ("train", 1)], [("train", 2)], [("train", 3), ("train", 4)], [("test", 0)]]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_worker_that_dies_with_a_batch_in_hand_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(_loader: Any) -> Iterator[Any]:
        yield []
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr("itarflow.data.prepare.shards.without_alarm", dying)
    with pytest.raises(DataError, match=r"died \(Connection reset.* fewer num_workers"):
        list(read_ahead(_Rows(), plan_shards(tmp_path, {"train": 5}, 3, {}), batch_size=2, num_workers=0))


def test_two_commands_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "out"):
        with pytest.raises(DataError, match="is being written by another command"), folder_lock(tmp_path / "out"):
            pass
        (tmp_path / "out" / "file").touch()
    with folder_lock(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    with folder_lock(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ("{root}/cat/1.png: broken", "cat/1.png: broken"),
        ("/elsewhere/of mine/1.png: no file '/elsewhere/of mine/1.png'", "1.png: no file '1.png'"),
        ("zip://cat/1.png::/home/me/cache/a.zip: broken", "zip://cat/1.png: broken"),
        ("row 3: no image", "row 3: no image"),
    ],
)
def test_reports_name_no_folder_of_this_machine(report: str, told: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    class Broken:
        def read(self, row: int) -> str:
            return report.format(root=tmp_path / "pictures")

    for source in (str(tmp_path / "pictures"), "../pictures"):
        assert Reader({"train": cast(ImageDataset, Broken())}, source)["train", 0] == told
