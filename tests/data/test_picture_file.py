"""Pictures of others: what is no picture file is refused at once, and no program is started for it."""

from __future__ import annotations

import io
import os
import socket
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import load, values, write_image
from PIL import Image

from itarflow.data import picture_file
from itarflow.data.picture_file import PICTURE_FORMATS, OwnPlace, open_picture, own_place
from itarflow.runtime.errors import DataError

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n{} loop\nshowpage\n%%EOF\n"


def encoded(kind: str, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (9, 9, 9)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [kind for kind in PICTURE_FORMATS if kind not in ("PSD", "HEIF", "QOI")])
def test_usual_formats_are_opened_whatever_their_name(tmp_path: Path, kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    (tmp_path / "a.png").write_bytes(encoded(kind))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(kind)):
        with open_picture(source) as image:
            found = np.asarray(image.convert("RGB"))
        assert found.shape == (6, 8, 3)
        assert abs(found.astype(int) - 9).max() <= 2


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("it was started"))
    (tmp_path / "x.png").write_bytes(POSTSCRIPT)
    with pytest.raises(DataError, match="no image of a known format"):
        open_picture(tmp_path / "x.png")


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(DataError, match=rf"{name} is no regular file"):
            open_picture(tmp_path / name)


def test_files_without_end_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_file, "LARGEST_FILE", 100)
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(DataError, match="too large"):
        open_picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="too large"):
        picture_file.read_limited(io.BytesIO(bytes(101)))
    assert picture_file.read_limited(io.BytesIO(bytes(100))) == bytes(100)


def test_bombs_empty_and_damaged_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="empty"):
        open_picture(b"")
    with pytest.raises(DataError, match="known format"):
        open_picture(b"junk")
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "gone.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match="decompression bomb"):
        open_picture(encoded("PNG"))


# Files that rows name


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def naming(folder: Path, *names: str) -> Path:
    """Parquet file in a folder: one picture, then rows that name files."""
    folder.mkdir(exist_ok=True)
    rows = [{"bytes": encoded("PNG", (8, 8)), "path": None}, *({"bytes": None, "path": name} for name in names)]
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    pq.write_table(pa.Table.from_pylist([{"image": row} for row in rows], schema), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_name_files_beside_them_only(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    private = write_image(tmp_path / "private.png", 77)
    write_image(tmp_path / "set" / "more" / "own.png", 55)
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "private.zip", "w") as archive:
        archive.write(private, "private.png")
    names = [
        str(tmp_path / "set" / "more" / "own.png"),
        "more/own.png",
        str(private),
        "private.png",
        "../private.png",
        str(tmp_path / "set" / ".." / "private.png"),
        f"file://{private}",
        f"local://{private}",
        f"zip://private.png::{tmp_path / 'private.zip'}",
        f"zip://private.png::file://{tmp_path / 'private.zip'}",
        f"simplecache::file://{private}",
    ]
    naming(tmp_path / "set", *names)
    for path in ("set", str(tmp_path / "set"), "set/train.parquet", "set/*.parquet"):
        train = load(path, streaming=streaming).train
        assert [train.read(row).unique().tolist() for row in (1, 2)] == [[55], [55]]  # type: ignore[union-attr]
        for row in range(3, len(train)):
            assert "private" in str(train.read(row))
            assert values(train)[row] == 9


@pytest.mark.parametrize("protocol", ["http", "ftp", "webhdfs", "zip", "reference"])
def test_rows_name_no_addresses(tmp_path: Path, protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"{protocol}://127.0.0.1:{server.getsockname()[1]}/x.png"
        train = load(naming(tmp_path, address, f"zip://x.png::{address}")).train
        assert all("not in the folder of the data set" in str(train.read(row)) for row in (1, 2))
        with pytest.raises(TimeoutError):
            server.accept()


@given(st.text(st.sampled_from("a/.\\:0x\0"), max_size=12), st.booleans())
def test_no_name_leads_out_of_the_folder(name: str, absolute: bool) -> None:
    place = OwnPlace(("/data/set",))
    try:
        path = place.file(f"/data/set/{name}" if absolute else name)
    except DataError:
        return
    assert os.path.normpath(path).startswith("/data/set")
    assert not os.path.normpath(path).startswith("/data/set.")


def test_archives_of_the_hub_are_read_where_they_were_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    (tmp_path / "downloads").mkdir()
    with zipfile.ZipFile(tmp_path / "downloads" / "0a1b", "w") as archive:
        archive.writestr("folder/a.png", encoded("PNG"))
    place = own_place("owner/name")
    assert place.read(f"zip://folder/a.png::{tmp_path / 'downloads' / '0a1b'}") == encoded("PNG")
    with pytest.raises(DataError, match="archive"):
        place.read(f"zip://gone.png::{tmp_path / 'downloads' / '0a1b'}")
    write_image(tmp_path / "private.png")
    with pytest.raises(DataError, match="not in the folder"):
        place.read(str(tmp_path / "private.png"))


def test_pictures_of_a_cache_behind_a_link_are_read_by_either_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "disk" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for cache in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, cache, tmp_path / "link")
    place = own_place("owner/name")
    for folder in ("link", "disk"):
        assert place.file(str(tmp_path / folder / "a.png"))
    with pytest.raises(DataError, match="not in the folder"):
        place.file(str(tmp_path / "private.png"))


def test_names_of_files_are_taken_as_they_are(tmp_path: Path) -> None:
    for number, name in enumerate(["x::y.png", "zip:x.png", "a b%20.png", "#.png"]):
        write_image(tmp_path / "set" / "c" / name, 10 + number)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    for path in (tmp_path / "set", tmp_path / "link", tmp_path / "set" / ".." / "link"):
        assert sorted(values(load(path).train)) == [10, 11, 12, 13]


def test_a_pipe_among_the_pictures_is_named(tmp_path: Path) -> None:
    naming(tmp_path / "set", "pipe.png")
    os.mkfifo(tmp_path / "set" / "pipe.png")
    assert "no regular file" in str(load(tmp_path / "set").train.read(1))
