"""The labels of a call: numbers or names, one an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from itarflow.flow.embedding import NULL_LABEL
from itarflow.runtime.text import printable

Label = int | str | None
"""A number, a name, or none."""


def label_list(class_labels: Label | Sequence[Label], num_images: int | None) -> list[Label]:
    """A label an image.

    Args:
        class_labels: one, which is repeated, or as many as there are images.
        num_images: None = one a label.

    Raises:
        ValueError: there are none, or not as many as images.
    """
    given: list[Label]
    if isinstance(class_labels, Tensor | np.ndarray | np.generic):
        class_labels = class_labels.tolist()
    if class_labels is None or isinstance(class_labels, int | float | str):
        given = [class_labels]
    else:
        given = [label.item() if isinstance(label, Tensor | np.integer) else label for label in class_labels]
    if not given:
        raise ValueError("class_labels is empty; expected at least one label, or None for unlabelled images.")
    if num_images is not None and (num_images < 1 or len(given) not in (1, num_images)):
        raise ValueError(
            f"num_images is {num_images} for {len(given)} class_labels; expected a number >= 1, "
            "and a single label or as many labels as images."
        )
    return given * num_images if num_images is not None and len(given) == 1 else given


def label_number(label: Label, num_classes: int, names: Sequence[str]) -> int:
    """The number of a label given by number or name; None = no label.

    Args:
        label: what was given.
        num_classes: of the flow; 0 = it has no labels.
        names: of the labels in order; () if they have none.

    Raises:
        ValueError: there is no such label.
    """
    if label is None:
        return NULL_LABEL
    if num_classes == 0:
        raise ValueError(f"class label {label!r} was given, but this flow has no classes; leave class_labels out.")
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        known = printable(", ".join(names[:10]) + (", ..." if len(names) > 10 else "")) if names else "none"
        raise ValueError(f"class label {label!r} is not known; names of this checkpoint: {known}.")
    if not isinstance(label, int):
        raise ValueError(f"class label {label!r} is neither a number nor a name; expected 0 .. {num_classes - 1}.")
    if not 0 <= label < num_classes:
        raise ValueError(f"class label {label} is out of range; expected 0 .. {num_classes - 1}, or None.")
    return label


def label_tensor(numbers: Sequence[int | None], device: torch.device | str = "cpu") -> Tensor | None:
    """Labels (B,) int64 by number, NULL_LABEL where there is none; None if no image has one."""
    if all(number is None or number == NULL_LABEL for number in numbers):
        return None
    return torch.tensor([NULL_LABEL if number is None else number for number in numbers], device=device)
