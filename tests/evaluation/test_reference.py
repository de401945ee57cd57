"""Statistics of real images: computed once, kept, read from files, and refused if they are of something else."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from image_files import TYPED, damage, typed_columns, write_image, write_parquet
from safetensors import SafetensorError
from tiny_extractor import TinyExtractor, tiny_inception

from itarflow.data import DataConfig
from itarflow.evaluation.metrics import reference as references
from itarflow.evaluation.metrics.extractors import INCEPTION, POOL_FEATURES, SPATIAL_FEATURES
from itarflow.evaluation.metrics.features import Sums
from itarflow.evaluation.metrics.reference import read_reference, reference_of
from itarflow.runtime.errors import DataError, RunError

SIZE = 8


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        write_image(tmp_path / "images" / f"{index}.png", 40 * index)
    return tmp_path / "images"


@pytest.fixture
def options(tmp_path):
    """Of both ways to get a reference."""
    shared = {"image_size": SIZE, "extractor": TinyExtractor(), "accelerator": Accelerator(cpu=True)}
    return shared | {"cache": tmp_path / "cache", "batch_size": 4}


def compute(path, options, **changes):
    data = {name: changes.pop(name) for name in ("crop", "split", "streaming", "max_broken") if name in changes}
    return reference_of(DataConfig(path=str(path), num_workers=0, **data), **{"in_channels": 3} | options | changes)


def read(path, options, **changes):
    return read_reference(path, **{"crop": "center"} | options | changes)


def kept(options):
    return sorted(options["cache"].iterdir())


def write_npz(path, count=5, size=SIZE, **arrays):
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    np.savez(path, **{"arr_0": images} | arrays)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def moments(scale=1.0, mean="mu", covariance="sigma", count=POOL_FEATURES):
    return {mean: np.full(count, scale, np.float32), covariance: scale * np.eye(count)}


def test_the_reference_is_of_all_images_of_the_split(folder, options):
    reference = compute(folder, options, keep=3)
    values = torch.arange(6)[:, None] * 40 / 255 * torch.ones(4)
    expected = Sums.of(values).moments()
    torch.testing.assert_close(reference.pool.mean, expected.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reference.pool.covariance, expected.covariance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reference.features, values[[1, 3, 5]])
    assert reference.spatial is None
    origin = reference.origin
    assert (origin.source, origin.count, origin.image_size, origin.crop) == ("images, split train", 6, SIZE, "center")


def test_a_second_call_reads_what_the_first_has_kept(folder, options, monkeypatch):
    first = compute(folder, options | {"extractor": tiny_inception()})
    monkeypatch.setattr(references, "in_order", None)  # reading images fails
    again = tiny_inception()
    second = compute(folder, options | {"extractor": again})
    assert again.seen == 0
    assert second.origin == first.origin
    for ours, theirs in ((first.pool, second.pool), (first.spatial, second.spatial)):
        torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=0, atol=0)
    torch.testing.assert_close(first.features, second.features, rtol=0, atol=0)


def test_whatever_changes_the_features_has_a_file_of_its_own(folder, options):
    compute(folder, options)
    for number, changes in enumerate((
        {"crop": "adm"}, {"split": "train[:4]"}, {"image_size": 4}, {"in_channels": 1}, {"keep": 2},
        {"extractor": TinyExtractor("tiny", "2" * 64)},
    )):  # fmt: skip
        compute(folder, options, **changes)
        assert len(kept(options)) == number + 2, changes
    write_image(folder / "3.png", 7)
    assert float(compute(folder, options).pool.mean[0]) == pytest.approx((40 * 12 + 7) / 6 / 255, rel=1e-5)
    assert len(kept(options)) == 8
    os.utime(folder / "3.png", ns=(1, 1))
    compute(folder, options)
    assert len(kept(options)) == 9


@pytest.mark.parametrize("streaming", [False, True])
def test_a_changed_parquet_file_is_computed_anew(tmp_path, options, streaming):
    for shade in (1, 2):
        for _ in range(2):
            if not options["cache"].exists() or len(kept(options)) < shade:
                write_parquet(tmp_path / "data" / "train.parquet", typed_columns(4, 10 * shade), TYPED)
            found = compute(tmp_path / "data", options, streaming=streaming)
        assert float(found.pool.mean[0]) == pytest.approx((10 * shade + 1.5) / 255, rel=1e-5)
        assert len(kept(options)) == shade


def test_unreadable_images_are_named(folder, options):
    damage(folder / "2.png")
    for _ in range(2):  # the cache tells as well
        (broken,) = compute(folder, options).origin.broken
        assert "2.png: " in broken


def test_too_many_unreadable_images_are_refused(folder, options):
    for name in ("2.png", "4.png"):
        damage(folder / name)
    with pytest.raises(DataError, match="2 images could not be read"):
        compute(folder, options, max_broken=1)
    assert not options["cache"].exists() or kept(options) == []
    assert len(compute(folder, options, max_broken=2).origin.broken) == 2


def test_a_folder_that_can_not_be_written_is_refused_before_the_work(folder, options):
    options["cache"].write_text("a file")
    with pytest.raises(RunError):
        compute(folder, options)
    assert options["extractor"].seen == 0


def test_a_kept_file_serves_only_the_same_size_crop_and_extractor(folder, options):
    expected = compute(folder, options)
    (path,) = kept(options)
    torch.testing.assert_close(read(path, options).pool.mean, expected.pool.mean, rtol=0, atol=0)
    for changes, words in (
        ({"image_size": 16}, "image_size 8, but 16"),
        ({"crop": "adm"}, "crop center, but adm"),
        ({"extractor": TinyExtractor("other")}, "extractor tiny, but other"),
        ({"extractor": TinyExtractor(identity="2" * 64)}, "weights 1111"),
    ):
        with pytest.raises(ValueError, match=words):
            read(path, options, **changes)


def test_damaged_and_foreign_files_are_refused(tmp_path, folder, options):
    compute(folder, options)
    (path,) = kept(options)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match="delete it"):
        compute(folder, options)
    for name in ("none.safetensors", "none.npz"):
        with pytest.raises(OSError, match="no file"):
            read(tmp_path / name, options)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="no whole"):
        read(tmp_path / "text.npz", options)


@pytest.mark.slow
def test_adm_statistics_are_taken_as_they_are_with_features_of_the_images(tmp_path, options):
    images = write_npz(tmp_path / "adm.npz", **moments(2.0), **moments(3.0, "mu_s", "sigma_s", SPATIAL_FEATURES))
    for seen in (5, 0):
        extractor = tiny_inception()
        reference = read(tmp_path / "adm.npz", options, extractor=extractor)
        assert extractor.seen == seen
        assert reference.pool.mean.dtype == torch.float64
        assert float(reference.pool.mean.sum()) == 2 * POOL_FEATURES
        assert float(reference.spatial.covariance.trace()) == 3 * SPATIAL_FEATURES
        torch.testing.assert_close(reference.features, tiny_inception()(images).pool)
        assert (reference.origin.count, reference.origin.crop, reference.origin.image_size) == (None, None, SIZE)


def test_moments_without_images_serve_inception_alone(tmp_path, options):
    np.savez(tmp_path / "few.npz", **moments())
    reference = read(tmp_path / "few.npz", options, extractor=tiny_inception())
    assert reference.features is None
    assert reference.spatial is None
    assert reference.origin.image_size is None
    for extractor in (TinyExtractor(), tiny_inception(f"{INCEPTION} of 1234abcd")):
        with pytest.raises(ValueError, match="no images"):
            read(tmp_path / "few.npz", options, extractor=extractor)


def test_other_extractors_compute_all_from_the_images(tmp_path, options):
    images = write_npz(tmp_path / "adm.npz", **moments(2.0))
    reference = read(tmp_path / "adm.npz", options)
    expected = Sums.of(TinyExtractor()(images).pool).moments()
    torch.testing.assert_close(reference.pool.covariance, expected.covariance)
    assert reference.origin.count == 5


def test_npz_files_of_another_size_or_shape_are_refused(tmp_path, options):
    write_npz(tmp_path / "large.npz", size=16)
    with pytest.raises(ValueError, match="16 x 16 pixels, but the samples have 8 x 8"):
        read(tmp_path / "large.npz", options)
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, SIZE, SIZE, 3)))
    with pytest.raises(ValueError, match="expected uint8 images"):
        read(tmp_path / "float.npz", options)
    np.savez(tmp_path / "short.npz", **moments(count=10))
    with pytest.raises(ValueError, match=r"mu of shape \(10,\)"):
        read(tmp_path / "short.npz", options, extractor=tiny_inception())


def test_pickles_in_npz_files_are_not_opened(tmp_path, options):
    np.savez(tmp_path / "evil.npz", mu=np.array([{}] * POOL_FEATURES, dtype=object), sigma=np.eye(POOL_FEATURES))
    with pytest.raises(ValueError, match="Python objects"):
        read(tmp_path / "evil.npz", options, extractor=tiny_inception())


def test_statistics_that_can_not_be_kept_are_used_all_the_same(folder, options, monkeypatch):
    whole = compute(folder, options | {"cache": options["cache"].parent / "other"})

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(references, "save_file", full)
    with pytest.warns(UserWarning, match=r"could not be kept: .*No space left on device"):
        found = compute(folder, options)
    assert torch.equal(found.pool.covariance, whole.pool.covariance)
    assert kept(options) == []


def test_a_flipped_bit_of_kept_statistics_is_noticed(folder, options):
    compute(folder, options)
    (path,) = kept(options)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(RunError, match="its checksum is that of other numbers"):
        compute(folder, options)


def test_an_npz_that_claims_more_than_it_holds_is_refused(tmp_path, options):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**13, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    with pytest.raises(ValueError, match="more than the file holds"):
        read(tmp_path / "a.npz", options)


def test_a_pipe_among_kept_statistics_is_not_waited_for(folder, options):
    compute(folder, options)
    (path,) = kept(options)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RunError, match="no regular file"):
        compute(folder, options)
