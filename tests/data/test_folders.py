"""Folders as people have them: links, pipes, other files, odd names. All pictures are used, or what is not is told."""

from __future__ import annotations

import os
import socket
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import encoded, load, values, write_classes, write_image
from PIL import Image

from itarflow.data.sources import open_splits
from itarflow.runtime.errors import DataError


def names_of(path: Path) -> list[str]:
    """Paths of the pictures to train on, relative to the folder."""
    table = open_splits(str(path)).train
    return [os.path.relpath(row["path"], path) for row in table.with_format("arrow")[:]["image"].to_pylist()]


def told(path: Path, **options: str) -> str:
    return "\n".join(open_splits(str(path), **options).left_out)


# Files of other kinds


@pytest.mark.parametrize("suffix", ["avif", "jfif", "jp2", "tga", "dib"])
def test_formats_of_pillow_are_read(tmp_path: Path, suffix: str) -> None:
    write_classes(tmp_path, {"a": 2})
    kind = {"jfif": "JPEG"}.get(suffix)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / f"x.{suffix}", kind)
    data = load(tmp_path)
    assert len(data.train) == 3
    assert [data.train[index].broken for index in range(3)] == [None] * 3
    assert data.left_out == ()


def test_pictures_without_a_suffix_are_known_by_their_beginning(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 1})
    (tmp_path / "a" / "no_suffix").write_bytes(encoded(7))
    (tmp_path / "a" / "README").write_text("a text")
    assert values(load(tmp_path).train) == [0, 7]
    assert told(tmp_path) == (
        f"1 file of an unknown kind (1 no suffix) in {tmp_path.name}/, such as {tmp_path.name}/a/README"
    )


def test_files_of_unknown_kinds_are_counted(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "mixed", {"a": 2, "b": 1})
    for number in range(3):
        (folder / "a" / f"{number}.heic2").write_bytes(b"?")
    (folder / "notes.txt").write_text("?")
    (folder / "Thumbs.db").write_text("?")
    assert told(folder) == "4 files of an unknown kind (3 .heic2, 1 .txt) in mixed/, such as mixed/notes.txt"


def test_folder_of_unknown_files_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.heic2").write_bytes(b"?")
    with pytest.raises(DataError, match=r"no images and no parquet files \(1 file of an unknown kind \(1 .heic2\)"):
        load(tmp_path)


def test_classes_without_pictures_are_named(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "mixed", {"a": 1, "b": 1})
    (folder / "c" / "deep").mkdir(parents=True)
    (folder / "d").symlink_to("nowhere")
    (folder / "e").mkdir()
    (folder / "e" / "x.heic2").write_bytes(b"?")
    data = load(folder)
    assert data.class_names == ("a", "b")
    assert "class folders without pictures: c, d, e" in data.left_out
    assert "1 link to nowhere in mixed/, such as mixed/d" in data.left_out


def test_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path, {"a": 1, "b": 1})
    scandir = os.scandir

    def refuse(path: str) -> os._ScandirIterator[str]:  # root may read everything
        if os.path.basename(path) == "a":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"/a' can't be read: Permission denied"):
        load(tmp_path)


# Special files and links


def test_special_files_are_left_out(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", {"a": 1})
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "zero.png").symlink_to("/dev/zero")
    (folder / "a" / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe.parquet")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.png"))
        data = load(folder)
    assert values(data.train) == [0]
    assert data.left_out == (
        "4 special files (pipe, device, socket) in x/, such as x/pipe.parquet",
        "1 link to nowhere in x/, such as x/a/loop",
    )


def test_links_to_folders_above_end(tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere.png")
    folder = write_classes(tmp_path / "x", {"a": 1, "b": 1})
    for number in range(3):
        (folder / "a" / f"up{number}").symlink_to("..")
        (folder / "a" / f"higher{number}").symlink_to("../..")
    assert names_of(folder) == ["a/000.png", "b/000.png"]
    assert told(folder) == "6 links to what is there already in x/, such as x/a/higher0"


def test_linked_folders_are_followed_once_and_go_by_their_own_name(tmp_path: Path) -> None:
    write_classes(tmp_path / "elsewhere", {"cat": 2})
    folder = write_classes(tmp_path / "x", {"dog": 1})
    (folder / "cat").symlink_to("../elsewhere/cat")
    (folder / "again").symlink_to("dog")
    data = load(folder)
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1]
    assert data.left_out[0] == "1 link to what is there already in x/, such as x/again"


def test_no_file_of_proc_is_waited_for() -> None:
    with pytest.raises(DataError, match="folder '/proc"):
        load("/proc")


# Names


def test_file_names_that_are_no_utf8_are_told(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", {"a": 1})
    (folder / "a" / os.fsdecode(b"z\xff.png")).write_bytes(encoded(1))
    assert len(load(folder).train) == 1
    assert told(folder) == (r"1 file with a name that is not UTF-8 (rename it) in x/, such as x/a/z\udcff.png")


def test_class_folder_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 1, os.fsdecode(b"caf\xe9"): 1})
    with pytest.raises(DataError, match=r"caf\\udce9' is not UTF-8; rename it"):
        load(tmp_path)


def test_composed_and_decomposed_letters_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_classes(tmp_path / "train", {decomposed: 2, "tea": 1})
    write_classes(tmp_path / "val", {composed: 1, "tea": 1})
    data = load(tmp_path, held_out_split="val")
    assert data.class_names == (composed, "tea")
    assert (data.train.labels.tolist(), data.held_out.labels.tolist()) == ([0, 0, 1], [0, 1])


def test_names_with_colons_and_breaks(tmp_path: Path) -> None:
    write_classes(tmp_path, {"x::y": 1, "a\nb": 1})
    assert names_of(tmp_path) == ["a\nb/000.png", "x::y/000.png"]


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    data = load(write_classes(tmp_path, {str(number): 1 for number in range(12)}))
    assert data.class_names == tuple(map(str, range(12)))
    assert data.train.labels.tolist() == list(range(12))
    assert load(write_classes(tmp_path, {"x": 1})).class_names[:3] == ("0", "1", "10")


# Buckets


def test_buckets_of_a_thousand_are_no_classes(tmp_path: Path) -> None:
    for number in (0, 999, 1000, 2345):
        write_image(tmp_path / "edm" / f"{number // 1000:05}" / f"img{number:08}.png")
        write_image(tmp_path / "ffhq" / f"{number // 1000 * 1000:05}" / f"{number:05}.png")
        write_image(tmp_path / "other" / f"{number // 1000:05}" / f"{number % 1000:05}.png")
    for name in ("edm", "ffhq"):
        data = load(tmp_path / name)
        assert data.class_names == ()
        assert len(data.train) == 4
        assert "are no classes" in data.left_out[0]
    assert load(tmp_path / "other").class_names == ("00000", "00001", "00002")


# Splits


@pytest.mark.parametrize(
    ("train", "held_out"), [("Train", "Test"), ("TRAIN", "testing"), ("training", "test"), ("train", "test")]
)
def test_usual_names_of_splits(tmp_path: Path, train: str, held_out: str) -> None:
    write_classes(tmp_path / train, {".": 3})
    write_classes(tmp_path / held_out, {".": 2})
    data = load(tmp_path, held_out_split="test")
    assert (len(data.train), len(data.held_out)) == (3, 2)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Val"])
def test_validation_by_any_of_its_names(tmp_path: Path, name: str) -> None:
    write_classes(tmp_path / "train", {"a": 2})
    write_classes(tmp_path / name, {"a": 1})
    for wanted in ("val", "validation", "validation[:100%]"):
        assert len(load(tmp_path, held_out_split=wanted).held_out) == 1
    with pytest.raises(DataError, match="are one"):
        load(tmp_path, split="val", held_out_split="validation")


def test_two_spellings_are_two_splits(tmp_path: Path) -> None:
    for count, name in enumerate(("train", "val", "dev"), 1):
        write_classes(tmp_path / name, {"a": count})
    assert len(load(tmp_path, held_out_split="dev").held_out) == 3
    with pytest.raises(DataError, match="several splits that 'validation' may mean; use one of dev, val"):
        load(tmp_path, held_out_split="validation")


def test_folder_beside_splits_is_a_split(tmp_path: Path) -> None:
    for count, name in enumerate(("train", "val", "unlabeled"), 1):
        write_classes(tmp_path / name, {".": count})
    write_image(tmp_path / "overview.png")
    data = load(tmp_path, held_out_split="val")
    assert (len(data.train), len(data.held_out)) == (1, 2)
    assert len(load(tmp_path, split="unlabeled").train) == 3
    assert "folders beside train, val, taken for splits of their own: unlabeled" in data.left_out
    assert data.left_out[-1].startswith("1 picture outside of train, val")


def test_class_with_the_name_of_a_split_is_told(tmp_path: Path) -> None:
    write_classes(tmp_path, {"train": 1, "plane": 1})
    data = load(tmp_path)
    assert data.class_names == ("plane", "train")
    assert data.left_out == ("no split by the name of folder train: it is taken for a class, beside plane",)


def test_empty_split_is_said_where_it_is_missing(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 1})
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "x.heic2").write_bytes(b"?")
    with pytest.raises(DataError, match=r"no split 'val'; use one of train .*Left out: 1 file of an unknown kind"):
        load(tmp_path, held_out_split="val")


# Anything


KINDS = ("picture", "plain", "text", "pipe", "nowhere", "up", "self", "zero", "odd", "empty folder", "parquet link")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.dictionaries(
        st.sampled_from(["", "a", "b", "b/c", "train", "Val", "train/a", "00000", "é", "x::y", "[*]", "a\nb"]),
        st.dictionaries(st.sampled_from(["1", "img00000001", "ä", "%", "q?"]), st.sampled_from(KINDS), max_size=4),
        max_size=4,
    )
)
def test_every_picture_is_used_or_told(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, dict[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    pictures = 0
    for folder, entries in tree.items():
        place = root / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, kind in entries.items():
            pictures += kind in (
                "picture",
                "plain",
                "nowhere",
                "self",
            )  # links to nowhere: it is named when it is read
            file = place / (name if kind == "plain" else f"{name}.png")
            if kind in ("picture", "plain"):
                file.write_bytes(encoded(1))
            elif kind == "text":
                (place / f"{name}.txt").write_text("?")
            elif kind == "pipe":
                os.mkfifo(file)
            elif kind == "empty folder":
                (place / f"{name} folder").mkdir()
            elif kind == "odd":
                write_image(place / (name + os.fsdecode(b"\xff.png")))
            else:
                target = {"up": "..", "zero": "/dev/zero", "self": f"{name}.png"}.get(kind, "nowhere")
                (place / f"{name}.parquet" if kind == "parquet link" else file).symlink_to(target)
    try:
        opened = open_splits(str(root))
    except DataError as error:
        str(error).encode()
        return
    used, said = len(opened.train), "\n".join(opened.left_out)
    said.encode()
    if "beside" not in said:  # other splits, of which nothing was asked
        assert used == pictures or "Val" in os.listdir(root)
    assert ("not UTF-8" in said) == any("odd" in entries.values() for entries in tree.values())
    assert ("special file" in said) == any({"pipe", "zero"} & set(entries.values()) for entries in tree.values())
