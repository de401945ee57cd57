"""The identity of a data set: the same wherever it lies and whenever it is opened, another one for other images."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import fsspec  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from image_files import (
    TYPED,
    encoded,
    load,
    typed_columns,
    write_classes,
    write_image,
    write_parquet,
    write_row_groups,
)
from PIL import Image

from itarflow.data import DataConfig
from itarflow.data.content import content_of
from itarflow.data.identity import DataIdentity, described
from itarflow.data.load import load_splits
from itarflow.data.parquet import open_parquet
from itarflow.runtime.errors import DataError
from itarflow.runtime.json_file import as_type


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def folder(path: Path) -> Path:
    return write_classes(path, {"a": 3, "b": 2, "c": 4})


def parquet(path: Path) -> Path:
    write_row_groups(path / "train-00000-of-00002.parquet", 6, 4)
    write_row_groups(path / "train-00001-of-00002.parquet", 4, 4, first=6)
    return path


def identity(path: Path | str, **options: object) -> DataIdentity:
    return load(path, **options).identity  # type: ignore[arg-type]


KINDS = [(folder, {}), (parquet, {}), (parquet, {"streaming": True})]


# What is the same


@pytest.mark.parametrize(("make", "options"), KINDS)
def test_it_is_that_of_the_files_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], options: dict[str, bool]
) -> None:
    first = identity(make(tmp_path / "here"), **options)
    assert identity(tmp_path / "here", **options) == first
    shutil.copytree(tmp_path / "here", tmp_path / "else" / "where", copy_function=shutil.copyfile)  # new times
    assert identity(tmp_path / "else" / "where", **options) == first
    monkeypatch.chdir(tmp_path / "else")
    assert identity("where", **options) == first
    assert first.differences(identity("where", **options)) == []


@pytest.mark.parametrize(("make", "options"), KINDS)
def test_it_is_that_of_the_set_not_of_how_it_is_read(
    tmp_path: Path, make: Callable[[Path], Path], options: dict[str, bool]
) -> None:
    make(tmp_path)
    first = identity(tmp_path, **options)
    assert identity(tmp_path, image_size=16, in_channels=1, crop="edm", max_broken=3, **options) == first


@pytest.mark.slow
def test_it_is_the_same_in_another_process(tmp_path: Path) -> None:
    script = (
        "import sys; from itarflow.data import DataConfig, load_data\n"
        "for path in sys.argv[1:]:\n"
        "    print(load_data(DataConfig(path=path), image_size=8, in_channels=1).identity.content)"
    )
    parquet(tmp_path / "p")
    folder(tmp_path / "f")
    command = [sys.executable, "-c", script, "digits", str(tmp_path / "p"), str(tmp_path / "f")]
    runs = [
        subprocess.run(
            command, capture_output=True, text=True, check=True,
            env=os.environ | {"HF_HOME": str(tmp_path / name), "PYTHONHASHSEED": str(seed)},
        ).stdout
        for name, seed in (("one", 1), ("two", 2))
    ]  # fmt: skip
    assert len(set(runs[0].split())) == 3
    assert runs[0] == runs[1]


def test_digits_do_not_depend_on_how_pillow_compresses(monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity("digits", in_channels=1)
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda *args, **options: save(*args, **options | {"compress_level": 0}))
    assert identity("digits", in_channels=1) == first


# What is another set


@pytest.mark.parametrize(("make", "options"), KINDS)
def test_other_pictures_of_the_same_number_are_noticed(
    tmp_path: Path, make: Callable[[Path], Path], options: dict[str, bool]
) -> None:
    before = identity(make(tmp_path / "set"), **options)
    if make is folder:
        for file in (tmp_path / "set").rglob("*.png"):
            Image.new("RGB", (8, 8), (250, 1, 1)).save(file)
    else:
        write_row_groups(tmp_path / "set" / "train-00000-of-00002.parquet", 6, 4, first=100)
    (line,) = before.differences(identity(tmp_path / "set", **options))
    assert "other ones now" in line


def test_one_other_picture_of_the_same_size_is_noticed_in_a_small_set(tmp_path: Path) -> None:
    for index in range(4):
        Image.new("L", (8, 8), index).save(tmp_path / f"{index}.bmp")  # all of one size
    before, time = identity(tmp_path), (tmp_path / "2.bmp").stat().st_mtime
    Image.new("L", (8, 8), 99).save(tmp_path / "2.bmp")
    os.utime(tmp_path / "2.bmp", (time, time))
    assert before.differences(identity(tmp_path))


def test_codes_of_one_size_are_told_apart(tmp_path: Path) -> None:
    def write(value: int) -> DataIdentity:
        columns = {"image": [encoded(value + row) for row in range(8)]}
        assert len({len(data) for data in columns["image"]}) == 1
        return identity(write_parquet(tmp_path / f"{value}.parquet", columns))

    assert write(10).differences(write(50))


def test_fewer_pictures_and_other_labels_are_noticed(tmp_path: Path) -> None:
    before = identity(folder(tmp_path))
    (tmp_path / "a" / "000.png").rename(tmp_path / "b" / "000-of-a.png")
    (line,) = before.differences(identity(tmp_path))
    assert line == "images by class: [3, 2, 4] there, [2, 3, 4] now"
    (tmp_path / "a" / "001.png").unlink()
    (line,) = before.differences(identity(tmp_path))
    assert line == "images, train: 9 there, 8 now"


def test_swapped_labels_are_noticed(tmp_path: Path) -> None:
    columns = typed_columns(6)
    before = identity(write_parquet(tmp_path / "a.parquet", columns, TYPED))
    columns["label"] = [1 - label for label in columns["label"]]
    assert before.differences(identity(write_parquet(tmp_path / "a.parquet", columns, TYPED)))


def test_a_renamed_class_says_which_labels_have_moved(tmp_path: Path) -> None:
    before = identity(folder(tmp_path))
    (tmp_path / "b").rename(tmp_path / "zz")
    (line, *_) = before.differences(identity(tmp_path))
    assert line == "classes: [a, b, c] there, [a, c, zz] now (label 1 was b, is c now, label 2 was c, is zz now)"


def test_names_of_others_do_not_reach_the_terminal(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a\x1b[2J": 2, "b": 2})
    found = identity(tmp_path)
    assert not any("\x1b" in line for line in described(found))
    other = DataIdentity(content="", images={}, class_names=("b\x1b",))
    assert not any("\x1b" in line for line in found.differences(other))


# What is said


def test_two_lines_say_what_was_understood() -> None:
    assert described(identity("digits", in_channels=1, held_out_images=100)) == [
        "images: 1,697 to train on, 100 held out, of column image",
        "labels: 10 classes of column label (0 168, 1 172, 2 167, ..., 9 170)",
    ]


def test_unlabelled_images_and_what_was_left_out_are_said(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    found = identity(tmp_path)
    assert described(found) == ["images: 1 to train on, 0 held out", "labels: none"]
    more = DataIdentity(**found.to_json() | {"left_out": ("3 files of an unknown kind",)})
    assert described(more)[-1] == "left out: 3 files of an unknown kind"


def test_labels_are_said_to_be_of_the_folders_or_of_a_column(tmp_path: Path) -> None:
    assert described(identity(folder(tmp_path / "f"))) == [
        "images: 9 to train on, 0 held out",
        "labels: 3 classes by folder (a 3, b 2, c 4)",
    ]
    assert described(identity(parquet(tmp_path / "p"))) == [
        "images: 10 to train on, 0 held out, of column image",
        "labels: 2 classes of column label (a 5, b 5)",
    ]
    (tmp_path / "f" / "metadata.csv").write_text("file_name,label\na/000.png,7\nb/000.png,3\n")
    assert identity(tmp_path / "f").columns == {"label": "label"}


def test_codes_are_called_codes() -> None:
    found = DataIdentity(content="rows:0", images={"train": 3, "held out": 1}, columns={"image": "mean"})
    assert described(found)[0] == "codes: 3 to train on, 1 held out"


def test_classes_without_training_images_are_said(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 12, "b": 12, "c": 12})
    assert any("2 of 3 classes have no training images: b, c" in line
               for line in described(identity(tmp_path, split="train[:25%]")))  # fmt: skip
    assert not any("no training" in line for line in described(identity(tmp_path)))


def test_splits_that_are_opened_whole_have_one_too(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 2, "b": 1})
    write_classes(tmp_path / "test", {"a": 1, "b": 3})
    sets, found, _ = load_splits(DataConfig(path=str(tmp_path)), ["train", "test"], image_size=8, in_channels=3)
    assert list(sets) == ["train", "test"]
    assert (found.images, found.class_names, found.class_counts) == ({"train": 3, "test": 4}, ("a", "b"), (2, 1))
    assert described(found)[0] == "images: 3 in train, 4 in test"
    write_image(tmp_path / "test" / "b" / "000.png", 77, (9, 9))
    again = load_splits(DataConfig(path=str(tmp_path)), ["train", "test"], image_size=8, in_channels=3)[1]
    assert found.differences(again)


def test_json_gives_the_same_back_and_other_json_is_refused() -> None:
    found = identity("digits", in_channels=1)
    assert as_type(json.loads(json.dumps(found.to_json())), DataIdentity, "x.json") == found
    for wrong in (None, [], {"content": 1}, found.to_json() | {"images": 3}):
        with pytest.raises(DataError, match=r"x\.json"):
            as_type(wrong, DataIdentity, "x.json")


def test_a_hash_is_compared_with_those_of_its_kind_only(tmp_path: Path) -> None:
    copied, in_place = identity(parquet(tmp_path)), identity(tmp_path, streaming=True)
    assert (copied.content_kind, in_place.content_kind) == ("rows", "files")
    assert copied.differences(in_place) == in_place.differences(copied) == []
    for one, other in ((copied, in_place), (in_place, copied), (in_place, in_place)):
        less = dataclasses.replace(other, images={"train": 9, "held out": 0})
        assert one.differences(less) == ["images, train: 10 there, 9 now"]
        assert one.differences(dataclasses.replace(other, class_names=("x", "y")))
    assert in_place.differences(dataclasses.replace(in_place, content="files:0"))
    before_kinds = dataclasses.replace(copied, content="0")
    assert before_kinds.differences(copied) == []


def test_files_elsewhere_have_a_kind_of_their_own(tmp_path: Path) -> None:
    file = next(parquet(tmp_path).glob("*.parquet"))
    fsspec.filesystem("memory").pipe("/set/a.parquet", file.read_bytes())
    here, there = (content_of(open_parquet([place]), ["image"]) for place in (str(file), "memory://set/a.parquet"))
    assert (here.partition(":")[0], there.partition(":")[0]) == ("files", "remote")


def test_a_flipped_byte_of_a_small_parquet_file_read_in_place_is_noticed(tmp_path: Path) -> None:
    file = parquet(tmp_path) / "train-00000-of-00002.parquet"
    before = identity(tmp_path, streaming=True)
    data = bytearray(file.read_bytes())
    assert len(data) < 16 * 4096
    offset = pq.ParquetFile(file).metadata.row_group(1).column(1).data_page_offset
    data[offset + 1] ^= 0  # the same: nothing is said
    file.write_bytes(data)
    assert identity(tmp_path, streaming=True) == before
    position = data.index(b"IDAT")
    data[position + 6] ^= 255
    file.write_bytes(data)
    assert before.differences(identity(tmp_path, streaming=True))
