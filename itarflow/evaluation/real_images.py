"""The real images that a checkpoint's samples are compared with: cropped as in its training, and of its classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypedDict

from accelerate import Accelerator, PartialState

from itarflow.data.images import Crop, square_side
from itarflow.data.load import DataConfig, load_data
from itarflow.evaluation.metrics.reference import Reference, reference_of
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.errors import DataError
from itarflow.runtime.json_file import as_type
from itarflow.runtime.processes import main_first


class _Data(TypedDict, total=False):
    crop: Crop | None


class _Recipe(TypedDict, total=False):
    data: _Data | None


class _Training(TypedDict, total=False):
    recipe: _Recipe | None


def crop_for(pipe: ITARFlowPipeline, crop: Crop | None = None) -> Crop:
    """How real images become square: as is asked for, else as in the checkpoint's training, if that is known.

    Args:
        pipe: the checkpoint.
        crop: asked for; None = any.

    Raises:
        ValueError: another crop is asked for than that of the checkpoint's training.
        DataError: the checkpoint's record of its training is damaged.
    """
    training = as_type(pipe.config.training or {}, _Training, "training, in the checkpoint's model_index.json,")
    trained = ((training.get("recipe") or {}).get("data") or {}).get("crop")
    if crop is not None and trained is not None and crop != trained:
        raise ValueError(
            f"crop is {crop}, but the checkpoint was trained on images with crop {trained}; the figures would compare "
            f"the crops, not the images. Take {trained}, which is also the default."
        )
    return crop or trained or "center"


def reference_for(
    pipe: ITARFlowPipeline, data: DataConfig, *, accelerator: Accelerator | PartialState, **options: Any
) -> Reference:
    """Statistics of real images of the size, channels, crop and classes of a checkpoint; see `reference_of`.

    Args:
        pipe: the checkpoint.
        data: where the images are.
        accelerator: of the launch; every process calls this.
        options: of `reference_of`.

    Raises:
        ValueError: the crop differs from that of the checkpoint's training.
        DataError: the images have another number of classes than the checkpoint.
        RunError: as `reference_of`.
    """
    crop_for(pipe, data.crop)
    channels, size = pipe.picture_shape[0], square_side(pipe.picture_shape)
    whole = replace(data, held_out_split=None, held_out_images=0, in_memory=False)  # as `reference_of` reads them
    found = main_first(accelerator, lambda: load_data(whole, image_size=size, in_channels=channels))
    ours, theirs = pipe.flow.config.num_classes, len(found.class_names)
    if ours and theirs and ours != theirs:
        raise DataError(
            f"the images in {data.path} have {theirs} classes, but the checkpoint knows {ours}; expected images "
            "like those that it was trained on. `itarflow evaluate --reference` compares with statistics of others."
        )
    return reference_of(data, image_size=size, in_channels=channels, accelerator=accelerator, **options)
