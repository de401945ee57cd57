"""Images of every mode, shape and file become square 8-bit arrays, as the published protocols say."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from itarflow.data.images import convert_image, crop_image, spread_over, to_array
from itarflow.runtime.errors import DataError


def through_file(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


GREY = np.array([[0, 100], [200, 255]], dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY), GREY),
        (Image.fromarray(GREY).convert("P"), GREY),
        (Image.fromarray(GREY).convert("RGB"), GREY),
        (Image.fromarray(GREY > 128), np.where(GREY > 128, 255, 0)),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        (Image.fromarray((GREY * 257.0 - 100 * (GREY > 0)).astype(np.int32)), GREY),
        (Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (2, 2), 0)]), np.full((2, 2), 255)),
        (Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (2, 2), 255)]), GREY),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), np.full((2, 2), 204)),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 155)), np.full((2, 2), 100)),
        (through_file(Image.fromarray(GREY), "PNG", transparency=0), np.array([[255, 100], [200, 255]])),
        (
            through_file(Image.fromarray(GREY).convert("P"), "GIF", transparency=0),
            np.array([[255, 100], [200, 255]]),
        ),
        (through_file(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), GREY),
    ],
    ids=[
        "L",
        "P",
        "RGB",
        "1",
        "I;16",
        "I",
        "LA-clear",
        "LA-opaque",
        "RGBA",
        "CMYK",
        "L-tRNS",
        "P-clear",
        "16-bit-PNG",
    ],
)
def test_every_mode_becomes_8_bit(image: Image.Image, expected: np.ndarray) -> None:
    before = image.tobytes()
    for in_channels in (1, 3):
        array = to_array(image, in_channels)
        assert array.dtype == np.uint8
        assert array.shape == (in_channels, 2, 2)
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, np.broadcast_to(expected, array.shape))
    assert image.tobytes() == before


def test_colour_keeps_its_channel_order() -> None:
    assert to_array(Image.new("RGB", (1, 1), (1, 2, 3)), 3).ravel().tolist() == [1, 2, 3]


def test_exif_orientation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photo = through_file(Image.fromarray(np.array([[10, 20, 30]], dtype=np.uint8)), "PNG", exif=exif)
    assert to_array(photo, 1)[0].tolist() == [[10], [20], [30]]
    assert convert_image(convert_image(photo, 1), 1).size == (1, 3)


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.float32), np.full((2, 2), 70000, np.int32), -np.eye(2)])
def test_pixels_of_unknown_range_are_refused(array: np.ndarray) -> None:
    image = Image.fromarray(array.astype(np.int32) if array.dtype == np.float64 else array)
    with pytest.raises(DataError, match="expected"):
        convert_image(image, 3)


@pytest.mark.parametrize("in_channels", [0, 2, 4])
def test_other_channel_counts_are_refused(in_channels: int) -> None:
    with pytest.raises(DataError, match=f"in_channels is {in_channels}"):
        to_array(Image.new("L", (2, 2)), in_channels)


RAMP = np.tile(np.array([0, 70, 140, 210], dtype=np.uint8), (4, 1))


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("center", [50, 160]),  # triangle filter: (0.75 * 0 + 0.75 * 70 + 0.25 * 140) / 1.75
        ("adm", [35, 175]),  # one box halving reaches the size, bicubic then changes nothing
        ("edm", np.asarray(Image.fromarray(RAMP).resize((2, 2), Image.Resampling.LANCZOS))[0].tolist()),
    ],
)
def test_crop_resizes_as_published(protocol: Any, expected: list[int]) -> None:
    image = crop_image(Image.fromarray(RAMP), 2, protocol)
    np.testing.assert_array_equal(np.asarray(image), [expected, expected])


@pytest.mark.parametrize(("protocol", "left"), [("center", 2), ("adm", 1), ("edm", 1)])
@pytest.mark.parametrize("upright", [False, True])
def test_crop_cuts_where_published(protocol: Any, left: int, upright: bool) -> None:
    array = np.arange(28, dtype=np.uint8).reshape(4, 7)  # torchvision rounds 1.5 to 2, the others to 1
    expected = array[:, left : left + 4]
    image = crop_image(Image.fromarray(array.T if upright else array), 4, protocol)
    np.testing.assert_array_equal(np.asarray(image), expected.T if upright else expected)


def test_adm_halves_before_bicubic() -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    halved = Image.fromarray(array).resize((15, 20), Image.Resampling.BOX)
    expected = halved.resize((9, 12), Image.Resampling.BICUBIC).crop((0, 1, 9, 10))
    assert crop_image(Image.fromarray(array), 9, "adm").tobytes() == expected.tobytes()


def test_edm_crops_before_lanczos() -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, 31), dtype=np.uint8)
    expected = Image.fromarray(array[4:35]).resize((9, 9), Image.Resampling.LANCZOS)
    assert crop_image(Image.fromarray(array), 9, "edm").tobytes() == expected.tobytes()


@pytest.mark.parametrize("protocol", ["center", "adm", "edm"])
def test_crop_gives_the_size_whatever_comes_in(protocol: Any) -> None:
    for size in ((5, 5), (3, 9), (9, 2), (1, 1), (64, 11)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        square = crop_image(image, 5, protocol)
        assert square.size == (5, 5), size
        assert size != (5, 5) or square.tobytes() == image.tobytes()


def test_unknown_crop_is_refused() -> None:
    with pytest.raises(DataError, match=r"crop 'top'.*center, adm, edm"):
        crop_image(Image.new("L", (2, 2)), 2, "top")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("total", "count", "wanted"), [(10, 3, [0, 3, 6]), (3, 3, [0, 1, 2]), (5, 1, [0]), (0, 0, [])]
)
def test_indices_are_spread_from_the_first_on(total: int, count: int, wanted: list[int]) -> None:
    assert spread_over(total, count) == wanted
