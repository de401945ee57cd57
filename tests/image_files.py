"""Images, folders of images and parquet files for the tests of data, and how to open them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from itarflow.data import DataConfig, load_data
from itarflow.data.dataset import ImageDataset
from itarflow.data.load import ImageData

datasets.disable_progress_bars()

TYPED = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    value = 0
    for name, count in counts.items():
        for index in range(count):
            write_image(folder / name / f"{index:03}.png", value)
            value += 1
    return folder


def encoded(value: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, columns: dict[str, Any], features: datasets.Features | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if features is None:
        pq.write_table(pa.table(columns), path)
    else:
        datasets.Dataset.from_dict(columns, features).to_parquet(str(path))
    return path


def write_row_groups(path: Path, count: int, rows: int, first: int = 0) -> Path:
    """Parquet file of typed columns whose row groups have so many rows."""
    table = datasets.Dataset.from_dict(typed_columns(count, first), TYPED).data.table
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(TYPED.arrow_schema.metadata), path, row_group_size=rows)
    return path


def typed_columns(count: int, first: int = 0) -> dict[str, Any]:
    return {
        "image": [{"bytes": encoded(first + index), "path": f"{index}.png"} for index in range(count)],
        "label": [index % 2 for index in range(count)],
    }


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def write_one_broken(folder: Path) -> Path:
    """Five images in two classes, of which the third (the last of class a) is cut short."""
    write_classes(folder, {"a": 3, "b": 2})
    damage(folder / "a" / "002.png")
    return folder


def load(path: Path | str, *, image_size: int = 8, in_channels: int = 3, **options: Any) -> ImageData:
    options = {"held_out_images": 0, "num_workers": 0} | options
    config = DataConfig(path=str(path), **options)
    data = load_data(config, image_size=image_size, in_channels=in_channels)
    return data.decoded() if config.in_memory else data


def values(dataset: ImageDataset) -> list[int]:
    """Grey value of each image: the tests' images are flat, and tell themselves apart by it."""
    return [int(dataset[index].image[0, 0, 0]) for index in range(len(dataset))]
