"""Parquet files made of the images of a data set: planned beforehand, written one by one, shown when all are whole.

OUT/NAME.json   train-00000-of-00012.parquet ...   broken.json (if images could not be read)

Rows are dealt to files before any is read, so that a broken image makes its file shorter and moves no other. A file
has a hidden name (.train-00000-of-00012.parquet) until all are there, so that training never uses a part of them.
NAME.json is the `manifest`: what the files depend on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itarflow.data.dataset import ImageDataset
from itarflow.data.loader import ignore_interrupts, watched, without_alarm
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import atomically, write_json
from itarflow.runtime.text import without_folders

ROW_GROUP = 128
"""Rows that are read at a time by those who stream."""

_BROKEN, _NOTES = b"itarflow.broken", b"itarflow.notes"


@dataclass(frozen=True)
class Shard:
    """One file: its final path, and the rows of the source that it is for."""

    path: Path
    split: str
    rows: range

    @property
    def hidden(self) -> Path:
        """Its hidden path until all are there."""
        return self.path.with_name(f".{self.path.name}")

    @property
    def found(self) -> Path | None:
        """Where it is, once it is whole."""
        return next((path for path in (self.path, self.hidden) if path.exists()), None)


@dataclass(frozen=True)
class Content:
    """What is in a file that is whole.

    Attributes:
        images: its rows.
        broken: "name: reason" of each image that was left out.
        notes: what its writer had to say besides.
        num_bytes: its size.
    """

    images: int
    broken: tuple[str, ...]
    notes: Mapping[str, Any]
    num_bytes: int


def plan_shards(out: Path, sizes: Mapping[str, int], shard_size: int) -> list[Shard]:
    """The files of some splits, of `shard_size` images each; sizes = number of images by split."""
    shards = []
    for split, size in sizes.items():
        count = -(-size // shard_size)
        for index in range(count):
            rows = range(index * shard_size, min((index + 1) * shard_size, size))
            shards.append(Shard(out / f"{split}-{index:05}-of-{count:05}.parquet", split, rows))
    return shards


def label_features(class_names: Sequence[str]) -> datasets.Features:
    """The column of the labels; none of unlabelled images."""
    return datasets.Features({"label": datasets.ClassLabel(names=list(class_names))} if class_names else {})


class Reader(Dataset[Tensor | str]):
    """The uint8 (C, H, W) image at (split, row), or "name: reason" why there is none.

    Args:
        sets: by split.
        source: the folder that they were read from, which the names leave out, so that data name no local folders.
    """

    def __init__(self, sets: Mapping[str, ImageDataset], source: str) -> None:
        self._sets, self._source = sets, source

    def __getitem__(self, place: tuple[str, int]) -> Tensor | str:
        split, row = place
        image = self._sets[split].read(row)
        return without_folders(image, self._source) if isinstance(image, str) else image


def read_ahead(
    dataset: Dataset[Any],
    shards: Sequence[Shard],
    *,
    batch_size: int,
    num_workers: int,
    collate: Callable[[list[Any]], Any] = list,
) -> Iterator[Any]:
    """What a set gives for all (split, row) of some shards, batch by batch; its processes start at once.

    Args:
        dataset: indexed by (split, row), such as a `Reader`.
        shards: in this order. No batch has rows of two of them.
        batch_size: rows at a time.
        num_workers: processes that read ahead; no more are started than there are batches.
        collate: makes a batch of a list of results, in the worker.

    Raises:
        DataError: a worker process died.
    """
    batches = sum(-(-len(shard.rows) // batch_size) for shard in shards)
    workers = min(num_workers, batches)
    loader = DataLoader(
        dataset,
        batch_sampler=_places(shards, batch_size),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        collate_fn=collate,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # else the loader would advance torch's global one
    )
    return watched(
        without_alarm(loader), "whole files are kept, and the same command goes on: run it with fewer num_workers"
    )


def _places(shards: Sequence[Shard], batch_size: int) -> Iterator[list[tuple[str, int]]]:
    for shard in shards:
        for start in range(0, len(shard.rows), batch_size):
            yield [(shard.split, row) for row in shard.rows[start : start + batch_size]]


def write_shard(
    shard: Shard,
    features: datasets.Features,
    results: Iterable[Mapping[str, Any] | str],
    notes: Callable[[], Mapping[str, Any]] = dict,
) -> Content:
    """Write one file, by its hidden name.

    Args:
        shard: where.
        features: its columns.
        results: of each of its rows in order the values by column (others are left out), or "name: reason" why the
            image is left out.
        notes: called once all results are there: what to store besides, as JSON has it.

    Raises:
        OSError: it can't be written; the message says how to go on.
    """
    broken: list[str] = []
    group: list[Mapping[str, Any]] = []
    schema = features.arrow_schema
    try:
        with (
            atomically(shard.hidden) as partial,
            # Images and codes do not compress further, and their minima are of no use.
            pq.ParquetWriter(
                partial, schema, compression="none", use_dictionary=["label"], write_statistics=["label"]
            ) as writer,
        ):
            for result in results:
                if isinstance(result, str):
                    broken.append(result)
                    continue
                group.append(result)
                if len(group) == ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema), row_group_size=ROW_GROUP)
                    group = []
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema), row_group_size=ROW_GROUP)
            writer.add_key_value_metadata({_BROKEN: json.dumps(broken), _NOTES: json.dumps(notes())})
    except OSError as error:
        raise OSError(
            f"{shard.path.parent} can't be written: {error}. Whole files are kept; the same command goes on."
        ) from error
    return read_content(shard.hidden)


def read_content(path: Path) -> Content:
    """What is in a file that is whole.

    Raises:
        DataError: it is damaged, or `write_shard` has not made it.
    """
    try:
        footer = pq.read_metadata(path)
        broken, notes = json.loads(footer.metadata[_BROKEN]), json.loads(footer.metadata.get(_NOTES, b"{}"))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged, or not of this command; delete it, and run the command again") from error
    return Content(footer.num_rows, tuple(broken), notes, path.stat().st_size)


def read_contents(shards: Sequence[Shard], known: Mapping[Shard, Content]) -> dict[Shard, Content]:
    """What is in all shards that are whole by now, in their order; errors as `read_content`.

    Args:
        shards: all that are planned.
        known: read before, and not read again.
    """
    contents = {}
    for shard in shards:
        if shard in known:
            contents[shard] = known[shard]
        elif path := shard.found:
            contents[shard] = read_content(path)
    return contents


def broken_by_split(shards: Sequence[Shard], contents: Mapping[Shard, Content]) -> dict[str, tuple[str, ...]]:
    """By split, "name: reason" of each image that was left out so far."""
    found = [shard for shard in shards if shard in contents]
    return {
        split: tuple(report for shard in found if shard.split == split for report in contents[shard].broken)
        for split in dict.fromkeys(shard.split for shard in shards)
    }


def check_broken(out: Path, shards: Sequence[Shard], contents: Mapping[Shard, Content], max_broken: int) -> None:
    """List the broken images in broken.json, and refuse too many.

    Raises:
        DataError: more than `max_broken`; the message names the first.
    """
    broken = broken_by_split(shards, contents)
    reports = [report for reports in broken.values() for report in reports]
    if reports:
        write_json(out / "broken.json", broken)
    if len(reports) > max_broken:
        raise DataError(
            f"{len(reports)} images could not be read, and max_broken is {max_broken}; all of them are listed "
            f"in {out / 'broken.json'}. To leave them out, raise max_broken and run the command again: it goes "
            f"on from here. To keep them, repair them and delete {out} first. The first ones:\n  "
            + "\n  ".join(reports[:5])
        )


def show_shards(shards: Sequence[Shard]) -> None:
    """Give all their final names."""
    for shard in shards:
        if not shard.path.exists():
            shard.hidden.rename(shard.path)
