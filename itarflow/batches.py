"""The order of training images, and batches of them.

The order depends on (seed, step) alone, never on the number of processes (`GlobalBatchSampler`), also if images are
streamed from files row group by row group (`StreamedBatchSampler`). Images stay uint8 (C, H, W) tensors on their way;
the training loop makes pixels of them on the device.
"""

from __future__ import annotations

import itertools
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from itarflow.dataset import Example, ImageDataset
from itarflow.runtime.errors import DataError
from itarflow.runtime.seeds import permutation
from itarflow.streaming import StreamedEpoch, num_streams, window_size


class Batch(NamedTuple):
    """Images, int64 labels (B,), -1 = none, and "name: reason" of each replaced image.

    The images are uint8 (B, C, H, W), or stored codes, float16 (B, V, P, C, H, W); see `codec.stored_codes`.
    """

    images: Tensor
    labels: Tensor
    broken: tuple[str, ...]


class GlobalBatchSampler(Sampler[list[int]]):
    """Endless lists of indices; what an optimiser step sees depends on (seed, step) alone.

    Every epoch is a fresh permutation of all images. Epochs are strung together, and step k uses positions
    k * B .. (k + 1) * B - 1 of the string, B = global_batch_size: batches straddle epochs, and neither the
    number of processes, nor accumulation, nor a resumed run changes what a step sees. For each step come
    `accumulation` lists of m = B / (num_processes * accumulation) indices: list a of process p has the
    positions from (a * num_processes + p) * m on, counted from the start of the step.

    Epoch e is the permutation named "itarflow epoch {seed} {e}"; see `seeds.permutation`.

    Raises:
        ValueError: an argument is out of range, or num_processes * accumulation does not divide the batch.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        counts = {"num_images": num_images, "global_batch_size": global_batch_size}
        counts |= {"num_processes": num_processes, "accumulation": accumulation}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        if not 0 <= process_index < num_processes or start_step < 0:
            raise ValueError(f"process {process_index} of {num_processes}, start_step {start_step}: out of range")
        parts = num_processes * accumulation
        if global_batch_size % parts:
            raise ValueError(
                f"global_batch_size {global_batch_size} is not divisible by num_processes {num_processes} x "
                f"accumulation {accumulation}; choose a multiple of {parts}"
            )
        self.num_images, self.global_batch_size = num_images, global_batch_size
        self.accumulation, self.seed = accumulation, seed
        self.size, self.stride = global_batch_size // parts, global_batch_size // accumulation
        self.start = start_step * global_batch_size + process_index * self.size

    def __iter__(self) -> Iterator[list[int]]:
        position, epoch = self.start, -1
        order: Tensor | StreamedEpoch = torch.empty(0)
        while True:
            indices: list[int] = []
            while len(indices) < self.size:
                wanted, offset = divmod(position + len(indices), self.num_images)
                if wanted != epoch:  # positions only grow, so that one permutation at a time is enough
                    epoch, order = wanted, self._epoch(wanted)
                indices += order[offset : offset + self.size - len(indices)].tolist()
            yield indices
            position += self.stride

    def _epoch(self, epoch: int) -> Tensor | StreamedEpoch:
        return permutation(f"itarflow epoch {self.seed} {epoch}", self.num_images)


class StreamedBatchSampler(GlobalBatchSampler):
    """The same promises, of epochs that read few row groups at a time: `StreamedEpoch`s instead of permutations.

    What a step sees depends on (seed, step), the sizes of the row groups and shuffle_buffer alone. A process whose
    share of a batch is contiguous reads few of the streams.

    Args:
        row_groups: (G,) number of images in each row group; see `ImageDataset.row_groups`.
        global_batch_size: images of an optimiser step.
        shuffle_buffer: images that are mixed with one another.
        share: num_processes, process_index, accumulation, seed and start_step, as of `GlobalBatchSampler`.

    Raises:
        ValueError: as of `GlobalBatchSampler`, or shuffle_buffer is less than 1.
    """

    def __init__(self, row_groups: Tensor, global_batch_size: int, *, shuffle_buffer: int, **share: int) -> None:
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}; expected 1 or more")
        super().__init__(int(row_groups.sum()), global_batch_size, **share)
        self.row_groups, self.shuffle_buffer = row_groups, shuffle_buffer

    def parts(self, num_workers: int) -> int:
        """Into how many parts to cut each list, so that workers taking turns read as few streams each as can be.

        No part is empty.
        """
        return min(
            range(1, min(max(num_workers, 1), self.size) + 1),
            key=lambda parts: (self._streams_of_a_worker(num_workers, parts), -parts),
        )

    def windows(self, num_workers: int) -> tuple[int, int]:
        """In how many windows each worker is busy at a time, at most, if lists are cut into `parts`; their size."""
        streams = self._streams_of_a_worker(num_workers, self.parts(num_workers))
        return streams, window_size(self.global_batch_size, self.shuffle_buffer)

    def _streams_of_a_worker(self, num_workers: int, parts: int) -> int:
        places = self.accumulation * parts  # of a part within a step; each worker comes by every so many of them
        visited = places // math.gcd(places, max(num_workers, 1))
        streams, part = num_streams(self.global_batch_size), math.ceil(self.size / parts)
        # One more than fit, because from the second epoch on a step begins in the middle of a stream.
        return min(visited * (math.ceil(part * streams / self.global_batch_size) + 1), streams)

    def _epoch(self, epoch: int) -> StreamedEpoch:
        return StreamedEpoch(
            self.row_groups.numpy(),
            batch_size=self.global_batch_size,
            shuffle_buffer=self.shuffle_buffer,
            seed=self.seed,
            epoch=epoch,
        )


def training_sampler(
    dataset: ImageDataset, global_batch_size: int, *, shuffle_buffer: int, **share: int
) -> GlobalBatchSampler:
    """Endless lists of indices, in the order that suits the set.

    A set with row groups gets a `StreamedBatchSampler`. Others (held in memory, or read at random from the disk) get
    a `GlobalBatchSampler`, and no use is made of shuffle_buffer. Arguments and errors as of these.
    """
    row_groups = dataset.row_groups
    if row_groups is None:
        return GlobalBatchSampler(len(dataset), global_batch_size, **share)
    return StreamedBatchSampler(row_groups, global_batch_size, shuffle_buffer=shuffle_buffer, **share)


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
            yield Batch(dataset.images[indices], dataset.labels[indices], ())
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
        prefetch_factor=4 if num_workers else None,
        collate_fn=_collate,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # else the loader draws from the global one, which is not its to advance
    )
    found = list[Batch]()
    for batch in watched(without_alarm(loader), "lower data.num_workers, and go on by --resume"):
        if isinstance(batch, DataError):
            raise batch
        found.append(batch)
        if len(found) == parts:
            yield _joined(found)
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


def without_alarm(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, which tells of a dead worker when it is asked for a batch, and not by a signal.

    PyTorch's handler of that signal raises wherever the program is: in the middle of an optimiser step, for instance.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    stream = iter(loader)
    signal.signal(signal.SIGCHLD, handler)
    return stream


def watched(stream: Iterator[Any], advice: str) -> Iterator[Any]:
    """What a loader's iterator gives; of a worker's death it tells what to do.

    Raises:
        DataError: a worker process died; the message ends with the advice.
    """
    try:
        yield from stream
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two, if it died with a batch in hand
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            f"a process that decodes images has died ({error}). Often the system was out of memory; {advice}"
        ) from error


def ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the main one still needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _divided(lists: Iterable[list[int]], parts: int) -> Iterator[list[int]]:
    """Each list as so many contiguous ones."""
    for indices in lists:
        cuts = [len(indices) * part // parts for part in range(parts + 1)]
        for begin, end in itertools.pairwise(cuts):
            yield indices[begin:end]


def _joined(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    images, labels, broken = zip(*parts, strict=True)
    return Batch(torch.cat(images), torch.cat(labels), tuple(itertools.chain(*broken)))


class _Reporting(Dataset[Example | DataError]):
    """Hands a data error over as a value: raised in a worker, it would arrive with the worker's traceback as text."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Example | DataError:
        try:
            return self._dataset[index]
        except DataError as error:
            return error


def _collate(examples: Sequence[Example | DataError]) -> Batch | DataError:
    for example in examples:
        if isinstance(example, DataError):
            return example
    images, labels, broken = zip(*(example for example in examples if isinstance(example, Example)), strict=True)
    return Batch(torch.stack(images), torch.tensor(labels, dtype=torch.int64), tuple(filter(None, broken)))
