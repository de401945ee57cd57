"""Batches of images, in the order that a sampler gives.

Images stay uint8 (C, H, W) tensors; the training loop converts them to float pixels on the device.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itarflow.data.context import ContextDecoder
from itarflow.data.dataset import Example, ImageDataset, padded
from itarflow.data.order import StreamedBatchSampler
from itarflow.runtime.errors import DataError
from itarflow.runtime.launch import processes_here
from itarflow.runtime.text import human_bytes


class Batch(NamedTuple):
    """Images, int64 labels (B,), -1 = none, and "name: reason" of each replaced image.

    The images are uint8 (B, C, H, W), or stored codes, float16 (B, V, P, C, H, W); see `codec.stored_codes`. If
    captions are read, `context` is the bfloat16 (B, T, E) of their vectors, padded with zeros.
    """

    images: Tensor
    labels: Tensor
    broken: tuple[str, ...]
    context: Tensor | None = None

    def on_its_way(self) -> Batch:
        """In pinned memory if the process computes on a GPU, which can then copy it while the process goes on."""
        # Not by the loader's own thread, which a worker that dies would end without a word.
        if not torch.cuda.is_initialized():
            return self
        context = None if self.context is None else self.context.pin_memory()
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.broken, context)


def batches(dataset: ImageDataset, sampler: Iterable[list[int]], num_workers: int = 0) -> Iterator[Batch]:
    """A batch for every list of indices that the sampler yields, in its order.

    Args:
        dataset: the images; a set that is held in memory is indexed directly, without workers.
        sampler: lists of indices, such as a `GlobalBatchSampler`.
        num_workers: processes that decode ahead; 0 decodes here. Each decodes every num_workers-th list, or, of a
            `StreamedBatchSampler`, its part of the lists, so that it always reads the same streams.

    Yields:
        Batches, endlessly if the sampler is endless.

    Raises:
        DataError: too many images could not be read.
    """
    if dataset.images is not None:
        for indices in sampler:
            context = padded(dataset.captions, map(dataset.context, indices))
            yield Batch(dataset.images[indices], dataset.labels[indices], (), context).on_its_way()
        return
    parts = 1
    if isinstance(sampler, StreamedBatchSampler):
        parts = sampler.parts(num_workers)
        dataset = dataset.keeping(*sampler.windows(num_workers))
    loader = DataLoader(
        _Reporting(dataset),
        batch_sampler=_divided(sampler, parts),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=_AHEAD if num_workers else None,
        collate_fn=partial(_collate, dataset.captions),
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # else the loader would advance torch's global one
        timeout=WORKER_TIMEOUT * (6 if isinstance(sampler, StreamedBatchSampler) else 1) if num_workers else 0,
    )
    found = list[Batch]()
    for batch in watched(without_alarm(loader), "lower data.num_workers, and go on by --resume"):
        if isinstance(batch, DataError):
            raise batch
        found.append(batch)
        if len(found) == parts:
            yield _joined(found).on_its_way()
            found = []


def in_order(
    dataset: ImageDataset,
    batch_size: int,
    num_workers: int = 0,
    *,
    num_processes: int = 1,
    process_index: int = 0,
) -> Iterator[Batch]:
    """Every image once, in the order of the set; the last batch may be smaller.

    Of several processes each gets every num_processes-th batch, beginning with its own index. Other arguments as in
    `batches`.
    """
    indices = list(range(len(dataset)))
    lists = [indices[i : i + batch_size] for i in indices[::batch_size]]
    return batches(dataset, lists[process_index::num_processes], num_workers)


WORKER_TIMEOUT = 600.0
"""Seconds in which a worker process must hand over a batch, or it hangs; six times as many of a streamed set, whose
first batch is mixed from thousands of images."""


_AHEAD = 4
"""Batches that each worker may have ready."""


def check_workers(num_workers: int, batch_bytes: int = 0) -> None:
    """Refuse worker processes that could not hand over a batch, and would be waited for without end.

    Where the memory for exchange between processes may have no room for their batches, which ends a worker without a
    word, it is said.

    Args:
        num_workers: of this process; as many for each of the launch on this machine.
        batch_bytes: what a batch takes; 0 = not known.

    Raises:
        DataError: the path of the folder for temporary files is too long for the sockets of Unix.
    """
    _check_shared_memory(num_workers, batch_bytes)
    folder = tempfile.gettempdir()
    if num_workers > 0 and len(os.fsencode(folder)) > _LONGEST_TEMPORARY and hasattr(socket, "AF_UNIX"):
        raise DataError(
            f"the folder for temporary files, {folder} (TMPDIR), has a path of {len(os.fsencode(folder))} bytes, too "
            f"long for the sockets by which processes hand over images; expected at most {_LONGEST_TEMPORARY}. Set "
            "TMPDIR to a shorter one, such as /tmp, or the number of workers to 0 (--data.num-workers 0)"
        )


def _check_shared_memory(num_workers: int, batch_bytes: int) -> None:
    if not num_workers or not _SHARED.is_dir():
        return
    found = os.statvfs(_SHARED)
    if not found.f_blocks:  # without a limit
        return
    free, of_worker = found.f_bavail * found.f_frsize, processes_here() * _AHEAD * batch_bytes
    if num_workers * of_worker > free:
        warnings.warn(
            f"{_SHARED}, by which processes hand over images, has {human_bytes(free)} free, but {num_workers} workers "
            f"for each of {processes_here()} processes may need {human_bytes(num_workers * of_worker)}. A container "
            "gets more by --ipc=host or --shm-size=16g of docker run; or take fewer workers: --data.num-workers "
            f"{free // of_worker}",
            stacklevel=3,
        )


_SHARED = Path("/dev/shm")
_LONGEST_TEMPORARY = 70
"""A socket's path has 103 bytes on macOS, 107 on Linux, of which multiprocessing's own folder and name take 32."""


def without_alarm(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, without PyTorch's SIGCHLD handler: a dead worker raises at the next batch.

    The handler would raise at any place of the program, such as in the middle of an optimiser step. A worker that is
    stopped or hangs raises after `WORKER_TIMEOUT`, or the loader's own timeout.

    Raises:
        DataError: as `check_workers`.
    """
    check_workers(loader.num_workers)
    if loader.num_workers and not loader.timeout:
        loader.timeout = WORKER_TIMEOUT
    others = set(multiprocessing.active_children())
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        stream = iter(loader)
    else:
        handler = signal.getsignal(signal.SIGCHLD)
        stream = iter(loader)
        signal.signal(signal.SIGCHLD, handler)
    return _ending_workers(stream, set(multiprocessing.active_children()) - others)


def _ending_workers(stream: Iterator[Any], workers: Iterable[Any]) -> Iterator[Any]:
    """The items of a stream; workers that hang are killed, or the end of the program would wait for them."""
    try:
        yield from stream
    except RuntimeError as error:
        if _TIMED_OUT in str(error):
            for worker in workers:
                worker.kill()
        raise


_TIMED_OUT = "DataLoader timed out"


def watched(stream: Iterator[Any], advice: str) -> Iterator[Any]:
    """The items of a loader's iterator; a worker's death becomes an error that says what to do.

    Raises:
        DataError: a worker process died or hangs; the message ends with the advice.
    """
    try:
        yield from stream
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two, if it died while sending a batch
        if isinstance(error, RuntimeError) and _TIMED_OUT in str(error):
            raise DataError(
                f"no process that decodes images has handed one over for long ({error}). One may be stopped, or wait "
                f"for a disk or network that does not answer; {advice}"
            ) from error
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            f"a process that decodes images has died ({error}). Often the system was out of memory, or {_SHARED} was "
            f"full, which in a container wants --ipc=host or --shm-size; {advice}"
        ) from error


def ignore_interrupts(_worker: int) -> None:
    """Ignore in a worker what a terminal sends to all: the main process needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _divided(lists: Iterable[list[int]], parts: int) -> Iterator[list[int]]:
    """Each list as so many contiguous ones."""
    for indices in lists:
        cuts = [len(indices) * part // parts for part in range(parts + 1)]
        for begin, end in itertools.pairwise(cuts):
            yield indices[begin:end]


def _joined(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    images, labels, broken, contexts = zip(*parts, strict=True)
    context = None if contexts[0] is None else torch.cat(contexts)
    return Batch(torch.cat(images), torch.cat(labels), tuple(itertools.chain(*broken)), context)


class _Reporting(Dataset[Example | DataError]):
    """Returns a data error as a value: raised in a worker, it would arrive with the worker's traceback as text."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Example | DataError:
        try:
            return self._dataset.unpadded(index)
        except DataError as error:
            return error


def _collate(captions: ContextDecoder | None, examples: Sequence[Example | DataError]) -> Batch | DataError:
    for example in examples:
        if isinstance(example, DataError):
            return example
    images, labels, broken, contexts = zip(
        *(example for example in examples if isinstance(example, Example)), strict=True
    )
    return Batch(
        torch.stack(images),
        torch.tensor(labels, dtype=torch.int64),
        tuple(filter(None, broken)),
        padded(captions, contexts),
    )
