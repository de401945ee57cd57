"""The order of training images: a function of (seed, step), independent of the number of processes.

That also holds if images are streamed from files, row group by row group (`StreamedBatchSampler`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from itarflow.data.dataset import ImageDataset
from itarflow.data.parquet import STREAMS
from itarflow.runtime.seeds import permutation


class GlobalBatchSampler(Sampler[list[int]]):
    """Endless lists of indices; what an optimiser step sees depends on (seed, step) alone.

    Every epoch is a fresh permutation of all images. Epochs are concatenated, and step k uses positions
    k * B .. (k + 1) * B - 1 of them, B = global_batch_size: batches straddle epochs, and neither the
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
    """As `GlobalBatchSampler`, with epochs that read few row groups at a time: `StreamedEpoch`s, not permutations.

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
        """Into how many parts to cut each list, so that each worker reads as few streams as possible.

        No part is empty.
        """
        return min(
            range(1, min(max(num_workers, 1), self.size) + 1),
            key=lambda parts: (self._streams_of_a_worker(num_workers, parts), -parts),
        )

    def windows(self, num_workers: int) -> tuple[int, int]:
        """How many windows each worker reads at a time, at most, if lists are cut into `parts`; and their size."""
        streams = self._streams_of_a_worker(num_workers, self.parts(num_workers))
        return streams, window_size(self.global_batch_size, self.shuffle_buffer)

    def _streams_of_a_worker(self, num_workers: int, parts: int) -> int:
        places = self.accumulation * parts  # parts in a step; the workers take them in turn
        visited = places // math.gcd(places, max(num_workers, 1))
        streams, part = num_streams(self.global_batch_size), math.ceil(self.size / parts)
        # One more, because from the second epoch on a step begins in the middle of a stream.
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
    """Endless lists of indices, in the order for the kind of data set.

    A set with row groups gets a `StreamedBatchSampler`. Others (held in memory, or read at random from the disk) get
    a `GlobalBatchSampler`, and shuffle_buffer is not used. Arguments and errors as of these.
    """
    row_groups = dataset.row_groups
    if row_groups is None:
        return GlobalBatchSampler(len(dataset), global_batch_size, **share)
    return StreamedBatchSampler(row_groups, global_batch_size, shuffle_buffer=shuffle_buffer, **share)


class StreamedEpoch:
    """The images of one epoch in an order that reads few row groups at a time; sliced like a list of N indices.

    The row groups are permuted, and their images concatenated. The sequence is cut into V = gcd(B, STREAMS) streams,
    where B is the batch size, and each stream is shuffled within consecutive windows of shuffle_buffer / V images.
    Of each B positions of the epoch, the first B / V come from the first stream, and so on; so a reader of a fixed
    part of every batch reads fixed streams. The rest, less than a batch, comes last, stream by stream. The lengths of
    the streams fit: every stream has B / V images of each whole batch, and the rest
    is divided as evenly as whole numbers allow.

    Only the order of the row groups and the windows in use are computed. Permutations:
    "itarflow row groups {seed} {epoch}", "itarflow window {seed} {epoch} {stream} {window}"; see `permutation`.

    Args:
        groups: (G,) number of images in each row group; image indices count through them.
        batch_size: B, images of a whole batch, over all processes.
        shuffle_buffer: images that are mixed with one another, over all streams.
        seed: seed of the run.
        epoch: which epoch it is, from 0.
    """

    def __init__(self, groups: np.ndarray, *, batch_size: int, shuffle_buffer: int, seed: int, epoch: int) -> None:
        order = permutation(f"itarflow row groups {seed} {epoch}", len(groups)).numpy()
        begins = np.cumsum(groups) - groups
        self._ends = np.cumsum(groups[order])  # in the sequence of images, of each row group in its new order
        self._shifts = begins[order] - (self._ends - groups[order])  # from places in the sequence to indices
        self._total, self._batch, self._streams = int(groups.sum()), batch_size, num_streams(batch_size)
        self._share = batch_size // self._streams
        self._whole, left = divmod(self._total, batch_size)
        # Per stream, and at the end of the last: places of the rest that come before it, and where it begins.
        self._rest_begins = left * np.arange(self._streams + 1) // self._streams
        self._begins = self._whole * self._share * np.arange(self._streams + 1) + self._rest_begins
        self._window = window_size(batch_size, shuffle_buffer)
        self._name = f"itarflow window {seed} {epoch}"
        self._shuffled = functools.lru_cache(2 * self._streams)(self._shuffle)

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, positions: slice) -> np.ndarray:
        """int64 indices of the images at these positions of the epoch."""
        position = np.arange(*positions.indices(self._total))
        batch, within = np.divmod(position, self._batch)
        stream, place = within // self._share, batch * self._share + within % self._share
        rest = batch == self._whole
        stream[rest] = np.searchsorted(self._rest_begins, within[rest], side="right") - 1
        place[rest] = self._whole * self._share + within[rest] - self._rest_begins[stream[rest]]
        window, place = np.divmod(place, self._window)
        indices = np.empty_like(position)
        for pair in set(zip(stream.tolist(), window.tolist(), strict=True)):
            chosen = (stream == pair[0]) & (window == pair[1])
            indices[chosen] = self._shuffled(*pair)[place[chosen]]
        return indices

    def _shuffle(self, stream: int, window: int) -> np.ndarray:
        """int64 indices of the images of a window."""
        begin = int(self._begins[stream]) + window * self._window
        length = min(self._window, int(self._begins[stream + 1]) - begin)
        places = begin + permutation(f"{self._name} {stream} {window}", length).numpy()
        return places + self._shifts[np.searchsorted(self._ends, places, side="right")]


def num_streams(batch_size: int) -> int:
    """Streams that batches of this size are read from: the greatest common divisor with `STREAMS`."""
    return math.gcd(batch_size, STREAMS)


def window_size(batch_size: int, shuffle_buffer: int) -> int:
    """Images of one stream that are mixed with one another."""
    return max(shuffle_buffer // num_streams(batch_size), 1)
