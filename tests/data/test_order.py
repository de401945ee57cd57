"""Batches come in the promised order, whatever reads them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from image_files import load, write_classes, write_one_broken, write_row_groups
from torch.utils.data import DataLoader, Dataset

from itarflow.data import DataConfig, load_data, loader
from itarflow.data import parquet as streaming
from itarflow.data.dataset import ImageDataset
from itarflow.data.loader import Batch, _divided, batches, in_order, watched
from itarflow.data.order import GlobalBatchSampler, StreamedBatchSampler, training_sampler
from itarflow.runtime.errors import DataError


def steps(count: int, **options: Any) -> list[list[int]]:
    return list(islice(GlobalBatchSampler(**options), count))


def test_every_image_once_an_epoch_and_epochs_differ() -> None:
    flat = [index for batch in steps(15, num_images=10, global_batch_size=4) for index in batch]
    epochs = [flat[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert {len(batch) for batch in steps(15, num_images=10, global_batch_size=4)} == {4}


@pytest.mark.parametrize(
    ("num_processes", "accumulation", "start_step"), [(1, 1, 3), (2, 1, 0), (4, 1, 3), (1, 3, 0), (4, 2, 0), (2, 3, 3)]
)
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
            "10 .*num_processes 4.*multiple of 4",
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


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 3])
def test_processes_share_the_batches_of_an_evaluation(num_processes):
    dataset = load_data(DataConfig(path="digits", held_out_images=100), image_size=8, in_channels=1).held_out
    shares = [
        [batch.labels for batch in in_order(dataset, 30, num_processes=num_processes, process_index=index)]
        for index in range(num_processes)
    ]
    joined = [shares[number % num_processes][number // num_processes] for number in range(4)]
    assert [len(labels) for labels in joined] == [30, 30, 30, 10]
    assert torch.equal(torch.cat(joined), dataset.labels)


# Streamed sets


@pytest.fixture
def streamed(tmp_path: Path) -> ImageDataset:
    """54 of 60 images, in row groups of 4 in three files; 6 are held out."""
    for number in range(3):
        write_row_groups(tmp_path / f"{number}.parquet", 20, 4, first=20 * number)
    return load(tmp_path, streaming=True, held_out_images=6).train


@pytest.mark.parametrize(
    ("num_processes", "accumulation", "start_step"),
    [(1, 1, 3), (2, 1, 0), (4, 1, 3), (1, 2, 3), (2, 3, 3), (4, 2, 0), (1, 24, 0), (3, 1, 0)],
)
def test_streamed_step_is_the_same_however_it_is_cut(num_processes: int, accumulation: int, start_step: int) -> None:
    def lists(count: int, **share: int) -> list[list[int]]:
        sampler = StreamedBatchSampler(torch.tensor([10, 3, 21, 3]), 24, shuffle_buffer=16, seed=5, **share)
        return list(islice(sampler, count))

    whole = lists(8)
    flat = [index for indices in whole for index in indices]
    assert [sorted(flat[begin : begin + 37]) for begin in range(0, 185, 37)] == [list(range(37))] * 5
    share = {"num_processes": num_processes, "accumulation": accumulation, "start_step": start_step}
    parts = [
        lists((8 - start_step) * accumulation, process_index=process, **share) for process in range(num_processes)
    ]
    for step, expected in enumerate(whole[start_step:]):
        cuts = [parts[p][step * accumulation + a] for a in range(accumulation) for p in range(num_processes)]
        assert [index for cut in cuts for index in cut] == expected


@pytest.mark.parametrize(
    ("num_workers", "accumulation", "parts", "windows"),
    [
        (0, 1, 1, 8),
        (1, 1, 1, 8),
        (2, 1, 2, 5),
        (8, 1, 8, 2),
        (8, 4, 2, 2),  # workers 0 and 1 for the first micro-batch of every step, 2 and 3 for the second ...
        (4, 8, 1, 4),
        (3, 4, 3, 8),
        (12, 1, 12, 2),
        (40, 1, 20, 2),  # no more parts than a list has images
    ],
)
def test_each_worker_reads_few_streams(num_workers: int, accumulation: int, parts: int, windows: int) -> None:
    size = 32 if num_workers < 40 else 24
    share = {"accumulation": accumulation, "start_step": 1}
    sampler = StreamedBatchSampler(torch.full((50,), 7), size, shuffle_buffer=80, **share)
    assert sampler.parts(num_workers) == parts
    assert sampler.windows(num_workers) == (windows, 10)
    streams: dict[tuple[int, int], set[int]] = {}  # by worker and epoch
    position, rest = size, 350 // size * size
    for turn, part in enumerate(_divided(islice(sampler, 40 * accumulation), parts)):
        for place in range(position, position + len(part)):
            if place % 350 < rest:  # the last places of an epoch, less than a batch, go through all streams
                worker = (turn % max(num_workers, 1), place // 350)
                streams.setdefault(worker, set()).add(place % 350 % size * 8 // size)
        position += len(part)
    assert max(map(len, streams.values())) <= windows


def test_sampler_suits_the_set(tmp_path: Path, streamed: ImageDataset) -> None:
    sampler = training_sampler(streamed, 8, shuffle_buffer=16, seed=2)
    assert isinstance(sampler, StreamedBatchSampler)
    assert sampler.row_groups.sum() == 54
    assert sampler.row_groups.max() == 4
    assert sampler.num_images == 54
    for dataset in (streamed.decoded(), load(tmp_path, held_out_images=6).train):
        plain = training_sampler(dataset, 8, shuffle_buffer=16, seed=2, start_step=3)
        assert type(plain) is GlobalBatchSampler
        assert next(iter(plain)) == next(iter(GlobalBatchSampler(54, 8, seed=2, start_step=3)))
    with pytest.raises(ValueError, match="shuffle_buffer is 0"):
        training_sampler(streamed, 8, shuffle_buffer=0)
    with pytest.raises(ValueError, match="multiple of 3"):
        training_sampler(streamed, 8, shuffle_buffer=16, num_processes=3)


@pytest.mark.parametrize("batch_size", [1, 8, 11])
def test_streamed_batches_are_those_of_the_table(streamed: ImageDataset, tmp_path: Path, batch_size: int) -> None:
    held = load(tmp_path, held_out_images=6, in_memory=True).train
    sampler = training_sampler(streamed, batch_size, shuffle_buffer=16, seed=2)
    expected = list(islice(batches(held, sampler), 60 // batch_size))
    for num_workers in (0, 1, 2):
        found = islice(batches(streamed, sampler, num_workers), 60 // batch_size)
        for batch, other in zip(found, expected, strict=True):
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.labels, other.labels)
            assert batch.broken == ()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_evaluation_is_in_order(streamed: ImageDataset, tmp_path: Path, num_workers: int) -> None:
    for dataset in (streamed, load(tmp_path, streaming=True, held_out_images=6).held_out):
        found = list(in_order(dataset, 5, num_workers))
        values = torch.cat([batch.images[:, 0, 0, 0] for batch in found]).tolist()
        assert values == [dataset[index].image[0, 0, 0].item() for index in range(len(dataset))] == sorted(values)


@pytest.mark.parametrize(
    ("num_processes", "accumulation", "num_workers"), [(1, 1, 1), (1, 2, 4), (2, 1, 2), (4, 1, 0)]
)
def test_row_groups_are_read_about_once_and_few_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_processes: int,
    accumulation: int,
    num_workers: int,
) -> None:
    train = load(write_row_groups(tmp_path / "a.parquet", 250, 2), streaming=True).train
    share = {"num_processes": num_processes, "process_index": num_processes - 1, "accumulation": accumulation}
    sampler = training_sampler(train, 32, shuffle_buffer=64, **share)
    assert isinstance(sampler, StreamedBatchSampler)
    windows, size = sampler.windows(num_workers)
    assert size == 8
    worker, opened, visited, opening = train.keeping(windows, size), list[str](), 0, streaming._open
    monkeypatch.setattr(streaming, "_open", lambda file: opened.append(file) or opening(file))
    lists = islice(sampler, 2 * accumulation * 250 // 32)
    for turn, part in enumerate(_divided(lists, sampler.parts(num_workers))):
        for index in part if turn % max(num_workers, 1) == 0 else ():  # the first worker
            assert worker[index].image[0, 0, 0] == index
            assert worker._rows.resident[1] <= windows * (size + 4)
            visited += 1
    assert visited / 2 <= len(opened) <= visited / 2 * 1.4


def test_damaged_row_group_is_broken_images(tmp_path: Path) -> None:
    file = write_row_groups(tmp_path / "a.parquet", 12, 3)
    start = pq.read_metadata(file).row_group(2).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    file.write_bytes(content)
    train = load(file, streaming=True).train
    for num_workers in (0, 2):
        (batch,) = in_order(train, 12, num_workers)
        assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 9, 9, 9, 9, 10, 11]
        assert batch.labels.tolist() == [value % 2 for value in batch.images[:, 0, 0, 0].tolist()]
        assert [name.split(": ")[0] for name in batch.broken] == [f"{file}, row {row}" for row in (6, 7, 8)]
    with pytest.raises(DataError, match=r"3 images .*max_broken is 2(.|\n)*row 6: "):
        list(in_order(load(file, streaming=True, max_broken=2).train, 12))


def ending(error: Exception) -> Iterator[int]:
    yield 1
    raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed"),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        ConnectionResetError("Connection reset by peer"),
        EOFError(),
    ],
)
def test_a_dead_worker_is_told_with_what_to_do(error: Exception) -> None:
    with pytest.raises(DataError, match=r"died \(.*; take fewer$"):
        list(watched(ending(error), "take fewer"))


class Stopped(Dataset[int]):
    """Its process stops at the second item, as by SIGSTOP or a disk that does not answer."""

    def __getitem__(self, index: int) -> int:
        if index == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return index

    def __len__(self) -> int:
        return 3


def test_a_worker_that_hangs_is_told_after_a_while_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "WORKER_TIMEOUT", 2.0)
    before = set(multiprocessing.active_children())
    stream = loader.without_alarm(DataLoader(Stopped(), batch_size=1, num_workers=1))
    workers = set(multiprocessing.active_children()) - before
    with pytest.raises(DataError, match=r"handed one over for long \(.*stopped.*; take fewer$"):
        list(watched(stream, "take fewer"))
    (worker,) = workers
    worker.join(20)
    assert not worker.is_alive()


def test_a_folder_for_temporary_files_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 80)
    loader.check_workers(0)
    with pytest.raises(DataError, match=r"TMPDIR.*85 bytes.*at most 70.*--data.num-workers 0"):
        loader.without_alarm(DataLoader(Stopped(), num_workers=1))
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    loader.check_workers(1)


def test_what_a_worker_raises_is_no_death() -> None:
    with pytest.raises(RuntimeError, match="Caught"):
        list(watched(ending(RuntimeError("Caught RuntimeError in DataLoader worker process 0.")), "take fewer"))


@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_for_a_gpu_are_in_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    data = load(write_row_groups(tmp_path / "a.parquet", 12, 3)).train
    (batch,) = in_order(data.decoded() if in_memory else data, 12)
    assert [id(batch.images), id(batch.labels)] == [id(tensor) for tensor in pinned]
    assert batch.broken == ()


def test_batches_that_may_not_fit_the_memory_between_processes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_SHARED", tmp_path)
    docker = SimpleNamespace(f_blocks=2**14, f_bavail=2**14, f_frsize=2**12)  # 64 MB
    monkeypatch.setattr(os, "statvfs", lambda _: docker)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.check_workers(8, 2**20)
        loader.check_workers(0, 2**30)
    with pytest.warns(match=r"64 MiB free.* 8 workers .*2 processes may need 80 MiB.*--ipc=host.*workers 6"):
        loader.check_workers(8, 5 * 2**18)
    docker.f_blocks = docker.f_bavail = 0  # no limit
    loader.check_workers(8, 2**30)
