"""Streamed tables have the rows of the files, few at a time, and the order visits each image once."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import datasets
import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from image_files import TYPED, encoded, typed_columns, write_row_groups

from itarflow.data import parquet as streaming
from itarflow.data.order import StreamedEpoch, num_streams, window_size
from itarflow.data.parquet import ParquetRows, concatenate, open_parquet
from itarflow.runtime.errors import DataError
from itarflow.runtime.seeds import permutation


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """25 rows in row groups of 4, 4, 2 and 4, 4, 4, 3."""
    return [
        str(write_row_groups(tmp_path / "a.parquet", 10, 4)),
        str(write_row_groups(tmp_path / "b.parquet", 15, 4, first=10)),
    ]


def images(rows: ParquetRows) -> list[bytes]:
    return [rows[index]["image"]["bytes"] for index in range(len(rows))]


# Tables


def test_rows_are_those_of_the_files(files: list[str]) -> None:
    rows = open_parquet(files)
    assert len(rows) == 25
    assert rows.features == TYPED
    assert rows.group_starts.tolist() == [0, 4, 8, 10, 14, 18, 22, 25]
    assert rows.largest_group == 4
    assert images(rows) == [encoded(value) for value in range(25)]
    assert rows[12] == {"image": {"bytes": encoded(12), "path": "2.png"}, "label": 0}
    for index in (-1, 25):
        with pytest.raises(IndexError, match=f"row {index} .* 25 rows"):
            rows[index]


def test_plain_bytes_are_images_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"pic": [encoded(1), None]}), tmp_path / "a.parquet")
    rows = open_parquet([str(tmp_path / "a.parquet")])
    assert [rows[0], rows[1]] == [{"pic": {"bytes": encoded(1), "path": None}}, {"pic": None}]


def test_columns_are_read_alone_and_in_order(files: list[str]) -> None:
    rows = open_parquet(files)
    assert rows.column("label").to_pylist() == [value % 2 for value in [*range(10), *range(15)]]
    assert rows.resident == (0, 0)
    assert list(rows.select_columns(["image"])[3]) == ["image"]


@pytest.mark.parametrize("part", [range(25), range(3, 11), range(9, 10), range(5, 5), range(10, 25)])
def test_parts_of_a_table(files: list[str], part: range) -> None:
    rows = open_parquet(files).select(part)
    assert len(rows) == len(part)
    assert images(rows) == [encoded(value) for value in part]
    if part:
        labels = [value % 2 for value in [*range(10), *range(15)]]
        assert rows.column("label").to_pylist() == labels[part.start : part.stop]


def test_tables_one_after_another(files: list[str]) -> None:
    rows = open_parquet(files)
    joined = concatenate([rows.select(range(20, 25)), rows.select(range(2, 6)), open_parquet(files[:1])])
    expected = [*range(20, 25), *range(2, 6), *range(10)]
    assert images(joined) == [encoded(value) for value in expected]
    assert images(joined.select(range(3, 12))) == [encoded(value) for value in expected[3:12]]
    assert len(joined.column("label")) == len(expected)
    with pytest.raises(DataError, match="differ in their columns"):
        concatenate([rows, rows.select_columns(["image"])])


def test_row_groups_in_memory_are_bounded(files: list[str]) -> None:
    one, some = open_parquet(files), open_parquet(files).keeping(9)
    for rows, limit in ((one, 4), (some, 9)):
        for index in np.random.default_rng(0).permutation(25).tolist():
            assert rows[index]["image"]["bytes"] == encoded(index)
            assert rows.resident[1] <= limit
    for index in (0, 4, 1, 8):
        some[index]
    assert some.resident == (2, 6)  # of the groups 0..3, 4..7 and 8..9 the one that was used longest ago is gone


def test_pickles_hold_no_rows(files: list[str]) -> None:
    rows = open_parquet(files).keeping(25)
    before = len(pickle.dumps(rows))
    found = images(rows)
    copied = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows)) == before
    assert copied.resident == (0, 0)
    assert images(copied) == found


def test_files_elsewhere(tmp_path: Path) -> None:
    local = write_row_groups(tmp_path / "a.parquet", 5, 2)
    fsspec.filesystem("memory").pipe("/set [1]/a.parquet", local.read_bytes())
    rows = open_parquet(["memory://set [1]/a.parquet"])
    assert images(rows) == [encoded(value) for value in range(5)]
    assert rows.column("label").to_pylist() == [0, 1, 0, 1, 0]
    with pytest.raises(DataError, match=r"memory://gone\.parquet'"):
        open_parquet(["memory://gone.parquet"])


def test_damaged_row_group_is_named_by_file_and_row(files: list[str]) -> None:
    metadata = pq.read_metadata(files[1])
    content = bytearray(Path(files[1]).read_bytes())
    start = metadata.row_group(1).column(0).data_page_offset
    content[start : start + 40] = b"\xff" * 40
    Path(files[1]).write_bytes(content)
    rows = open_parquet(files).select(range(1, 25)).select_columns(["image"])
    for index in (13, 16):  # rows 4 and 7 of the second file, whose first row is row 10 of all
        with pytest.raises(DataError, match=rf"b\.parquet, row {index + 1 - 10}: "):
            rows[index]
    assert rows[12]["image"]["bytes"] == encoded(13)
    assert rows[17]["image"]["bytes"] == encoded(18)


def test_damaged_labels_are_refused_by_name(files: list[str]) -> None:
    chunk = pq.read_metadata(files[0]).row_group(0).column(2)
    content = bytearray(Path(files[0]).read_bytes())
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    content[begin : begin + 20] = b"\xff" * 20
    Path(files[0]).write_bytes(content)
    with pytest.raises(DataError, match=r"'label' of .*a\.parquet'"):
        open_parquet(files).column("label")


def test_files_cut_short_or_of_other_columns_are_refused(files: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"image": [b""]}), other)
    with pytest.raises(DataError, match=r"other\.parquet' .*'label'"):
        open_parquet([*files, str(other)])
    Path(files[1]).write_bytes(Path(files[1]).read_bytes()[:-100])
    with pytest.raises(DataError, match=r"b\.parquet' is not"):
        open_parquet(files)


def test_types_may_come_from_elsewhere(tmp_path: Path) -> None:
    columns = typed_columns(3)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert open_parquet([str(tmp_path / "a.parquet")], TYPED).features == TYPED
    assert not isinstance(open_parquet([str(tmp_path / "a.parquet")]).features["label"], datasets.ClassLabel)


def test_large_row_groups_are_told(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_LARGE_GROUP", 100)
    with pytest.warns(UserWarning, match="row groups of up to 0.0 GB"):
        open_parquet(files[:1])


def test_many_files_have_a_bar(
    files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_parquet(files)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(streaming, "_MANY_FILES", 2)
    open_parquet(files).column("label")
    shown = capsys.readouterr().err
    assert "reading the ends of 2 parquet files" in shown
    assert "reading 'label' of 2 parquet files" in shown


# Order


@pytest.mark.parametrize(
    ("groups", "batch_size", "shuffle_buffer"),
    [
        ([1], 1, 1),
        ([0, 2], 24, 20),
        ([7], 3, 10_000),
        ([3] * 9, 8, 20),
        ([3] * 9, 1000, 1),
        ([5, 0, 11, 1, 40], 4, 1),
        ([5, 0, 11, 1, 40], 24, 20),
        ([5, 0, 11, 1, 40], 64, 10_000),
        ([100, 1, 1], 24, 1),
        ([100, 1, 1], 64, 20),
    ],
)
def test_each_image_once(groups: list[int], batch_size: int, shuffle_buffer: int) -> None:
    options = {"batch_size": batch_size, "shuffle_buffer": shuffle_buffer, "seed": 3}
    epochs = [StreamedEpoch(np.array(groups), **options, epoch=epoch) for epoch in (0, 1)]
    found = [epoch[0 : sum(groups)].tolist() for epoch in epochs]
    assert len(epochs[0]) == sum(groups)
    assert [sorted(indices) for indices in found] == [list(range(sum(groups)))] * 2
    assert found[0] != found[1] or sum(groups) < 8 or (len(groups) < 4 and shuffle_buffer == 1)
    cuts = [0, *(cut for cut in (1, 5, 30) if cut < sum(groups)), sum(groups)]
    pieces = [epochs[0][begin:end].tolist() for begin, end in itertools.pairwise(cuts)]
    assert list(itertools.chain(*pieces)) == found[0]


def test_streams_have_fixed_places_in_a_batch_and_read_few_row_groups() -> None:
    """Each eighth of the batches runs through its own eighth of the row groups, a window at a time."""
    epoch = StreamedEpoch(np.full(64, 10), batch_size=16, shuffle_buffer=160, seed=0, epoch=0)
    order = epoch[0:640].reshape(40, 8, 2) // 10  # row groups by batch, stream, place
    streams = [set(order[:, stream].flatten().tolist()) for stream in range(8)]
    assert [len(groups) for groups in streams] == [8] * 8
    assert set.union(*streams) == set(range(64))
    for window in range(4):  # of 20 images: two row groups
        assert len(set(order[window * 10 : window * 10 + 10, 0].flatten().tolist())) == 2


def test_windows_mix_their_images() -> None:
    epoch = StreamedEpoch(np.array([1000]), batch_size=1, shuffle_buffer=100, seed=0, epoch=0)
    indices = epoch[0:1000].reshape(10, 100)
    for number, window in enumerate(indices):
        assert sorted(window.tolist()) == list(range(number * 100, number * 100 + 100))
        assert abs(np.corrcoef(window, np.arange(100))[0, 1]) < 0.4


def test_order_is_stable_across_versions() -> None:
    groups, pinned = np.array([3, 2, 4, 3]), [3, 7, 1, 9, 4, 6, 0, 10, 5, 8, 2, 11]
    first = StreamedEpoch(groups, batch_size=4, shuffle_buffer=8, seed=1, epoch=0)
    assert first[0:12].tolist() == pinned
    assert StreamedEpoch(groups, batch_size=4, shuffle_buffer=8, seed=2, epoch=0)[0:12].tolist() != pinned
    assert permutation("itarflow epoch 1 0", 8).tolist() == [2, 5, 1, 3, 0, 4, 7, 6]


@pytest.mark.parametrize(("batch_size", "streams"), [(1, 1), (3, 1), (6, 2), (12, 4), (256, 8)])
def test_streams_and_windows(batch_size: int, streams: int) -> None:
    assert num_streams(batch_size) == streams
    assert window_size(batch_size, 800) == 800 // streams
    assert window_size(batch_size, 1) == 1


def test_large_sets_cost_nothing_until_asked() -> None:
    epoch = StreamedEpoch(np.full(10_000, 10_000), batch_size=256, shuffle_buffer=8192, seed=0, epoch=0)
    assert len(set(epoch[77_000_000:77_000_256].tolist())) == 256
    assert epoch._shuffled.cache_info().currsize <= 16


@pytest.mark.parametrize(
    "stated",
    [
        "",
        "{",
        "[" * 100_000,
        "3",
        '{"info": 3}',
        '{"info": {"features": [1]}}',
        '{"info": {"features": {"label": {"_type": "Nothing"}}}}',
        '{"info": {"features": {"label": {"_type": "Value", "dtype": "q"}}}}',
        '{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}',
    ],
)
def test_what_a_file_states_of_its_columns_may_be_anything(tmp_path: Path, stated: str) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"label": [0, 1]}).replace_schema_metadata({"huggingface": stated}), file)
    with pytest.raises(DataError, match=r"a\.parquet: what it states of its columns"):
        open_parquet([str(file)])


def test_footers_that_say_otherwise_than_the_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"label": [0, 1, 2]}), tmp_path / "a.parquet")
    rows = open_parquet([str(tmp_path / "a.parquet")])
    rows._pieces["rows"] = rows._pieces["group_rows"] = 5
    with pytest.raises(DataError, match=r"a\.parquet' cannot be read: it has 3 rows, but its footer says 5"):
        rows.column("label")
