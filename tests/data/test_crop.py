"""Prepared folders: they train like their source, go on where they were stopped, and refuse what would spoil them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from image_files import TYPED, damage, load, typed_columns, write_classes, write_one_broken, write_parquet
from PIL import Image
from torch import Tensor

from itarflow.data.dataset import ImageDataset
from itarflow.data.prepare.crop import PrepareConfig, Prepared, prepare
from itarflow.runtime.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of three images in two classes."""
    return write_classes(tmp_path / "source", {"a": 2, "b": 1})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are read, as they are read."""
    rows: list[int] = []
    _watch(monkeypatch, rows.append)
    return rows


def _watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[int], Any]) -> None:
    original = ImageDataset.read

    def read(self: ImageDataset, index: int) -> Tensor | str:
        see(index)
        return original(self, index)

    monkeypatch.setattr(ImageDataset, "read", read)
    monkeypatch.setattr("itarflow.data.prepare.crop._TASK", 1)  # nothing is read ahead


HIDDEN = re.compile(r"\.train-0000\d-of-0000\d\.[0-9a-f]{64}\.parquet")
"""Names of files that are whole while others are not."""


def write_pictures(folder: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """JPEGs of noise, of several sizes and modes, in one sub-folder a class."""
    generator = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            height, width = generator.integers(9, 40, size=2)
            pixels = generator.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            (image.convert("L") if index % 3 == 2 else image).save(folder / name / f"{index}.jpg")
    return folder


def run(source: Path | str, out: Path, **options: Any) -> Prepared:
    return prepare(PrepareConfig(str(source), out, **{"size": 8, "num_workers": 0} | options))


def same(source: Path | str, out: Path, **options: Any) -> bool:
    """Whether training sees the same in both places."""
    first, second = load(source, **options), load(out, **options)
    assert first.class_names == second.class_names
    for one, other in ((first.train, second.train), (first.held_out, second.held_out)):
        assert one.labels.tolist() == other.labels.tolist()
        assert all(torch.equal(one[index].image, other[index].image) for index in range(len(one)))
    return True


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


# What is written


@pytest.mark.parametrize("crop", ["center", "adm", "edm"])
def test_trains_as_its_source(tmp_path: Path, crop: str) -> None:
    source = write_pictures(tmp_path / "source", {"dog": 4, "cat": 3})
    prepared = run(source, tmp_path / "out", crop=crop, shard_size=3)
    assert same(source, tmp_path / "out", crop=crop)
    assert prepared.images == {"train": 7}
    assert prepared.broken == {"train": ()}
    assert (prepared.class_names, prepared.shards) == (("cat", "dog"), 3)
    assert prepared.num_bytes == sum(map(len, content(tmp_path / "out").values()))


def test_several_processes_write_the_same(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", {"a": 40})
    for workers in (0, 2):
        run(source, tmp_path / str(workers), num_workers=workers, shard_size=15)
    assert content(tmp_path / "0") == content(tmp_path / "2")


@pytest.mark.slow
def test_grey_digits(tmp_path: Path) -> None:
    run("digits", tmp_path / "out", in_channels=1, format="png")
    assert same("digits", tmp_path / "out", in_channels=1, held_out_images=100)


def test_splits_share_their_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "source" / "train", {"a": 2, "b": 1})
    write_pictures(tmp_path / "source" / "test", {"b": 1, "c": 1}, seed=1)
    prepared = run(tmp_path / "source", tmp_path / "out", split=("train", "test"))
    assert prepared.images == {"train": 3, "test": 2}
    assert prepared.class_names == ("a", "b", "c")
    assert same(tmp_path / "source", tmp_path / "out", held_out_split="test")


def test_unlabelled_images_stay_so(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", {".": 3})
    assert run(source, tmp_path / "out").class_names == ()
    assert same(source, tmp_path / "out")
    assert pq.read_schema(tmp_path / "out" / "train-00000-of-00001.parquet").names == ["image"]


def test_missing_labels_and_plain_numbers(tmp_path: Path) -> None:
    columns = typed_columns(4)
    typed = write_parquet(tmp_path / "typed.parquet", columns | {"label": [1, -1, None, 0]}, TYPED)
    run(typed, tmp_path / "typed")
    assert same(typed, tmp_path / "typed")
    plain = write_parquet(tmp_path / "plain.parquet", columns | {"label": [4, 0, 2, 2]})
    run(plain, tmp_path / "plain")
    assert same(plain, tmp_path / "plain")


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    columns = typed_columns(3)
    columns |= {"small": columns["image"][::-1], "kind": [1, 0, 1]}
    source = write_parquet(tmp_path / "two.parquet", columns)
    run(source, tmp_path / "out", image_column="small", label_column="kind")
    chosen = load(source, image_column="small", label_column="kind").train
    prepared = load(tmp_path / "out").train
    assert prepared.labels.tolist() == [1, 0, 1]
    assert all(torch.equal(prepared[index].image, chosen[index].image) for index in range(3))


@pytest.mark.parametrize(("picture_format", "start"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_formats(tmp_path: Path, picture_format: str, start: bytes) -> None:
    source = write_classes(tmp_path / "source", {"a": 2})
    run(source, tmp_path / "out", format=picture_format)
    rows = pq.read_table(tmp_path / "out" / "train-00000-of-00001.parquet")["image"].to_pylist()
    assert all(row["bytes"].startswith(start) for row in rows)
    assert [row["path"] for row in rows] == [f"00000000.{picture_format}", f"00000001.{picture_format}"]
    assert (load(tmp_path / "out").train[1].image.float() - 1).abs().max() <= 2


@pytest.mark.slow
def test_files_suit_streaming(tmp_path: Path) -> None:
    run("digits", tmp_path / "out", shard_size=600, in_channels=1)
    assert files(tmp_path / "out") == ["prepare.json", *(f"train-0000{index}-of-00003.parquet" for index in range(3))]
    footers = [pq.read_metadata(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert [footer.num_rows for footer in footers] == [600, 600, 597]
    assert [footers[2].row_group(index).num_rows for index in range(5)] == [128, 128, 128, 128, 85]


def test_datasets_reads_it_too(tmp_path: Path) -> None:
    write_pictures(tmp_path / "source" / "train", {"a": 2, "b": 1})
    write_pictures(tmp_path / "source" / "test", {"a": 1, "b": 1})
    run(tmp_path / "source", tmp_path / "out", split=("train", "test"), shard_size=2)
    opened = datasets.load_dataset(str(tmp_path / "out"))
    assert {split: len(table) for split, table in opened.items()} == {"train": 3, "test": 2}
    assert opened["train"].features == datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    assert opened["train"][2]["image"].size == (8, 8)


@pytest.mark.slow
def test_manifest_tells_what_was_done(tmp_path: Path) -> None:
    run("digits", tmp_path / "out", crop="adm", format="jpeg", quality=90)
    manifest = json.loads((tmp_path / "out" / "prepare.json").read_text())
    settings = manifest["settings"]
    assert {name: settings[name] for name in ("source", "size", "crop", "format", "quality")} == {
        "source": "digits", "size": 8, "crop": "adm", "format": "jpeg", "quality": 90
    }  # fmt: skip
    assert manifest["source"]["class_names"] == [str(digit) for digit in range(10)]
    assert (manifest["images"], manifest["broken"], manifest["finished"]) == ({"train": 1797}, {"train": 0}, True)
    assert str(tmp_path) not in json.dumps(manifest)


# Stopping and going on


def test_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pictures(tmp_path / "source", {"a": 3, "b": 4})
    damage(source / "a" / "1.jpg").write_bytes(b"no picture")
    run(source, tmp_path / "whole", shard_size=2)

    def stop_at_5(row: int) -> None:
        if row == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        _watch(patch, stop_at_5)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", shard_size=2)
    names = ["HIDDEN" if HIDDEN.fullmatch(name) else name for name in files(tmp_path / "out")]
    assert names == ["HIDDEN", "HIDDEN", "broken.json", "prepare.json"]
    with pytest.raises(DataError, match="is not finished"):
        load(tmp_path / "out")  # so that training never uses a part of it

    (tmp_path / "out" / ".partial-of-a-killed-call").write_text("")
    rows: list[int] = []
    _watch(monkeypatch, rows.append)
    prepared = run(source, tmp_path / "out", shard_size=2)
    assert rows == [4, 5, 6]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert prepared.images == {"train": 6}
    assert len(prepared.broken["train"]) == 1
    assert prepared.images_per_second is not None


def test_nothing_is_done_twice(tmp_path: Path, reads: list[int]) -> None:
    source = write_one_broken(tmp_path / "source")
    first = run(source, tmp_path / "out", shard_size=2)
    assert reads == [0, 1, 2, 3, 4]
    second = run(source, tmp_path / "out", shard_size=2, num_workers=1, max_broken=1)
    assert len(reads) == 5
    assert second == replace(first, images_per_second=None)


def test_another_version_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("itarflow.data.prepare.crop.__version__", "0.0.1")
        run(source, tmp_path / "out")
    run(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["itarflow"] == "0.0.1"


def test_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", fail)
        with pytest.raises(OSError, match=r"out can't be written: .*No space left"):
            run(source, tmp_path / "out")
    assert files(tmp_path / "out") == ["prepare.json"]
    assert run(source, tmp_path / "out").images == {"train": 3}


def test_lost_worker(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(_row: int) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed")

    _watch(monkeypatch, lose)
    with pytest.raises(DataError, match=r"died .* fewer num_workers"):
        run(source, tmp_path / "out")


# Broken images


def test_broken_images_are_left_out_and_named(tmp_path: Path) -> None:
    source = write_one_broken(tmp_path / "source")
    prepared = run(source, tmp_path / "out", shard_size=3)
    assert [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "out").glob("*.parquet"))] == [2, 2]
    (report,) = prepared.broken["train"]
    assert report.startswith("a/002.png: ")
    assert json.loads((tmp_path / "out" / "broken.json").read_text()) == {"train": [report]}
    assert load(tmp_path / "out").train.labels.tolist() == [0, 0, 1, 1]


def test_no_folder_of_the_user_is_told(tmp_path: Path) -> None:
    source = write_classes(tmp_path / "source", {"a": 2})
    (source / "a" / "000.png").unlink()
    (source / "a" / "000.png").symlink_to(source / "nowhere.png")
    (report,) = run(source, tmp_path / "out").broken["train"]
    assert "No such file" in report
    assert str(tmp_path) not in report


def test_file_whose_images_are_all_broken_stays_empty(tmp_path: Path) -> None:
    source = write_classes(tmp_path / "source", {"a": 3, "b": 2})
    for index in range(2):
        damage(source / "a" / f"00{index}.png")
    assert run(source, tmp_path / "out", shard_size=2).images == {"train": 3}
    assert load(tmp_path / "out").train.labels.tolist() == [0, 1, 1]


def test_too_many_broken_images(tmp_path: Path, reads: list[int]) -> None:
    source = write_classes(tmp_path / "source", {"a": 5})
    for index in (0, 3):
        damage(source / "a" / f"00{index}.png")
    options = {"shard_size": 2, "max_broken": 1}
    with pytest.raises(DataError, match=r"2 images .*max_broken is 1(.|\n)*a/003.png: "):
        run(source, tmp_path / "out", **options)
    assert len(json.loads((tmp_path / "out" / "broken.json").read_text())["train"]) == 2
    with pytest.raises(DataError, match=r"2 images .*max_broken is 1"):
        run(source, tmp_path / "out", **options)
    assert reads == [0, 1, 2, 3]
    assert run(source, tmp_path / "out", **options | {"max_broken": 2}).images == {"train": 3}
    assert reads == [0, 1, 2, 3, 4]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"max_broken": -1}, "max_broken is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"in_channels": 2}, "in_channels is 2"),
        ({"crop": "round"}, "crop 'round' is unknown"),
        ({"format": "gif"}, "format 'gif' .*png, jpeg, webp"),
        ({"quality": 0}, "quality is 0.* 1 to 100"),
        ({"split": ()}, "expected names of splits"),
        ({"split": ("train", "train")}, "each once"),
        ({"split": ("train[:10%]",)}, r"split 'train\[:10%\]'"),
        ({"split": ("train", "val")}, "split 'val'.* train"),
        ({"name": "all"}, "leave name out"),
        ({"image_column": "photo"}, "image_column 'photo'"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = write_classes(tmp_path / "source", {"a": 1})
    with pytest.raises(DataError, match=message):
        run(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 9}, "size: 8 there, 9 now"),
        ({"crop": "adm"}, "crop: center there, adm now"),
        ({"format": "webp"}, "format: png there, webp now\n  quality: None there, 95 now"),
        ({"shard_size": 7}, "shard_size: 10000 there, 7 now"),
    ],
)
def test_other_settings_are_refused(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    run(source, tmp_path / "out")
    with pytest.raises(DataError, match=f"other settings(.|\n)*{message}"):
        run(source, tmp_path / "out", **options)


def test_what_changes_no_image_may_differ(source: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "out")
    before = content(tmp_path / "out")
    again = run(source, tmp_path / "out", quality=50, max_broken=0, num_workers=1)
    assert again == replace(first, images_per_second=None)
    assert content(tmp_path / "out") == before


def test_other_sources_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    with pytest.raises(DataError, match=r"source: .*source there, digits now"):
        run("digits", out)
    (source / "a").rename(source / "c")
    with pytest.raises(DataError, match=r"classes: \[a, b\] there, \[b, c\] now"):
        run(source, out)
    shutil.rmtree(source / "c")
    with pytest.raises(DataError, match=r"classes: \[a, b\] there, \[b\] now .*\n  images, train: 3 there, 1 now"):
        run(source, out)


def test_only_the_name_of_a_local_source_is_stored(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(source, out)
    assert json.loads((out / "prepare.json").read_text())["settings"]["source"] == "source"
    assert str(tmp_path) not in (out / "prepare.json").read_text()
    monkeypatch.chdir(tmp_path)
    run("./source/", out)  # the same folder
    other = write_classes(tmp_path / "other", {"a": 2, "b": 1})
    with pytest.raises(DataError, match="source: source there, other now"):
        run(other, out)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    source = write_classes(tmp_path / "source", {"a": 1})
    other, file = tmp_path / "other", tmp_path / "file"
    other.mkdir()
    (other / "notes.txt").touch()
    file.touch()
    with pytest.raises(DataError, match="other is a folder with other things"):
        run(source, other)
    with pytest.raises(DataError, match="file is a file"):
        run(source, file)
    for out in (source, source / "small"):
        with pytest.raises(DataError, match="would be taken for a part of it"):
            run(source, out)
    assert (files(other), files(source)) == (["notes.txt"], ["a"])


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}}', '{"settings": 3}'])
def test_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "prepare.json").write_text(text)
    with pytest.raises(DataError, match=r"prepare.json is damaged"):
        run("digits", tmp_path)


def test_damaged_file_is_refused(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    damage(tmp_path / "out" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet is damaged"):
        run(source, tmp_path / "out")
    write_parquet(tmp_path / "out" / "train-00000-of-00001.parquet", {"label": [1]})
    with pytest.raises(DataError, match="not of this command"):
        run(source, tmp_path / "out")
