"""What a call of the pipeline is given and gives: labels, a generator an image, and the types of its output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from itarflow.codec import to_uint8
from itarflow.flow.embedding import NULL_LABEL

logger = logging.get_logger(__name__)

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
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"
        raise ValueError(f"class label {label!r} is not known; names of this checkpoint: {known}.")
    if not isinstance(label, int):
        raise ValueError(f"class label {label!r} is neither a number nor a name; expected 0 .. {num_classes - 1}.")
    if not 0 <= label < num_classes:
        raise ValueError(f"class label {label} is out of range; expected 0 .. {num_classes - 1}, or None.")
    return label


def positive(name: str, value: int | None) -> int | None:
    """The value of a setting of that name, unless it is below 1.

    Raises:
        ValueError: it is.
    """
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; expected a number >= 1, or None.")
    return value


def check_output(output_type: str, channels: int) -> None:
    """Refuse a type of output that there is not, or not for images of so many channels.

    Raises:
        ValueError: naming the types that there are.
    """
    if output_type not in ("pil", "np", "pt", "codes"):
        raise ValueError(f"output_type is {output_type!r}; expected 'pil', 'np', 'pt' or 'codes'.")
    if output_type == "pil" and channels not in (1, 3):
        raise ValueError(
            f"output_type 'pil' makes pictures of 1 or 3 channels, but this pipeline's images have {channels}; "
            "use 'pt', 'np' or, if they are codes of a VAE that is not in it, 'codes'."
        )


def converted(images: Tensor, output_type: str) -> Tensor | np.ndarray | list[Image.Image]:
    """(B, C, H, W) in [-1, 1], or codes as they are -> the output type; says which images are not finite."""
    broken = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if broken:
        logger.warning(
            f"Images {broken} contain NaN or infinite values: the flow's inverse or the denoising diverged. Less "
            "guidance or float32 weights often help."
        )
    if output_type == "codes":
        return images
    if output_type == "pt":
        return (images.clamp(-1, 1) + 1) / 2
    if output_type == "np":
        return ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).float().cpu().numpy()
    return to_pil(images)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1], C = 1 or 3 -> greyscale or RGB pictures."""
    arrays = to_uint8(images.nan_to_num()).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
