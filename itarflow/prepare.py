"""Crop and resize a data set once: parquet files of small images, which train like their source, only faster.

OUT/prepare.json   train-00000-of-00012.parquet ...   broken.json (if images could not be read)

Rows are dealt to files before any is read, so that a broken image makes its file shorter and moves no other. A file
has a hidden name (.train-00000-of-00012.parquet) until all are there: nobody trains on a part of them unawares.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from itarflow import __version__
from itarflow.batches import ignore_interrupts
from itarflow.data import DataConfig, load_splits
from itarflow.dataset import ImageDataset
from itarflow.images import Crop, DataError
from itarflow.progress import image_progress

Format = Literal["png", "jpeg", "webp"]
"""Picture formats that images are stored in."""

_ROW_GROUP = 128  # images that are read at a time by those who stream
_TASK = 16  # images a worker is given at a time: few, so that it soon hears of an interruption
_BROKEN = b"itarflow.broken"


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how."""

    source: str
    """Where the images are: digits, a folder, parquet files, or a data set on the Hugging Face Hub."""
    out: Path
    """Folder to write: a new or empty one, or one that the same command has begun."""
    size: int
    """Height and width of the images in pixels: the model's image_size."""
    crop: Crop = "center"
    """How images become square, as by --data.crop in training; those of the right size stay as they are.
    center = as torchvision and the papers' code do; adm = as for ADM's and EDM's ImageNet; edm = EDM's center-crop."""
    split: tuple[str, ...] = ("train",)
    """Splits to prepare, such as train test. They keep their names, and share their classes."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    image_column: str | None = None
    """Column with the images. None finds the first one."""
    label_column: str | None = None
    """Column with the class labels. None finds it, if there is one."""
    in_channels: int = 3
    """3 = RGB, 1 = grey."""
    format: Format = "png"
    """png keeps every pixel as training on the source would see it. jpeg and webp are smaller, but lossy: a model
    learns their artefacts too, and FID against the original images suffers."""
    quality: int = 95
    """Quality of jpeg (whose colours are kept at full resolution) and webp, 1 to 100. Not used by png."""
    shard_size: int = 10_000
    """Images a file; what an interruption loses is less than one file."""
    max_broken: int = 100
    """Unreadable images are left out and listed in broken.json; stop at more than this many."""
    num_workers: int | None = None
    """Processes that decode and encode; 0 = none beside this one. None = one a processor core."""


@dataclass(frozen=True)
class Prepared:
    """What lies in the folder in the end.

    Attributes:
        images: by split, how many were written.
        broken: by split, "name: reason" of each image that was left out.
        class_names: () if the images are unlabelled.
        shards: number of parquet files.
        num_bytes: their size.
        images_per_second: of the images that this call worked on; None if all had been done before.
    """

    images: Mapping[str, int]
    broken: Mapping[str, tuple[str, ...]]
    class_names: tuple[str, ...]
    shards: int
    num_bytes: int
    images_per_second: float | None


@dataclass(frozen=True)
class _Shard:
    """One file: its final path, and the rows of the source that it is for."""

    path: Path
    split: str
    rows: range

    @property
    def hidden(self) -> Path:
        """Where it waits for the others."""
        return self.path.with_name(f".{self.path.name}")

    @property
    def found(self) -> Path | None:
        """Where it is, once it is whole."""
        return next((path for path in (self.path, self.hidden) if path.exists()), None)


@dataclass(frozen=True)
class _Content:
    images: int
    broken: tuple[str, ...]
    num_bytes: int


def prepare(config: PrepareConfig, *, console: Console | None = None) -> Prepared:
    """Write the images of some splits, cropped and resized, as parquet files; go on where an earlier call stopped.

    `config.out` can be trained on as `data.path`: it has the classes of the source, the same label for each image,
    and, as png, the very pixels that training on the source would see.

    Args:
        config: what to prepare, and how.
        console: where to draw a bar; None = nowhere.

    Returns:
        What lies in the folder, including what earlier calls did.

    Raises:
        DataError: the configuration or the source cannot be used, the folder holds something else, or more than
            `config.max_broken` images cannot be read. Files that are whole stay.
        OSError: the folder cannot be written.
    """
    _check(config)
    settings = _settings(config)
    _check_folder(config, {"settings": settings})
    sets, class_names = load_splits(
        DataConfig(
            path=config.source,
            name=config.name,
            image_column=config.image_column,
            label_column=config.label_column,
            crop=config.crop,
        ),
        config.split,
        image_size=config.size,
        in_channels=config.in_channels,
    )
    shards = [shard for split, images in sets.items() for shard in _shards(config, split, len(images))]
    manifest = {
        "itarflow": __version__,
        "settings": settings,
        "source_images": {split: len(images) for split, images in sets.items()},
        "classes": list(class_names),
        "shards": len(shards),
    }
    _check_folder(config, manifest)
    path = config.out / "prepare.json"
    if not path.exists():
        config.out.mkdir(parents=True, exist_ok=True)
        _write_json(path, manifest | {"finished": False})
    contents, speed = _write_shards(config, sets, class_names, shards, console)
    broken = _broken(shards, contents)
    images = {split: sum(contents[shard].images for shard in shards if shard.split == split) for split in sets}
    for shard in shards:
        if not shard.path.exists():
            shard.hidden.rename(shard.path)
    counts = {"images": images, "broken": {split: len(reports) for split, reports in broken.items()}}
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | counts | {"finished": True})
    for left in config.out.glob(".partial-*"):  # by a call that was killed
        left.unlink(missing_ok=True)
    return Prepared(
        images=images,
        broken=broken,
        class_names=class_names,
        shards=len(shards),
        num_bytes=sum(content.num_bytes for content in contents.values()),
        images_per_second=speed,
    )


def _check(config: PrepareConfig) -> None:
    """Refuse what only this module knows of; `load_splits` refuses the rest."""
    at_least = {"size": 1, "shard_size": 1, "max_broken": 0, "num_workers": 0}
    for name, low in at_least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise DataError(f"{name} is {value}; expected {low} or more")
    if config.format not in get_args(Format):
        raise DataError(f"format {config.format!r} is unknown; use one of {', '.join(get_args(Format))}")
    if not 1 <= config.quality <= 100:
        raise DataError(f"quality is {config.quality}; expected 1 to 100")
    if not config.split or len(set(config.split)) < len(config.split):
        raise DataError(f"split is {config.split}; expected names of splits, each once")
    for split in config.split:
        if not re.fullmatch(r"\w+", split):
            raise DataError(
                f"split {split!r} is no plain name such as train; prepare whole splits, and take parts of them in "
                "training, by data.split"
            )


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What the images depend on, as JSON has it."""
    elsewhere = ("out", "max_broken", "num_workers")
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in elsewhere}
    return values | {"split": list(config.split), "quality": None if config.format == "png" else config.quality}


def _check_folder(config: PrepareConfig, wanted: Mapping[str, Any]) -> None:
    """Refuse a folder with other things in it than a call with the same manifest has begun."""
    out, path = config.out, config.out / "prepare.json"
    source = Path(config.source).expanduser()
    if source.is_dir() and config.source != "digits" and out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{out} lies in {config.source}, and would be taken for a part of it; choose another folder")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; expected a new folder: choose another name")
    if not path.exists():
        if out.exists() and any(not file.name.startswith(".partial-") for file in out.iterdir()):
            raise DataError(f"{out} is a folder with other things in it; choose a new or empty one")
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        changes = [
            change for section, values in wanted.items() for change in _changes(section, stored[section], values)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged, or of another program; choose a new folder") from error
    if changes:
        raise DataError(
            f"{out} was begun with other settings, or the source has changed:\n  "
            + "\n  ".join(changes)
            + f"\nRun the command that began it, choose another folder, or delete {out} to begin anew."
        )


def _changes(section: str, stored: Any, wanted: Any) -> list[str]:
    """Lines that say what differs in a section of the manifest; its version may."""
    if stored == wanted or section == "itarflow":
        return []
    if isinstance(wanted, list):
        old, new = next(pair for pair in itertools.zip_longest(stored, wanted) if pair[0] != pair[1])
        return [f"{section}: {len(stored)} there, {len(wanted)} now; the first to differ is {old} there, {new} now"]
    if not isinstance(wanted, dict):
        return [f"{section}: {stored} there, {wanted} now"]
    title = "" if section == "settings" else f"{section} in "
    return [f"{title}{key}: {stored[key]} there, {value} now" for key, value in wanted.items() if stored[key] != value]


def _shards(config: PrepareConfig, split: str, num_images: int) -> Iterator[_Shard]:
    count = -(-num_images // config.shard_size)
    for index in range(count):
        rows = range(index * config.shard_size, min((index + 1) * config.shard_size, num_images))
        yield _Shard(config.out / f"{split}-{index:05}-of-{count:05}.parquet", split, rows)


def _write_shards(
    config: PrepareConfig,
    sets: Mapping[str, ImageDataset],
    class_names: Sequence[str],
    shards: Sequence[_Shard],
    console: Console | None,
) -> tuple[dict[_Shard, _Content], float | None]:
    """Write the shards that are missing; return what is in all of them, and the speed in images a second."""
    contents = {shard: _read_content(shard.found) for shard in shards if shard.found}
    _check_broken(config, shards, contents)
    missing = [shard for shard in shards if shard not in contents]
    done, total = (sum(len(shard.rows) for shard in group) for group in (contents, shards))
    features = datasets.Features({"image": datasets.Image()})
    if class_names:
        features["label"] = datasets.ClassLabel(names=list(class_names))
    start, results = time.monotonic(), _encoded(config, sets, missing)
    with image_progress(console, "preparing", total, done) as show:
        for shard in missing:
            labels = sets[shard.split].labels[shard.rows.start : shard.rows.stop].tolist()
            try:
                _write_shard(config, shard, labels, features, results, show)
            except OSError as error:
                raise OSError(
                    f"{config.out} can't be written: {error}. Whole files are kept; the same command goes on."
                ) from error
            except RuntimeError as error:
                raise DataError(
                    f"a worker process died: {error}. Perhaps memory ran out; whole files are kept, and the same "
                    "command goes on: run it with fewer num_workers"
                ) from error
            contents[shard] = _read_content(shard.hidden)
            _check_broken(config, shards, contents)
    return contents, (total - done) / (time.monotonic() - start) if missing else None


def _write_shard(
    config: PrepareConfig,
    shard: _Shard,
    labels: Sequence[int],
    features: datasets.Features,
    results: Iterator[bytes | str],
    show: Callable[[int], None],
) -> None:
    """Write the next results as one file, by its hidden name; those that are text say what is broken."""
    broken: list[str] = []
    schema = features.arrow_schema
    with (
        _atomically(shard.hidden) as partial,
        # Pictures are compressed already.
        pq.ParquetWriter(partial, schema, compression="none", use_dictionary=["label"]) as writer,
    ):
        for first in range(0, len(labels), _ROW_GROUP):
            rows, examples = shard.rows[first : first + _ROW_GROUP], []
            encoded = itertools.islice(results, len(rows))
            for row, label, result in zip(rows, labels[first : first + _ROW_GROUP], encoded, strict=True):
                if isinstance(result, str):
                    broken.append(result)
                else:
                    image = {"bytes": result, "path": f"{row:08}.{config.format}"}
                    examples.append({"image": image, "label": label})
            if examples:
                writer.write_table(pa.Table.from_pylist(examples, schema), row_group_size=_ROW_GROUP)
            show(len(rows))
        writer.add_key_value_metadata({_BROKEN: json.dumps(broken)})


class _Encoder(Dataset[bytes | str]):
    """The encoded image at (split, row), or "name: reason" why there is none."""

    def __init__(self, config: PrepareConfig, sets: Mapping[str, ImageDataset]) -> None:
        self._sets, self._root = sets, f"{Path(config.source).expanduser().absolute()}{os.sep}"
        self._format = config.format.upper()
        # Level 1 is a third faster than Pillow's 6 for 2 % more bytes.
        lossy = {"quality": config.quality} | ({"subsampling": 0} if config.format == "jpeg" else {})
        self._options = {"compress_level": 1} if config.format == "png" else lossy

    def __getitem__(self, place: tuple[str, int]) -> bytes | str:
        split, row = place
        image = self._sets[split].read(row)
        if isinstance(image, str):
            return image.replace(self._root, "")  # nobody's folders go out with the data
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels.contiguous().numpy()).save(buffer, self._format, **self._options)
        return buffer.getvalue()


def _encoded(
    config: PrepareConfig, sets: Mapping[str, ImageDataset], shards: Sequence[_Shard]
) -> Iterator[bytes | str]:
    """What `_Encoder` makes of all rows of the shards, in order; its processes start at once."""
    workers = _cores() if config.num_workers is None else config.num_workers
    workers = min(workers, -(-sum(len(shard.rows) for shard in shards) // _TASK))
    loader = DataLoader(
        _Encoder(config, sets),
        sampler=((shard.split, row) for shard in shards for row in shard.rows),
        batch_size=_TASK,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        collate_fn=list,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # else the loader draws from the global one, which is not its to advance
    )
    return itertools.chain.from_iterable(iter(loader))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_content(path: Path) -> _Content:
    """What is in a file that is whole."""
    try:
        footer = pq.read_metadata(path)
        broken = json.loads(footer.metadata[_BROKEN])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged, or not of this command; delete it, and run the command again") from error
    return _Content(footer.num_rows, tuple(broken), path.stat().st_size)


def _broken(shards: Sequence[_Shard], contents: Mapping[_Shard, _Content]) -> dict[str, tuple[str, ...]]:
    """By split, "name: reason" of each image that was left out so far."""
    found = [shard for shard in shards if shard in contents]
    return {
        split: tuple(report for shard in found if shard.split == split for report in contents[shard].broken)
        for split in dict.fromkeys(shard.split for shard in shards)
    }


def _check_broken(config: PrepareConfig, shards: Sequence[_Shard], contents: Mapping[_Shard, _Content]) -> None:
    """List the broken images, and refuse too many."""
    broken = _broken(shards, contents)
    reports = [report for reports in broken.values() for report in reports]
    if reports:
        _write_json(config.out / "broken.json", broken)
    if len(reports) > config.max_broken:
        raise DataError(
            f"{len(reports)} images could not be read, and max_broken is {config.max_broken}; all of them are listed "
            f"in {config.out / 'broken.json'}. To leave them out, raise max_broken and run the command again: it goes "
            f"on from here. To keep them, repair them and delete {config.out} first. The first ones:\n  "
            + "\n  ".join(reports[:5])
        )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with _atomically(path) as partial:
        partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _atomically(path: Path) -> Iterator[Path]:
    """A name to write a file under; if all goes well it comes to the disk and gets its own name, else it goes."""
    partial = path.with_name(f".partial-{uuid.uuid4().hex[:8]}{path.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
