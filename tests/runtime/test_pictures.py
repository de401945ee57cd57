"""Grids of images, and image files that are written whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itarflow.runtime.pictures import (
    balanced_columns,
    captioned_grid,
    check_picture,
    grid_size,
    image_grid,
    save_picture,
    titled_grid,
    wrapped,
)


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (7, 4), (10, 5), (12, 4), (16, 4), (17, 6), (20, 5), (40, 8), (100, 10)]
)
def test_columns_leave_the_fewest_holes(count, columns):
    assert balanced_columns(count) == columns


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 2), (6, 3), (7, 3)])
@pytest.mark.parametrize("size", [(8, 8), (100, 60)])
def test_the_size_of_a_grid_is_known_before_it_is_drawn(size, count, columns):
    images = [Image.new("RGB", size)] * count
    assert grid_size(*size, count, columns) == image_grid(images, columns).size
    titles = ["a"] * columns
    assert grid_size(*size, count, columns, titles=1) == titled_grid(images, titles).size
    if columns <= count:
        assert grid_size(*size, count, columns, captions=1) == captioned_grid(images, ["a"] * count, columns).size


def test_a_long_title_stays_in_its_column():
    images = [Image.new("L", (96, 96), 255)] * 2
    page = np.asarray(titled_grid(images, ["", "Staffordshire bull terrier of the north"]))
    assert (page[:21, 98:] < 128).any()
    assert (page[:21, :96] == 255).all()


def test_a_png_carries_texts_and_other_formats_do_without(tmp_path: Path):
    image = Image.new("RGB", (4, 4), "red")
    save_picture(image, tmp_path / "a.png", {"seed": 3, "label": "chât 猫"})
    assert Image.open(tmp_path / "a.png").text == {"seed": "3", "label": "chât 猫"}
    save_picture(image, tmp_path / "a.jpg", {"seed": 3})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.jpg", "a.png"]


def test_what_can_not_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.png"
    save_picture(Image.new("L", (4, 4)), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_picture(Image.new("L", (8, 8)), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("a.webp", (98, 16_600), "98 x 16600 pixels: .*use .png"),
        ("a.jpg", (70_000, 8), "as JPEG, with 70000 x 8 pixels"),
        ("a.ico", (400, 400), "would have 256 x 256 pixels as ICO in place of 400 x 400"),
        ("a.h5", (8, 8), "can't be written as HDF5"),
        ("a.doc", (8, 8), "unknown image format"),
    ],
)
def test_a_format_that_can_not_hold_an_image_is_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        check_picture(Path(name), size, "RGB")
    check_picture(Path("a.png"), size, "RGB")


def test_captions_are_wrapped_into_as_many_lines_and_what_does_not_fit_is_left_out():
    found = wrapped(["a photo of a seven", "", "x " * 60], 8)
    assert found[0] == "a photo of a\nseven\n"
    assert found[1] == "\n\n"
    assert found[2].endswith(" ...")
    assert len(max(found[2].split("\n"), key=len)) <= 13
