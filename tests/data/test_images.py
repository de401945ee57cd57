"""Images of every mode, shape and file become square 8-bit arrays, as the published protocols say."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from itarflow.data import resize
from itarflow.data.images import check_image_size, convert_image, crop_image, spread_over, to_array
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


DAMAGED_EXIF = b"Exif\0\0\x00\x08\x00\x02\x01\x12\x00\x03"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_does_not_cost_the_picture(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    photo = through_file(Image.new("RGB", (3, 2), (10, 200, 10)), kind, exif=DAMAGED_EXIF, **options)
    array = to_array(photo, 3)
    assert array.shape == (3, 2, 3)  # unrotated
    assert np.abs(array.astype(int) - np.array([10, 200, 10])[:, None, None]).max() <= 3


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged blocks
def test_no_exif_block_whatsoever_costs_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    sound, generator = exif.tobytes(), np.random.default_rng(0)
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    shapes = set()
    for _ in range(300):
        block = bytearray(sound[: generator.integers(8, len(sound) + 1)])
        for place in generator.integers(6, len(block), generator.integers(1, 4)):
            block[place] = generator.integers(0, 256)
        shapes.add(to_array(through_file(Image.fromarray(pixels), "PNG", exif=bytes(block)), 1).shape)
    assert shapes == {(1, 2, 3), (1, 3, 2)}


def test_damaged_pixels_are_still_told() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(buffer, "PNG")
    with pytest.raises(OSError, match="truncated"):
        to_array(Image.open(io.BytesIO(buffer.getvalue()[:2000])), 1)


DEEP = pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)])


@DEEP
def test_deep_grey_is_scaled_from_all_of_16_bits_whatever_it_uses(kind: str, dtype: type) -> None:
    for top in (4096, 4100, 16383, 65535):
        array = np.array([[0, top // 2, top]], dtype=dtype)
        expected = [round(value / 257) for value in (0, top // 2, top)]
        assert to_array(through_file(Image.fromarray(array), kind), 1)[0].tolist() == [expected]
        assert to_array(through_file(Image.fromarray(array), kind), 3)[0].tolist() == [expected]


@DEEP
def test_deep_grey_that_may_have_fewer_bits_is_refused_with_the_reason(kind: str, dtype: type) -> None:
    for top, words in (
        (3900, "reach 3,900 of 65,535: 12 bits"),
        (4095, "12 bits"),
        (255, ": 8 bits"),
        (1, ": 8 bits"),
    ):
        array = np.array([[0, top // 2, top]], dtype=dtype)
        with pytest.raises(DataError, match=f"{words}.* nearly black; convert it to 8 bits"):
            to_array(through_file(Image.fromarray(array), kind), 1)
    assert not to_array(through_file(Image.fromarray(np.zeros((1, 3), dtype)), kind), 1).any()


def test_a_tiff_that_states_12_bits_is_scaled_from_them() -> None:
    pixels = bytes([0x00, 0x0F, 0xFF, 0x02, 0x00, 0x00])  # 0, 4095, 32, and four bits of filling
    fields = [(256, 4, 3), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, 1), (279, 4, 6)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in fields)
    tiff = b"II*\0" + struct.pack("<I", 14) + pixels + struct.pack("<H", len(fields)) + entries + bytes(4)
    assert to_array(Image.open(io.BytesIO(tiff)), 1)[0].tolist() == [[0, 255, 2]]
    dark = tiff.replace(pixels, bytes([0x00, 0x00, 0x08, 0x01, 0x00, 0x00]))  # 0, 8, 16
    assert to_array(Image.open(io.BytesIO(dark)), 1)[0].tolist() == [[0, 0, 1]]


def test_a_dark_picture_of_a_format_that_tells_its_depth_stays_dark() -> None:
    pgm = b"P5 2 1 65535\n" + struct.pack(">2H", 0, 2570)
    assert to_array(Image.open(io.BytesIO(pgm)), 1)[0].tolist() == [[0, 10]]
    scan = b"P5 2 1 4095\n" + struct.pack(">2H", 0, 4095)
    assert to_array(Image.open(io.BytesIO(scan)), 1)[0].tolist() == [[0, 255]]


def _deep_png(pixels: np.ndarray) -> Image.Image:
    """A PNG of 16-bit colour (H, W, 3), which Pillow can't write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts)))


def test_deep_colour_of_twelve_bits_is_told() -> None:
    colours = np.array([[[4095, 2000, 0]]])
    with pytest.raises(DataError, match=r"reaches only to 15 of 255.* 12 bits"):
        to_array(_deep_png(colours), 3)
    assert to_array(_deep_png(colours * 16), 3).ravel().tolist() == [255, 125, 0]
    assert to_array(_deep_png(colours * 0), 3).ravel().tolist() == [0, 0, 0]


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


@pytest.mark.parametrize("protocol", ["center", "adm", "edm", "pad"])
def test_crop_gives_the_size_whatever_comes_in(protocol: Any) -> None:
    for size in ((5, 5), (3, 9), (9, 2), (1, 1), (64, 11)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        square = crop_image(image, 5, protocol)
        assert square.size == (5, 5), size
        assert size != (5, 5) or square.tobytes() == image.tobytes()


def _torchvision(image: Image.Image, size: int) -> np.ndarray:
    """`Resize(size)` and `CenterCrop(size)`, as torchvision computes them."""
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    whole = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(whole.crop((left, top, left + size, top + size)))


def _adm(image: Image.Image, size: int) -> np.ndarray:
    """`center_crop_arr` of ADM."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("longest", [resize._LONGEST, 0])
@pytest.mark.parametrize(("protocol", "published"), [("center", _torchvision), ("adm", _adm)])
def test_the_middle_alone_has_the_pixels_of_the_whole(
    protocol: Any, published: Any, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resize, "_LONGEST", longest)  # with 0 nothing that is enlarged is resized as a whole
    generator = np.random.default_rng(0)
    for index in range(300):
        short, size = int(generator.integers(1, 40)), int(generator.integers(1, 70))
        long = int(short * generator.uniform(1, 40 if index % 2 else 3))
        shape = ((short, long), (long, short))[index % 4 // 2]
        pixels = generator.integers(0, 256, (*shape, 3) if index % 3 else shape, dtype=np.uint8)
        image = Image.fromarray(pixels)
        found = np.asarray(crop_image(image, size, protocol))
        np.testing.assert_array_equal(found, published(image, size), str((shape, size)))


@pytest.mark.parametrize("protocol", ["center", "adm", "edm", "pad"])
@pytest.mark.parametrize("size", [(1, 65000), (65000, 1), (20000, 2)])
def test_a_thin_picture_needs_little_memory(protocol: Any, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    made: list[int] = []
    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", _noting(made, Image.Image.resize))
        square = crop_image(image, 256, protocol)
    _, peak = tracemalloc.get_traced_memory()  # of numpy
    tracemalloc.stop()
    assert square.size == (256, 256)
    middle = 127 if protocol == "pad" else 128
    assert np.asarray(square)[middle, middle].tolist() == [10, 20, 30]
    assert max(made) <= 2**22
    assert peak < 2**25


def _noting(made: list[int], original: Any) -> Any:
    def resized(self: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return original(self, size, *args, **options)  # type: ignore[no-any-return]

    return resized


def test_pad_keeps_all_of_the_picture_on_white() -> None:
    image = crop_image(Image.new("RGB", (40, 20), (255, 0, 0)), 8, "pad")
    expected = np.full((8, 8, 3), 255)
    expected[2:6] = 255, 0, 0
    np.testing.assert_array_equal(np.asarray(image), expected)
    grey = np.asarray(crop_image(Image.new("L", (3, 9), 7), 6, "pad"))
    np.testing.assert_array_equal(grey, np.array([[255, 255, 7, 7, 255, 255]] * 6))


@pytest.mark.parametrize("size", [0, -1, 10**9])
def test_sizes_that_no_image_has_are_refused(size: int) -> None:
    with pytest.raises(DataError, match=f"image_size is {size}; expected 1 to 32768"):
        check_image_size(size, 3, "center")


def test_unknown_crop_is_refused() -> None:
    with pytest.raises(DataError, match=r"crop 'top'.*center, adm, edm, pad"):
        crop_image(Image.new("L", (2, 2)), 2, "top")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("total", "count", "wanted"), [(10, 3, [0, 3, 6]), (3, 3, [0, 1, 2]), (5, 1, [0]), (0, 0, [])]
)
def test_indices_are_spread_from_the_first_on(total: int, count: int, wanted: list[int]) -> None:
    assert spread_over(total, count) == wanted
