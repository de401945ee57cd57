"""Features of many images, by one process and by several."""

import signal

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, PartialState
from tiny_extractor import TinyExtractor

from itarflow.data import DataConfig
from itarflow.evaluation.metrics.features import Sums, evenly_spaced, extract
from itarflow.evaluation.metrics.reference import reference_of


def in_process(out):
    """What one of several processes does; a fork, because imports take longer than the work."""
    signal.alarm(60)  # a process that hangs ends, and fails the test
    PartialState._reset_state()
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    torch.save(digits_twice(out / "cache", accelerator), out / f"{accelerator.process_index}.pt")


def digits_twice(cache, accelerator):
    """The reference of the digits at the second call, and how many images this process has seen."""
    extractor = TinyExtractor(width=6)
    for _ in range(2):
        reference = reference_of(
            DataConfig(path="digits", num_workers=0),
            image_size=8,
            in_channels=1,
            extractor=extractor,
            accelerator=accelerator,
            keep=100,
            batch_size=64,
            cache=cache,
        )
    return reference.pool, reference.spatial, reference.features, extractor.seen


def pictures(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)


def numbered(images, size):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    return ((part, images[part]) for part in order.split(size))


@pytest.mark.parametrize(("total", "wanted", "found"), [
    (10, 5, [1, 3, 5, 7, 9]), (3, 10, [0, 1, 2]), (100, 1, [50]), (5, 0, []),
])  # fmt: skip
def test_kept_images_are_evenly_spaced(total, wanted, found):
    assert evenly_spaced(total, wanted).tolist() == found


@pytest.mark.parametrize("size", [1, 7, 2000])
def test_neither_order_nor_batches_matter(size):
    images, done = pictures(1500 if size > 1 else 30), []
    extractor = TinyExtractor(width=6)
    found = extract(extractor, numbered(images, size), len(images), keep=10, count=done.append)
    features = TinyExtractor(width=6)(images)
    expected = Sums.of(features.pool)
    assert found.count == len(images) == sum(done) == extractor.seen
    torch.testing.assert_close(found.pool.scatter, expected.scatter, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.spatial.mean, Sums.of(features.spatial).mean, rtol=1e-12, atol=1e-12)
    kept = evenly_spaced(len(images), 10)
    torch.testing.assert_close(found.kept.pool, features.pool[kept])
    torch.testing.assert_close(found.kept.logits, features.logits[kept])


def test_features_of_all_are_kept_unless_told_otherwise():
    images = pictures(20)
    found = extract(TinyExtractor(), numbered(images, 6), 20)
    torch.testing.assert_close(found.kept.pool, TinyExtractor()(images).pool)
    assert found.spatial is None
    assert found.kept.logits is None


@pytest.mark.parametrize("indices", [[0, 1], [0, 1, 1], [0, 1, 2, 2]])
def test_missing_and_repeated_images_are_refused(indices):
    batches = [(torch.tensor([index]), pictures(1)) for index in indices]
    with pytest.raises(ValueError, match="each of 3 images exactly once"):
        extract(TinyExtractor(), batches, 3)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="0 images"):
        extract(TinyExtractor(), [], 0)


@pytest.mark.slow
def test_two_processes_give_the_reference_of_one(tmp_path):
    debug_launcher(in_process, (tmp_path,), num_processes=2)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    one = digits_twice(tmp_path / "other", Accelerator(cpu=True))
    two = [torch.load(tmp_path / f"{index}.pt", weights_only=False) for index in range(2)]
    for pool, spatial, features, seen in two:
        torch.testing.assert_close(pool.covariance, one[0].covariance, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(spatial.covariance, one[1].covariance, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(features, one[2])
        assert 0 < seen < 1797
    # The second calls took what the first had kept.
    assert one[3] == two[0][3] + two[1][3] == 1797
