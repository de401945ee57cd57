"""Batches come in the promised order, whatever reads them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import load, write_classes, write_one_broken

from itarflow.batches import Batch, GlobalBatchSampler, batches, in_order
from itarflow.data import DataConfig, ImageDataset, load_data
from itarflow.images import DataError


def steps(count: int, **options: Any) -> list[list[int]]:
    return list(islice(GlobalBatchSampler(**options), count))


def test_every_image_once_an_epoch_and_epochs_differ() -> None:
    flat = [index for batch in steps(15, num_images=10, global_batch_size=4) for index in batch]
    epochs = [flat[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert {len(batch) for batch in steps(15, num_images=10, global_batch_size=4)} == {4}


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("start_step", [0, 3])
def test_step_is_the_same_however_it_is_cut(num_processes: int, accumulation: int, start_step: int) -> None:
    shared = {"num_images": 37, "global_batch_size": 24, "seed": 5}
    expected = steps(8, **shared)[start_step:]
    parts = [
        steps(
            (8 - start_step) * accumulation,
            **shared,
            num_processes=num_processes,
            process_index=process,
            accumulation=accumulation,
            start_step=start_step,
        )
        for process in range(num_processes)
    ]
    for step, whole in enumerate(expected):
        cuts = [parts[p][step * accumulation + a] for a in range(accumulation) for p in range(num_processes)]
        assert [index for cut in cuts for index in cut] == whole


def test_batch_larger_than_the_set() -> None:
    first, second = steps(2, num_images=3, global_batch_size=8)
    assert [sorted((first + second)[start : start + 3]) for start in range(0, 15, 3)] == [[0, 1, 2]] * 5


def test_order_is_stable_across_versions_and_iterations() -> None:
    sampler = GlobalBatchSampler(num_images=8, global_batch_size=8, seed=1)
    pinned = [2, 5, 1, 3, 0, 4, 7, 6]
    assert next(iter(sampler)) == next(iter(sampler)) == pinned
    assert steps(1, num_images=8, global_batch_size=8, seed=2) != [pinned]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"global_batch_size": 10, "num_processes": 4},
            "10 is not divisible by num_processes 4.*multiple of 4",
        ),
        ({"global_batch_size": 10, "num_processes": 2, "accumulation": 2}, "accumulation 2"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_processes": 0}, "num_processes is 0"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"num_processes": 2, "process_index": 2}, "process 2 of 2"),
        ({"start_step": -1}, "start_step -1"),
    ],
)
def test_sampler_refuses(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(**({"num_images": 10, "global_batch_size": 4} | options))


def first_batches(dataset: ImageDataset, num_workers: int) -> Iterator[Batch]:
    sampler = GlobalBatchSampler(len(dataset), 4, seed=3)
    return islice(batches(dataset, sampler, num_workers), 5)


def test_batches_are_the_same_from_workers_and_memory(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 4, "b": 3})
    streamed, held = load(tmp_path).train, load(tmp_path, in_memory=True).train
    assert streamed.images is None
    assert held.images is not None
    assert (held.images.dtype, tuple(held.images.shape)) == (torch.uint8, (7, 3, 8, 8))
    state = torch.get_rng_state()
    runs = [list(first_batches(streamed, 0)), list(first_batches(streamed, 2)), list(first_batches(held, 0))]
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing from the global generator
    for batch, *others in zip(*runs, strict=True):
        assert isinstance(batch, Batch)
        assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.uint8, (4, 3, 8, 8))
        assert batch.labels.dtype == torch.int64
        assert batch.broken == ()
        for other in others:
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.labels, other.labels)
            assert other.broken == ()


@pytest.mark.parametrize("in_memory", [False, True])
def test_in_order_visits_each_image_once(tmp_path: Path, in_memory: bool) -> None:
    train = load(write_classes(tmp_path, {"a": 4, "b": 3}), in_memory=in_memory).train
    found = list(in_order(train, 3))
    assert [len(batch.labels) for batch in found] == [3, 3, 1]
    assert torch.cat([batch.images[:, 0, 0, 0] for batch in found]).tolist() == list(range(7))
    assert torch.cat([batch.labels for batch in found]).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert list(in_order(load(tmp_path, in_memory=in_memory).held_out, 3)) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_reach_the_batch(tmp_path: Path, num_workers: int) -> None:
    (batch,) = in_order(load(write_one_broken(tmp_path)).train, 5, num_workers)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 3, 3, 4]
    assert batch.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(batch.broken) == 1
    assert "002.png" in batch.broken[0]


def test_too_many_broken_images_stop_the_workers(tmp_path: Path) -> None:
    train = load(write_one_broken(tmp_path), max_broken=0).train
    with pytest.raises(DataError, match="max_broken") as error:
        list(in_order(train, 5, num_workers=1))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_the_batches_of_an_evaluation(num_processes):
    dataset = load_data(DataConfig(path="digits", held_out_images=100), image_size=8, in_channels=1).held_out
    shares = [
        [batch.labels for batch in in_order(dataset, 30, num_processes=num_processes, process_index=index)]
        for index in range(num_processes)
    ]
    joined = [shares[number % num_processes][number // num_processes] for number in range(4)]
    assert [len(labels) for labels in joined] == [30, 30, 30, 10]
    assert torch.equal(torch.cat(joined), dataset.labels)
