"""What path and split name is found, with its labels, and what is not there is said; tested through `load_data`."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import datasets
import fsspec  # type: ignore[import-untyped]
import pytest
import torch
from image_files import (
    TYPED,
    damage,
    encoded,
    load,
    typed_columns,
    values,
    write_classes,
    write_image,
    write_parquet,
    write_row_groups,
)

from itarflow.runtime.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("x") / "cache")


def test_digits_have_one_split() -> None:
    with pytest.raises(DataError, match="no split 'test'; use one of train"):
        load("digits", split="test")


# Folders


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
    data = load(tmp_path, held_out_split="val")
    assert data.class_names == ("a", "b")
    assert (data.train.labels.tolist(), data.held_out.labels.tolist()) == ([0, 0, 1], [0, 1])
    assert load(tmp_path, split="val").train.labels.tolist() == [0, 1]
    assert len(load(tmp_path, split="train+val").train) == 5
    with pytest.raises(DataError, match=r"'test'.*train, val"):
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


# Parquet


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
    with pytest.raises(DataError, match=r"'val'.*test, train"):
        load(tmp_path, held_out_split="val")


@pytest.mark.parametrize(
    "names", [["x.parquet", "y.parquet"], ["train/x.parquet", "test/x.parquet"], ["train_0.parquet"]]
)
def test_parquet_names_that_tell_the_split_or_none(tmp_path: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        write_parquet(tmp_path / name, typed_columns(1, index), TYPED)
    assert values(load(tmp_path).train) == ([0, 1] if names[0] == "x.parquet" else [0])


def test_pictures_beside_parquet_are_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x" / "a.parquet", typed_columns(2), TYPED)
    write_image(tmp_path / "x" / "overview.png")
    left_out = load(tmp_path / "x").left_out
    assert left_out == ("1 picture beside parquet files, such as x/overview.png",)


def test_unknown_files_beside_parquet_are_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x" / "a.parquet", typed_columns(2), TYPED)
    for name in ("README.md", "prepare.json", "LICENSE", "b.parquet.part"):
        (tmp_path / "x" / name).write_text("?")
    (tmp_path / "x" / "c.parquet").symlink_to("nowhere")
    assert load(tmp_path / "x").left_out == (
        "1 file of an unknown kind (1 .part) in x/, such as x/b.parquet.part",
        "1 link to nowhere in x/, such as x/c.parquet",
    )


def test_parquet_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(DataError, match=r"pipe\.parquet' is not a readable parquet file: .*no regular file"):
        load(tmp_path / "pipe.parquet")


def test_cache_that_cannot_be_written_is_not_blamed_on_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "a.parquet", typed_columns(2), TYPED)
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(DataError, match=r"cache of data sets can't be used: .*file/cache.*HF_HOME.*streaming"):
        load(file)
    assert len(load(file, streaming=True).train) == 2


@pytest.mark.parametrize(
    "full", [OSError(errno.ENOSPC, "No space left on device"), OSError("Not enough disk space. N")]
)
def test_full_cache_is_not_blamed_on_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: OSError) -> None:
    def fail(*args: object, **options: object) -> None:
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from full

    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(DataError, match=r"is full .*HF_DATASETS_CACHE"):
        load(write_parquet(tmp_path / "a.parquet", typed_columns(2), TYPED))


def test_parquet_file_without_split_among_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train", "extra"):
        write_parquet(tmp_path / f"{name}.parquet", typed_columns(1), TYPED)
    with pytest.raises(DataError, match=r"extra\.parquet'"):
        load(tmp_path)


def test_changed_parquet_is_seen(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", typed_columns(2), TYPED)
    assert values(load(file).train) == [0, 1]
    write_parquet(file, typed_columns(2, 5), TYPED)
    os.utime(file, (1, 1))  # as after a copy that keeps times: older than what was there
    assert values(load(file).train) == [5, 6]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.parquet"
    file.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"bad\.parquet' is not"):
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


# Streaming


def test_streamed_parquet_is_the_same_set(tmp_path: Path) -> None:
    write_row_groups(tmp_path / "train-00000-of-00002.parquet", 20, 3)
    write_row_groups(tmp_path / "train-00001-of-00002.parquet", 11, 4, first=20)
    write_row_groups(tmp_path / "test [1].parquet", 7, 2, first=50)
    for path, options in [
        (tmp_path, {"held_out_images": 5}),
        (tmp_path, {"held_out_split": "test", "held_out_images": 4}),
        (tmp_path, {"split": "train[:50%]+test", "held_out_split": "train[-3:]"}),
        (tmp_path, {"split": "train[5:]+train[:2]", "held_out_images": 3, "label_column": "label"}),
        (tmp_path / "train-*.parquet", {}),
        (tmp_path / "test [1].parquet", {}),
    ]:
        plain, streamed = load(path, **options), load(path, streaming=True, **options)
        assert streamed.class_names == plain.class_names == ("a", "b")
        assert streamed.train.row_groups is not None
        assert plain.train.row_groups is None
        for one, other in ((plain.train, streamed.train), (plain.held_out, streamed.held_out)):
            assert values(one) == values(other)
            assert torch.equal(one.labels, other.labels)


def test_streaming_copies_nothing(tmp_path: Path) -> None:
    load(write_row_groups(tmp_path / "a.parquet", 5, 2), streaming=True)
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*"))


def test_streamed_splits_are_checked(tmp_path: Path) -> None:
    write_row_groups(tmp_path / "train.parquet", 10, 3)
    with pytest.raises(DataError, match="no split 'test'; use one of train"):
        load(tmp_path, streaming=True, split="test")
    with pytest.raises(DataError, match="shares images with split"):
        load(tmp_path, streaming=True, split="train[:6]", held_out_split="train[5:]")
    with pytest.raises(DataError, match="has no rows"):
        load(tmp_path, streaming=True, split="train[99:]")
    damage(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet' is not"):
        load(tmp_path, streaming=True)
    with pytest.raises(DataError, match="has no rows"):
        load(write_row_groups(tmp_path / "train.parquet", 0, 3), streaming=True)


def test_images_in_folders_and_digits_are_never_streamed(tmp_path: Path) -> None:
    data = load(write_classes(tmp_path, {"a": 2, "b": 1}), streaming=True)
    assert (values(data.train), data.train.row_groups) == ([0, 1, 2], None)
    assert len(load("digits", in_channels=1, streaming=True).train) == 1797


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that has one data set of parquet files, "some/set", and one of other files."""
    folder = fsspec.filesystem("memory")
    local = write_row_groups(tmp_path / "a.parquet", 9, 2)
    for split, count in (("train", 2), ("validation", 1)):
        for number in range(count):
            folder.pipe(f"/hub/data/{split}-{number:05}-of-{count:05}.parquet", local.read_bytes())
    build = datasets.load_dataset_builder
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")

    def builder(path: str, name: str | None) -> datasets.DatasetBuilder:
        if path == "some/set":
            files = {split: f"memory://hub/data/{split}-*.parquet" for split in ("train", "validation")}
            return build("parquet", data_files=files)
        return build("csv", data_files={"train": str(tmp_path / "text.csv")})

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)


@pytest.mark.usefixtures("hub")
def test_parquet_of_the_hub_is_streamed() -> None:
    data = load("some/set", streaming=True, held_out_split="validation")
    assert values(data.train) == [*range(9), *range(9)]
    assert values(data.held_out) == list(range(9))
    assert data.class_names == ("a", "b")
    assert data.train.row_groups is not None
    assert data.train.row_groups.tolist() == [2, 2, 2, 2, 1] * 2
    assert values(load("some/set", streaming=True, split="val").train) == list(range(9))
    with pytest.raises(DataError, match=r"'test'.*train, validation"):
        load("some/set", streaming=True, split="test")


@pytest.mark.usefixtures("hub")
def test_other_files_of_the_hub_are_not() -> None:
    with pytest.raises(DataError, match=r"'some/texts' cannot be streamed: .*prepare"):
        load("some/texts", streaming=True)


# Wrong paths


def test_local_path_that_does_not_exist() -> None:
    for path in ("./nowhere", "/no/where", "~/nowhere", "a/b/c", "gone.parquet", "gone/*.parquet"):
        with pytest.raises(DataError, match="does not exist"):
            load(path)


def test_name_that_is_neither_here_nor_on_the_hub() -> None:
    with pytest.raises(DataError, match=r"'some/set' .*Hub"):
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
