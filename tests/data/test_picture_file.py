"""Pictures of others: what is no picture file is refused at once, and no program is started for it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itarflow.data import picture_file
from itarflow.data.picture_file import PICTURE_FORMATS, open_picture
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
