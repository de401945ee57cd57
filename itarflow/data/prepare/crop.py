"""Crop and resize a data set once: parquet files of small images, which train like their source, only faster.

OUT/prepare.json   train-00000-of-00012.parquet ...   broken.json (if images could not be read); see `shards`.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import datasets
from PIL import Image
from rich.console import Console
from torch.utils.data import Dataset

from itarflow import __version__
from itarflow.data.codes import PREPARED
from itarflow.data.context import ContextCard
from itarflow.data.dataset import ImageDataset
from itarflow.data.made import Manifest
from itarflow.data.prepare.contexts import (
    FEATURES,
    Captions,
    begin_captions,
    caption_notes,
    finished_card,
    plan_captions,
)
from itarflow.data.prepare.manifest import (
    SourceConfig,
    check_room,
    check_settings,
    check_settings_there,
    check_source_there,
    clear_leftovers,
    say_understood,
    stored_manifest,
)
from itarflow.data.prepare.shards import (
    Content,
    Reader,
    Shard,
    broken_by_split,
    check_broken,
    check_bytes,
    count_images,
    label_features,
    plan_shards,
    read_ahead,
    read_contents,
    show_shards,
    stored_files,
    write_shard,
)
from itarflow.runtime.devices import usable_cores, usable_device
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import folder_lock, write_json
from itarflow.runtime.progress import image_progress

Format = Literal["png", "jpeg", "webp"]
"""Formats that images are stored in."""

_TASK = 16  # images a worker is given at a time: few, so that it soon hears of an interruption


@dataclass(frozen=True)
class PrepareConfig(SourceConfig):
    """What to prepare, and how."""

    in_channels: int = 3
    """3 = RGB, 1 = grey."""
    format: Format = "png"
    """png keeps every pixel as training on the source would see it. jpeg and webp are smaller, but lossy: a model
    learns their artefacts too, and FID against the original images suffers."""
    quality: int = 95
    """Quality of jpeg (whose colours are kept at full resolution) and webp, 1 to 100. Not used by png."""
    shard_size: int = 10_000
    """Images a file. An interruption loses what there is of the file being written, so up to so many images."""
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
        context: of captions, if there are any.
    """

    images: Mapping[str, int]
    broken: Mapping[str, tuple[str, ...]]
    class_names: tuple[str, ...]
    shards: int
    num_bytes: int
    images_per_second: float | None
    context: ContextCard | None = None


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
        OSError: the folder cannot be written, there is no such text encoder, or the disk has too little room for the
            vectors of captions.
        ImportError: there are captions, but transformers is not installed.
    """
    _check(config)
    manifest_file, settings = config.out / PREPARED, _settings(config)
    begun = stored_manifest(config, PREPARED)
    check_settings_there(config.out, begun, settings)
    sets, source, texts = config.open(config.in_channels)
    say_understood(console, source)
    captions = plan_captions(config, texts, begun)
    if captions:
        captions.say(console)
    sizes = {split: len(images) for split, images in sets.items()}
    depends = {"settings": settings, "source": source.content, "classes": source.class_names}
    depends |= captions.depends if captions else {}
    shards = plan_shards(config.out, sizes, config.shard_size, depends)
    manifest = Manifest(itarflow=__version__, settings=settings, source=source, shards=len(shards),
                        context=captions.card if captions else None)  # fmt: skip
    with folder_lock(config.out):
        stored = stored_manifest(config, PREPARED)
        check_source_there(config.out, stored, manifest)
        clear_leftovers(config.out)
        manifest = stored or manifest
        if stored is None:
            write_json(manifest_file, manifest.to_json())
        begin_captions(captions, config.out)
        contents, speed = _write_shards(config, sets, manifest, shards, captions, console)
        broken, images = broken_by_split(shards, contents), count_images(shards, contents, config.source)
        manifest = replace(
            manifest,
            context=finished_card(captions, config.out, contents),
            images=images,
            broken={split: len(reports) for split, reports in broken.items()},
            files=stored_files(contents),
        )
        write_json(manifest_file, manifest.to_json())  # first, as the names that are shown no longer hold a SHA-256
        show_shards(contents)
        write_json(manifest_file, replace(manifest, finished=True).to_json())
    return Prepared(
        images=images,
        broken=broken,
        class_names=source.class_names,
        shards=len(shards),
        num_bytes=sum(content.num_bytes for content in contents.values()),
        images_per_second=speed,
        context=manifest.context,
    )


def _check(config: PrepareConfig) -> None:
    """Check the settings of this module; `load_splits` checks the rest."""
    check_settings(config, {"size": 1, "shard_size": 1, "max_broken": 0, "num_workers": 0, "context_tokens": 1})
    if config.format not in get_args(Format):
        raise DataError(f"format {config.format!r} is unknown; use one of {', '.join(get_args(Format))}")
    if not 1 <= config.quality <= 100:
        raise DataError(f"quality is {config.quality}; expected 1 to 100")


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What the images depend on, as JSON has it."""
    quality = None if config.format == "png" else config.quality
    return config.settings(without=("max_broken", "num_workers")) | {"quality": quality}


def _write_shards(
    config: PrepareConfig,
    sets: Mapping[str, ImageDataset],
    manifest: Manifest,
    shards: Sequence[Shard],
    captions: Captions | None,
    console: Console | None,
) -> tuple[dict[Shard, Content], float | None]:
    """Write the shards that are missing; return what is in all of them, and the speed in images a second."""
    contents = read_contents(shards, {}, manifest.files)
    check_bytes(contents, console)
    check_broken(config.out, shards, contents, config.max_broken)
    missing = [shard for shard in shards if shard not in contents]
    done, total = (sum(len(shard.rows) for shard in group) for group in (contents, shards))
    if captions:
        needed = captions.estimate.image_bytes * (total - done)
        check_room(config.out, needed, f"the vectors of the captions of {total - done:,} images")
    features = datasets.Features({"image": datasets.Image()} | label_features(manifest.source.class_names))
    features = datasets.Features(features | (FEATURES if captions else {}))
    start = time.monotonic()
    pictures = itertools.chain.from_iterable(
        read_ahead(
            _Encoder(config, Reader(sets, config.source)),
            missing,
            batch_size=_TASK,
            num_workers=usable_cores() if config.num_workers is None else config.num_workers,
        )
    )
    if captions and missing:
        captions.encoder.to(usable_device(None))
    with image_progress(console, "preparing", total, done) as show:
        for shard in missing:
            rows, noted = _rows(config, shard, sets[shard.split], pictures, show), list[tuple[int, int]]()
            if captions:
                rows = captions.beside(rows, shard, noted.append)
            contents[shard] = write_shard(shard, features, rows, partial(caption_notes, noted))
            check_broken(config.out, shards, contents, config.max_broken)
    return contents, (total - done) / (time.monotonic() - start) if missing else None


def _rows(
    config: PrepareConfig,
    shard: Shard,
    images: ImageDataset,
    pictures: Iterator[bytes | str],
    show: Callable[[int], None],
) -> Iterator[dict[str, Any] | str]:
    """The values of each row of a shard, or why it has none."""
    for row, picture in zip(shard.rows, pictures, strict=False):
        yield (
            picture
            if isinstance(picture, str)
            else {
                "image": {"bytes": picture, "path": f"{row:08}.{config.format}"},
                "label": int(images.labels[row]),
            }
        )
        show(1)


class _Encoder(Dataset[bytes | str]):
    """The encoded image at (split, row), or "name: reason" why there is none."""

    def __init__(self, config: PrepareConfig, reader: Reader) -> None:
        self._reader = reader
        self._format = config.format.upper()
        # Level 1 is a third faster than Pillow's 6 for 2 % more bytes.
        lossy = {"quality": config.quality} | ({"subsampling": 0} if config.format == "jpeg" else {})
        self._options = {"compress_level": 1} if config.format == "png" else lossy

    def __getitem__(self, place: tuple[str, int]) -> bytes | str:
        image = self._reader[place]
        if isinstance(image, str):
            return image
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels.contiguous().numpy()).save(buffer, self._format, **self._options)
        return buffer.getvalue()
