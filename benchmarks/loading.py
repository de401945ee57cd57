"""Images a second that one core reads: from image files as they come, and from parquet files of the right size."""

from __future__ import annotations

import io
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import datasets
import torch
from peaks import device_name
from PIL import Image
from report import quartiles, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table

from itarflow.data import DataConfig, load_data
from itarflow.data.images import convert_image, crop_image
from itarflow.data.load import ImageDataset
from itarflow.data.loader import batches
from itarflow.data.order import training_sampler
from itarflow.data.sources import open_splits

IMAGES_PER_FILE = 1000  # of parquet
IMAGES_PER_ROW_GROUP = 32  # few, so that the small copies have many
SHUFFLE_BUFFER = 256  # small too: most of the row groups are not in memory


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Reading images: files as they come, and PNG in parquet, also streamed; one worker, one thread."""

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
    json: Path | None = None
    """Write the figures here, too."""

    def run(self, command: str, console: Console) -> None:
        """Measure, and print a table."""
        torch.set_num_threads(1)
        records: list[LoaderRecord] = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            datasets.config.HF_DATASETS_CACHE = folder / "cache"
            datasets.disable_progress_bars()
            pixels = write_jpegs(self, folder / "jpeg")
            for size in self.sizes:
                prepared = folder / str(size)
                write_parquet(load(folder / "jpeg", size), prepared)
                for source, place, streaming in (
                    ("JPEG files", folder / "jpeg", False),
                    ("PNG in parquet", prepared, False),
                    ("PNG in parquet, streamed", prepared, True),
                ):
                    records.append(record(self, command, size, source, place, streaming=streaming))
                    if self.json is not None:
                        write_json(records, self.json)
        table = Table(title=f"Loader, one worker, batches of {self.batch_size}; JPEG files of {pixels} pixels")
        for column in ("size", "source", "kB an image", "images/s per core", "quartiles"):
            table.add_column(column, justify="left" if column == "source" else "right")
        for row in records:
            spread = f"{row.lower_quartile:,.0f}, {row.upper_quartile:,.0f}"
            table.add_row(
                str(row.image_size), row.variant, f"{row.bytes_per_image / 1e3:.1f}", f"{row.images_per_second:,.0f}",
                spread,
            )  # fmt: skip
        console.print(table)


@dataclass(frozen=True, kw_only=True)
class LoaderRecord:
    """One source of images at one size."""

    path: str
    variant: str
    """The source."""
    image_size: int
    batch_size: int
    bytes_per_image: float
    """On disk."""
    images_per_second: float
    """Median."""
    lower_quartile: float
    upper_quartile: float
    repeats: int
    device: str
    torch_version: str
    date: str
    command: str


def record(options: Loader, command: str, size: int, source: str, place: Path, *, streaming: bool) -> LoaderRecord:
    """Measure one source."""
    low, middle, high = quartiles(measure(load(place, size, streaming), options))
    on_disk = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return LoaderRecord(
        path="loader",
        variant=source,
        image_size=size,
        batch_size=options.batch_size,
        bytes_per_image=on_disk / len(load(place, size, streaming)),
        images_per_second=middle,
        lower_quartile=low,
        upper_quartile=high,
        repeats=options.repeats,
        device=device_name(torch.device("cpu")),
        torch_version=torch.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )


def load(path: Path, size: int, streaming: bool = False) -> ImageDataset:
    """All images below a folder."""
    config = DataConfig(path=str(path), held_out_images=0, streaming=streaming)
    return load_data(config, image_size=size, in_channels=3).train


def write_jpegs(options: Loader, folder: Path) -> str:
    """JPEG files of images evenly spaced in the source; their median width and height."""
    rows = open_splits(options.data).train
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


def measure(dataset: ImageDataset, options: Loader) -> list[float]:
    """Images a second in each repetition."""
    sampler = training_sampler(dataset, options.batch_size, shuffle_buffer=SHUFFLE_BUFFER)
    loader = batches(dataset, sampler, num_workers=1)
    rates = []
    for _ in range(options.repeats + 1):
        began = time.perf_counter()
        count = sum(len(batch.labels) for batch in itertools.islice(loader, options.num_batches))
        rates.append(count / (time.perf_counter() - began))
    return rates[1:]
