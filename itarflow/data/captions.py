"""Captions of images: the texts of a column, or made of the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from itarflow.data.dataset import ImageDataset
from itarflow.data.labels import column_values
from itarflow.data.sources import Rows
from itarflow.runtime.errors import DataError
from itarflow.runtime.text import listed, printable

_SHOWN = 3  # images without a caption that a message names


def read_captions(
    tables: Mapping[str, Rows],
    sets: Mapping[str, ImageDataset],
    captions: str,
    class_names: Sequence[str],
    *,
    allow_empty: bool,
) -> dict[str, list[str]]:
    """The caption of each image, by split.

    Args:
        tables: rows by split.
        sets: the images of these rows, and their labels.
        captions: a column of texts, or a template with {} for the name of the class, such as "a photo of a {}".
        class_names: in the order of the labels.
        allow_empty: whether images may lack a caption; it is "" then.

    Raises:
        DataError: there is no such column, it holds no texts, images are unlabelled that a template is for, or some
            lack a caption.
    """
    if "{}" in captions:
        if not class_names:
            raise DataError(
                f"captions {captions!r} is a template for names of classes, but the images are unlabelled; name a "
                "column of texts, or put the images of each class into a folder"
            )
        of_class = [*(captions.replace("{}", name) for name in class_names), ""]  # the last one: no label
        found = {split: [of_class[label] for label in images.labels.tolist()] for split, images in sets.items()}
    else:
        found = {split: _texts(split, table, captions) for split, table in tables.items() if split in sets}
    missing = [(split, row) for split, texts in found.items() for row, text in enumerate(texts) if not text]
    if missing and not allow_empty:
        first = [_name(sets[split], split, row) for split, row in missing[:_SHOWN]]
        what = "label to make a caption of" if "{}" in captions else f"caption in column {captions!r}"
        raise DataError(
            f"{len(missing):,} of {sum(map(len, found.values())):,} images have no {what}: {listed(first)}"
            f"{', ...' if len(missing) > _SHOWN else ''}. Write it, remove these images, or take the empty caption "
            "for them, which stands for no condition, by --empty-captions"
        )
    return found


def _texts(split: str, table: Rows, column: str) -> list[str]:
    """The texts of a column; "" where there is none, or nothing but spaces."""
    if column not in table.features:
        names = printable(listed(map(str, table.features), 20))
        raise DataError(
            f"split {split!r} has no column {printable(repr(column))} with captions, only [{names}]; name one of "
            'texts, or write a template with {} for the name of the class, such as "a photo of a {}"'
        )
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        raise DataError(
            f"column {column!r} holds classes; expected texts: make captions of the names of classes by a template, "
            'such as "a photo of a {}"'
        )
    values = column_values(table, column)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        several = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        raise DataError(
            f"column {column!r} with captions is of type {printable(str(values.type))}; expected one text for each "
            f"image: {'choose one of the several' if several else 'name another one'}, or write a column of its own"
        )
    return [text if text and not text.isspace() else "" for text in values.to_pylist()]


def _name(images: ImageDataset, split: str, row: int) -> str:
    return printable(images.file(row) or f"row {row} of {split}")
