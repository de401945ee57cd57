"""Parquet files made of the images of a data set: planned beforehand, written one by one, shown when all are whole.

OUT/NAME.json   train-00000-of-00012.parquet ...   broken.json (if images could not be read)

Rows are dealt to files before any is read, so that a broken image makes its file shorter and moves no other. A file
has a hidden name until all are there, so that training never uses a part of them. That name holds the SHA-256 of its
bytes (.train-00000-of-00012.SHA.parquet), and its end says which rows of what it has: a damaged file, a copy of
another one, or one of another set is not taken for it. NAME.json is the `Manifest`.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itarflow.data.dataset import ImageDataset
from itarflow.data.loader import ignore_interrupts, watched, without_alarm
from itarflow.data.made import Footer, StoredFile, read_footer
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import PARTIAL, atomically, file_sha256, write_json
from itarflow.runtime.progress import image_progress
from itarflow.runtime.text import listed, printable, without_folders

ROW_GROUP = 128
"""Rows that are read at a time by those who stream."""

_DIGITS = 64  # of a SHA-256
_DICTIONARY = 2**28  # bytes of the distinct values of a row group, such as the vectors of its captions


@dataclass(frozen=True)
class Shard:
    """One file: its final path, the source's rows that it is for, and a SHA-256 of all that the set depends on."""

    path: Path
    split: str
    rows: range
    made_by: str

    def hidden(self, sha256: str) -> Path:
        """Its path until all are there."""
        return self.path.with_name(f".{self.path.stem}.{sha256}.parquet")


@dataclass(frozen=True)
class Content:
    """What is in a file that is whole.

    Attributes:
        path: where it is.
        images: its rows.
        broken: "name: reason" of each image that was left out.
        notes: what its writer had to say besides.
        num_bytes: its size.
        sha256: of its bytes, as its name or the manifest says.
    """

    path: Path
    images: int
    broken: tuple[str, ...]
    notes: Mapping[str, Any]
    num_bytes: int
    sha256: str


def plan_shards(out: Path, sizes: Mapping[str, int], shard_size: int, depends: Mapping[str, Any]) -> list[Shard]:
    """The files of some splits.

    Args:
        out: the folder.
        sizes: number of images by split.
        shard_size: images a file.
        depends: all that the files depend on, as JSON has it.
    """
    shards, made_by = [], hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    for split, size in sizes.items():
        count = -(-size // shard_size)
        for index in range(count):
            rows = range(index * shard_size, min((index + 1) * shard_size, size))
            shards.append(Shard(out / f"{split}-{index:05}-of-{count:05}.parquet", split, rows, made_by))
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
        if isinstance(image, Tensor):
            return image
        return printable(without_folders(image, self._source)).replace("\n", "\\n")  # on one line, whatever the name


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
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else the loader would advance torch's global one
    )
    return watched(
        without_alarm(loader), "whole files are kept, and the same command goes on: run it with fewer num_workers"
    )


def _start_worker(worker: int) -> None:
    """Ignore Ctrl-C, and end with the process that has started this one, however that ends.

    PyTorch's workers look for it too, but then wait for ever to hand over their last batch, if it is large.
    """
    ignore_interrupts(worker)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        while parent is not None and parent.is_alive() and os.getppid() == parent.pid:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
    # A name of the partial files, so that it is removed if this process is killed before the last rename.
    broken, whole = list[str](), shard.path.with_name(f"{PARTIAL}{shard.path.name}")
    group: list[Mapping[str, Any]] = []
    schema = features.arrow_schema
    try:
        with (
            atomically(whole) as partial,
            # Images and codes do not compress further, and their minima are of no use.
            pq.ParquetWriter(
                partial,
                schema,
                compression="none",
                use_dictionary=["label", "caption", "context"],
                dictionary_pagesize_limit=_DICTIONARY,
                write_statistics=["label"],
                write_page_checksum=True,
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
            footer = Footer(
                shard.made_by, shard.split, shard.rows.start, shard.rows.stop, tuple(broken), dict(notes())
            )
            writer.add_key_value_metadata(footer.to_metadata())
        sha256 = file_sha256(whole)
        whole.replace(shard.hidden(sha256))
    except OSError as error:
        raise OSError(
            f"{shard.path.parent} can't be written: {error}. Whole files are kept; the same command goes on."
        ) from error
    return read_content(shard, shard.hidden(sha256), sha256)


def read_content(shard: Shard, path: Path, sha256: str) -> Content:
    """What is in a file that is whole, by what it says at its end.

    Args:
        shard: that it should be.
        path: where it is.
        sha256: of its bytes, as its name or the manifest says; see `check_bytes`.

    Raises:
        DataError: it is damaged, or the file of another shard, set, or command.
    """
    footer, images = read_footer(path)
    if (footer.made_by, footer.split, range(footer.first, footer.stop)) != (shard.made_by, shard.split, shard.rows):
        raise DataError(
            f"{path} is damaged, or not of this command: it holds rows {footer.first:,} to {footer.stop:,} of "
            f"{printable(footer.split)}"
            + ("" if footer.made_by == shard.made_by else ", of another source or made with other settings")
            + f", expected {shard.rows.start:,} to {shard.rows.stop:,} of {shard.split}; delete it, and run the "
            "command again"
        )
    return Content(path, images, footer.broken, footer.notes, path.stat().st_size, sha256)


def read_contents(
    shards: Sequence[Shard], known: Mapping[Shard, Content], recorded: Sequence[StoredFile] = ()
) -> dict[Shard, Content]:
    """What is in all shards that are whole by now, in their order.

    Args:
        shards: all that are planned.
        known: read before, and not read again.
        recorded: the files of the manifest; those that have their final names are there.

    Raises:
        DataError: one is damaged, or not of this command.
    """
    contents, sums = {}, {file.name: file.sha256 for file in recorded}
    hidden = _hidden_files(shards[0].path.parent) if shards else {}
    for shard in shards:
        if shard in known:
            contents[shard] = known[shard]
        elif shard.path.exists():
            if shard.path.name not in sums:
                raise DataError(
                    f"{shard.path} is not of this command, whose manifest does not list it; delete it, and run the "
                    "command again"
                )
            contents[shard] = read_content(shard, shard.path, sums[shard.path.name])
        elif found := hidden.get(shard.path.stem):
            contents[shard] = read_content(shard, found, found.stem[-_DIGITS:])
    return contents


def check_bytes(contents: Mapping[Shard, Content], console: Console | None) -> None:
    """Refuse files whose bytes are not those that were written; all of them are read.

    Args:
        contents: of the files.
        console: where to draw a bar; None = nowhere.

    Raises:
        DataError: naming those that are damaged.
    """
    damaged = []
    total = sum(len(shard.rows) for shard in contents)
    with image_progress(console if contents else None, "checking", total, 0) as show:
        for shard, content in contents.items():
            if file_sha256(content.path) != content.sha256:
                damaged.append(str(content.path))
            show(len(shard.rows))
    if damaged:
        raise DataError(
            f"{listed(damaged)} {'is' if len(damaged) == 1 else 'are'} damaged: the SHA-256 is another one; delete "
            f"{'it' if len(damaged) == 1 else 'them'}, and run the command again"
        )


def stored_files(contents: Mapping[Shard, Content]) -> tuple[StoredFile, ...]:
    """What the manifest lists, once all are there."""
    return tuple(
        StoredFile(
            shard.path.name,
            shard.split,
            shard.rows.start,
            shard.rows.stop,
            content.images,
            content.num_bytes,
            content.sha256,
        )
        for shard, content in contents.items()
    )


def _hidden_files(out: Path) -> dict[str, Path]:
    """Files with hidden names, by the stem of their final name."""
    return {
        file.stem[1 : -_DIGITS - 1]: file
        for file in out.glob(".*.parquet")
        if not file.name.startswith(PARTIAL) and len(file.stem) > _DIGITS + 2
    }


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


def count_images(shards: Sequence[Shard], contents: Mapping[Shard, Content], source: str) -> dict[str, int]:
    """Images in all files, by split.

    Raises:
        DataError: a split has none.
    """
    images: dict[str, int] = {}
    for shard in shards:
        images[shard.split] = images.get(shard.split, 0) + contents[shard].images
    for split, count in images.items():
        if count == 0:
            reports = [report for shard in shards if shard.split == split for report in contents[shard].broken]
            raise DataError(
                f"none of the images in {source}, split {split}, could be read; expected pictures: look at the first "
                f"ones, and delete {shards[0].path.parent} before you try again:\n  " + "\n  ".join(reports[:5])
            )
    return images


def show_shards(contents: Mapping[Shard, Content]) -> None:
    """Give all their final names."""
    for shard, content in contents.items():
        if content.path != shard.path:
            content.path.rename(shard.path)
