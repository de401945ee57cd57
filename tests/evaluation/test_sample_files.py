import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itarflow.evaluation.samples.files import (
    Samples,
    batches,
    open_samples,
    shard_name,
    write_npz,
    write_png,
    write_shard,
)
from itarflow.runtime.errors import DataError


def pictures(count: int, channels: int = 3, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def stored(folder: Path, images: torch.Tensor, size: int, broken: tuple[int, ...] = ()) -> Samples:
    bad = torch.zeros(len(images), dtype=torch.bool)
    bad[list(broken)] = True
    for start in range(0, len(images), size):
        stop = min(start + size, len(images))
        labels = torch.arange(start, stop) % 3
        write_shard(folder / shard_name(start, stop), images[start:stop], labels, bad[start:stop])
    return open_samples(folder)


def test_stored_samples_are_read_across_files(tmp_path: Path) -> None:
    images = pictures(10)
    samples = stored(tmp_path / "made" / "raw", images, 4, broken=(1, 9))
    assert (len(samples), samples.image_shape, samples.name) == (10, (3, 6, 6), "made/raw")
    assert torch.equal(samples.read(3, 9), images[3:9])
    assert torch.equal(torch.cat(list(batches(samples, 3))), images)
    assert [len(part) for part in batches(samples, 3, 1, 8)] == [3, 3, 1]
    assert samples.labels is not None
    assert samples.labels.tolist() == [index % 3 for index in range(10)]
    assert samples.broken.tolist() == [1, 9]


def test_a_gap_a_damaged_file_and_another_size_are_refused(tmp_path: Path) -> None:
    images = pictures(9)
    stored(tmp_path / "raw", images, 3)
    middle = tmp_path / "raw" / shard_name(3, 6)
    whole = middle.read_bytes()
    middle.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=re.escape(str(middle))):
        open_samples(tmp_path / "raw").read(0, 9)
    middle.unlink()
    with pytest.raises(DataError, match="end, at 3"):
        open_samples(tmp_path / "raw")
    write_shard(middle, pictures(3, size=4), torch.zeros(3).long(), torch.zeros(3).bool())
    with pytest.raises(DataError, match="expected one size"):
        open_samples(tmp_path / "raw")


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_the_adm_suite_reads(tmp_path: Path, channels: int) -> None:
    images = pictures(5, channels)
    write_npz(stored(tmp_path / "raw", images, 2), tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (5, 6, 6, 3)
        assert file["arr_0"].dtype == np.uint8
        assert (file["arr_0"] == images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()).all()
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1]
    again = open_samples(tmp_path / "samples.npz")
    assert torch.equal(again.read(1, 4), images.expand(-1, 3, -1, -1)[1:4])
    assert len(again) == 5
    assert again.labels is not None


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_are_read_back_and_not_written_twice(tmp_path: Path, channels: int) -> None:
    images = pictures(5, channels)
    samples = stored(tmp_path / "raw", images, 2)
    write_png(samples, tmp_path / "png")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "png").iterdir()}
    (tmp_path / "png" / "00000003.png").unlink()
    write_png(samples, tmp_path / "png")
    again = open_samples(tmp_path / "png")
    assert again.image_shape == (channels, 6, 6)
    assert torch.equal(again.read(0, 5), images)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "png").iterdir()}
    assert [path.name for path in before if after[path] != before[path]] == ["00000003.png"]


def test_files_that_a_kill_left_half_written_are_passed_over(tmp_path: Path) -> None:
    images = pictures(4)
    stored(tmp_path / "raw", images, 2)
    (tmp_path / "raw" / ".partial-5e2dc20b00000004-00000008.safetensors").write_bytes(b"half")
    assert torch.equal(open_samples(tmp_path / "raw").read(0, 4), images)
    write_png(open_samples(tmp_path / "raw"), tmp_path / "png")
    (tmp_path / "png" / ".partial-5e2dc20b00000004.png").write_bytes(b"half")
    assert len(open_samples(tmp_path / "png")) == 4


def test_what_holds_no_samples_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder nor"):
        open_samples(tmp_path / "nothing")
    with pytest.raises(DataError, match="has no images"):
        open_samples(tmp_path)
    stored(tmp_path / "raw", pictures(2), 2)
    with pytest.raises(DataError, match="name one of them"):
        open_samples(tmp_path)
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(DataError, match="float64"):
        open_samples(tmp_path / "floats.npz")
    np.savez(tmp_path / "named.npz", mu=np.zeros(4))
    with pytest.raises(DataError, match="no arr_0"):
        open_samples(tmp_path / "named.npz")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "floats.npz").read_bytes()[:100])
    with pytest.raises(DataError, match="Copy or download"):
        open_samples(tmp_path / "torn.npz")


def test_pictures_of_two_sizes_are_refused(tmp_path: Path) -> None:
    for size in (4, 5):
        Image.new("RGB", (size, size)).save(tmp_path / f"{size}.png")
    with pytest.raises(DataError, match="5 x 5 pixels, others 4 x 4"):
        open_samples(tmp_path).read(0, 2)


def test_pictures_of_16_bits_are_scaled_as_for_training(tmp_path: Path) -> None:
    deep = np.array([[0, 256], [32768, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    samples = open_samples(tmp_path)
    assert samples.image_shape == (1, 2, 2)
    assert samples.read(0, 1).flatten().tolist() == pytest.approx([0, 1, 128, 255], abs=1)


def test_pictures_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    with pytest.raises(DataError, match=r"a.png can't be read"):
        open_samples(tmp_path)
    os.remove(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="no regular file"):
        open_samples(tmp_path)


def _npz(path: Path, shape: tuple[int, ...], content: bytes = b"", labels: np.ndarray | None = None) -> Path:
    """An .npz file whose header claims a shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + content)
        if labels is not None:
            array = io.BytesIO()
            np.save(array, labels, allow_pickle=labels.dtype.hasobject)
            archive.writestr("arr_1.npy", array.getvalue())
    return path


@pytest.mark.parametrize("count", [10**13, 10**30])
def test_an_npz_that_claims_more_than_it_holds_is_refused_before_memory_is_taken(tmp_path: Path, count: int) -> None:
    path = _npz(tmp_path / "a.npz", (count, 8, 8, 3), bytes(192))
    with pytest.raises(DataError, match="more than the file holds"):
        open_samples(path)


def test_what_is_no_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no whole \.npz file"):
        open_samples(path)
    with path.open("wb") as file:
        np.save(file, np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"no whole \.npz file"):
        open_samples(path)
    with pytest.raises(DataError, match=r"arr_0 of uint8, shape \(0, 4, 4, 3\)"):
        open_samples(_npz(path, (0, 4, 4, 3)))
    with pytest.raises(DataError, match="Python objects"):
        open_samples(_npz(path, (1, 2, 2, 3), bytes(12), np.array([{}])))


@pytest.mark.parametrize(
    "labels", [np.arange(3), np.zeros((2, 1), np.int64), np.array([0.5, 1]), np.array(["a", "b"])]
)
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    path = _npz(tmp_path / "a.npz", (2, 2, 2, 3), bytes(24), labels)
    with pytest.raises(DataError, match="expected a label, a whole number, for each of the 2 images"):
        open_samples(path)


def test_pngs_of_others_are_not_counted_as_samples(tmp_path: Path) -> None:
    samples = stored(tmp_path / "raw", pictures(3), 2)
    write_png(samples, tmp_path / "png")
    Image.new("RGB", (6, 6)).save(tmp_path / "png" / "00000001.png")
    write_png(samples, tmp_path / "png")
    assert torch.equal(open_samples(tmp_path / "png").read(0, 3), pictures(3))
    Image.new("RGB", (6, 6)).save(tmp_path / "png" / "00000003.png")
    with pytest.raises(DataError, match=r"other things than these 3 samples: 00000003.png"):
        write_png(samples, tmp_path / "png")


def test_png_files_are_not_written_through_a_link(tmp_path: Path) -> None:
    samples = stored(tmp_path / "raw", pictures(2), 2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "raw-png").symlink_to("elsewhere")
    with pytest.raises(DataError, match="raw-png is a link to another folder"):
        write_png(samples, tmp_path / "raw-png")
    assert not list((tmp_path / "elsewhere").iterdir())
