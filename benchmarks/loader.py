"""Images a second that one core reads: from image files as they come, and from parquet files of the right size.

python benchmarks/loader.py --data images/ --sizes 64 128 256
"""

from __future__ import annotations

import io
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from itarflow.batches import batches, training_sampler
from itarflow.data import DataConfig, ImageDataset, load_data
from itarflow.images import convert_image, crop_image
from itarflow.sources import open_splits

IMAGES_PER_FILE = 1000  # of parquet
IMAGES_PER_ROW_GROUP = 32  # few, so that the small copies have many
SHUFFLE_BUFFER = 256  # small too: most of the row groups are not in memory


@dataclass
class Options:
    """Measure the loader."""

    data: str
    """Where the images are: a folder, parquet files, or a data set on the Hub."""
    sizes: tuple[int, ...] = (64, 128, 256)
    """Heights and widths to train at, in pixels."""
    jpeg_size: int | None = None
    """Make the JPEG files squares of so many pixels; None leaves them as they are in the source."""
    images: int = 4000
    """Images that are copied, at most."""
    batch_size: int = 64
    """Images of a batch."""
    num_batches: int = 30
    """Batches of a timed repetition."""
    repeats: int = 5
    """Timed repetitions, of which the median is shown, after one that is not timed."""


def main(options: Options) -> None:
    """Print a table."""
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        datasets.disable_progress_bars()
        pixels = write_jpegs(options, folder / "jpeg")
        table = Table(title=f"Loader, one worker, batches of {options.batch_size}; JPEG files of {pixels} pixels")
        for column in ("size", "source", "kB an image", "images/s per core", "slowest, fastest"):
            table.add_column(column, justify="left" if column == "source" else "right")
        for size in options.sizes:
            prepared = folder / str(size)
            write_parquet(load(folder / "jpeg", size), prepared)
            for source, place, streaming in (
                ("JPEG files", folder / "jpeg", False),
                ("PNG in parquet", prepared, False),
                ("PNG in parquet, streamed", prepared, True),
            ):
                rates = measure(load(place, size, streaming), options)
                files = [file for file in place.rglob("*") if file.is_file()]
                kilobytes = sum(file.stat().st_size for file in files) / 1e3 / len(load(place, size, streaming))
                spread = f"{min(rates):,.0f}, {max(rates):,.0f}"
                table.add_row(str(size), source, f"{kilobytes:.1f}", f"{statistics.median(rates):,.0f}", spread)
    console.print(table)


def load(path: Path, size: int, streaming: bool = False) -> ImageDataset:
    """All images below a folder."""
    config = DataConfig(path=str(path), held_out_images=0, streaming=streaming)
    return load_data(config, image_size=size, in_channels=3).train


def write_jpegs(options: Options, folder: Path) -> str:
    """JPEG files of images evenly spaced in the source; their median width and height."""
    rows, _ = open_splits(options.data)
    column = next(name for name, feature in rows.features.items() if isinstance(feature, datasets.Image))
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    count = min(options.images, len(rows))
    folder.mkdir()
    sizes = []
    for number in track(range(count), "writing JPEG files", console=Console(stderr=True)):
        value = rows[number * len(rows) // count][column]
        content = value["bytes"] or Path(value["path"]).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "JPEG" and options.jpeg_size is None:
                sizes.append(image.size)
            else:
                upright = convert_image(image, 3)
                upright = crop_image(upright, options.jpeg_size) if options.jpeg_size else upright
                buffer = io.BytesIO()
                upright.save(buffer, "JPEG", quality=90)
                content = buffer.getvalue()
                sizes.append(upright.size)
        (folder / f"{number:06}.jpg").write_bytes(content)
    return " x ".join(f"{statistics.median(sides):.0f}" for sides in zip(*sizes, strict=True))


def write_parquet(dataset: ImageDataset, folder: Path) -> None:
    """Parquet files of the images as PNG, cropped and resized as training does."""
    features = datasets.Features({"image": datasets.Image()})
    folder.mkdir()
    for first in range(0, len(dataset), IMAGES_PER_FILE):
        images = []
        for index in range(first, min(first + IMAGES_PER_FILE, len(dataset))):
            buffer = io.BytesIO()
            Image.fromarray(dataset[index].image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        shard = datasets.Dataset.from_dict({"image": images}, features)
        shard.to_parquet(str(folder / f"{first:06}.parquet"), batch_size=IMAGES_PER_ROW_GROUP)


def measure(dataset: ImageDataset, options: Options) -> list[float]:
    """Images a second in each repetition."""
    sampler = training_sampler(dataset, options.batch_size, shuffle_buffer=SHUFFLE_BUFFER)
    loader = batches(dataset, sampler, num_workers=1)
    rates = []
    for _ in range(options.repeats + 1):
        began = time.perf_counter()
        count = sum(len(batch.labels) for batch in itertools.islice(loader, options.num_batches))
        rates.append(count / (time.perf_counter() - began))
    return rates[1:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Options, description=__doc__))
