"""What a training exports: the pipeline, its record of the training, and sample grids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from itarflow.codec import Vae
from itarflow.data.load import ImageData
from itarflow.denoisers.load import load_denoiser
from itarflow.denoisers.ode import lowest_level, noise_levels
from itarflow.denoisers.score import CheckedDenoiser
from itarflow.flow.tarflow import TARFlow
from itarflow.pipeline.folder import CARD, is_free
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import file_sha256, replace_folder, restore_folder, write_json
from itarflow.runtime.hub import INDEX
from itarflow.runtime.json_file import read_json
from itarflow.runtime.pictures import Grid, balanced_columns, save_picture, wrapped
from itarflow.runtime.pipeline_index import CHECKSUMS, MEASURED, SHARED, pipeline_index
from itarflow.runtime.seeds import image_generators
from itarflow.runtime.text import display_name, flat, printable
from itarflow.text_encoder import TextEncoder
from itarflow.training.captions import WITH_ENCODER, prompts_of, spread_captions, texts_of
from itarflow.training.held_out import Evaluation
from itarflow.training.recipe import Recipe
from itarflow.training.settings import FREE, to_json


def make_pipeline(
    flow: TARFlow,
    recipe: Recipe,
    class_names: tuple[str, ...],
    record: dict[str, Any] | None,
    vae: Vae | None = None,
    text: TextEncoder | None = None,
) -> ITARFlowPipeline:
    """The pipeline that samples during training and is shared afterwards, with its VAE if the flow models codes."""
    pipeline = ITARFlowPipeline(
        flow,
        recipe.scheduler(),
        guidance=asdict(recipe.sampling.guidance),
        class_names=list(class_names) if recipe.model.num_classes and class_names else None,
        training=record,
        vae=vae,
        text_encoder=None if text is None else text.encoder,
        tokenizer=None if text is None else text.tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_denoiser(recipe: Recipe, vae: Vae | None, device: torch.device | str = "cpu") -> CheckedDenoiser | None:
    """The denoiser of the recipe's sample grids, on the device; None = the flow itself.

    Raises:
        OSError: it can't be loaded.
        ValueError: it does not fit the images, the VAE, the labels or the noise levels.
    """
    name, scheduler = recipe.sampling.denoiser, recipe.scheduler().config
    if name is None:
        return None
    denoiser = load_denoiser(name, vae=vae, slice_size=recipe.sampling.denoise_batch_size, device=device)
    low = scheduler.t_min if scheduler.t_min < scheduler.t_max else lowest_level(denoiser, scheduler.t_max)
    model, levels = (
        recipe.model,
        noise_levels(scheduler.t_max, low, recipe.sampling.num_denoise_steps, scheduler.spacing),
    )
    denoiser.check((model.in_channels, model.image_size, model.image_size), model.num_classes, levels[:-1])
    return denoiser


def sample_grid(
    pipeline: ITARFlowPipeline, recipe: Recipe, data: ImageData, path: Path, accelerator: Accelerator
) -> None:
    """Write a grid of images from fixed noise and labels, classes in turn, or captions; the processes share the work.

    An image does not depend on the process that makes it, see `seeds.image_generators`.
    """
    denoiser = open_denoiser(recipe, pipeline.vae, pipeline.device)
    count, num_classes = recipe.sampling.num_images, recipe.model.num_classes
    generators = image_generators(torch.Generator().manual_seed(recipe.train.seed), count)
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    images: list[Image.Image] = []
    if mine:
        asked: dict[str, Any] = {"class_labels": [index % num_classes if num_classes else None for index in mine]}
        if recipe.model.takes_captions:
            shown = spread_captions(data, count)
            asked = {**prompts_of(data, [shown[index] for index in mine])}
        images = pipeline(
            **asked,
            generator=[generators[index] for index in mine],
            num_denoise_steps=recipe.sampling.num_denoise_steps,
            denoiser=denoiser,
            # As the held-out likelihoods, and on every device: not the faster type that a GPU samples in by default.
            inverse_dtype=torch.float32,
            denoise_dtype=torch.float32 if denoiser is None else None,
            batch_size=recipe.sampling.batch_size,
            denoise_batch_size=recipe.sampling.denoise_batch_size,
            decode_batch_size=recipe.sampling.decode_batch_size,
        ).images
    made = dict(gather_object(list(zip(mine, images, strict=True))))
    if accelerator.is_main_process:
        columns = num_classes if 2 <= num_classes <= 12 else 8
        classes = [printable(name) for name in pipeline.class_names]
        names = [classes[index % len(classes)] for index in range(count)] if classes else None
        facts = {}
        if recipe.model.takes_captions:
            texts = texts_of(data, spread_captions(data, count))
            columns, names = min(columns, balanced_columns(count)), wrapped(texts, made[0].width)
            facts = {"captions": "\n".join(texts)}
        path.parent.mkdir(exist_ok=True)
        grid = Grid(min(columns, count), names).drawn([made[index] for index in range(count)])
        save_picture(grid, path, facts)


def is_exported(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a pipeline of this training is there; what a killed export left is put back first.

    Its record may differ in settings that change neither weights nor samples, such as `train.log_every`. A text
    encoder that is in it, but not at hand, is no reason to write it anew: it would be lost.
    """
    restore_folder(folder)
    try:
        stored = read_json(folder / INDEX, dict[str, Any]).get("training")
    except (OSError, DataError):
        return False
    if not isinstance(stored, dict):
        return False
    wanted = _essence(json.loads(json.dumps(record)))
    if stored.get(WITH_ENCODER):
        wanted |= {WITH_ENCODER: True}
    return _essence(stored) == wanted


def _essence(record: dict[str, Any]) -> dict[str, Any]:
    free = {f"recipe.{name}" for name in FREE - {"codec.vae", "codec.revision"}}  # whose decoder is in the pipeline
    return {name: value for name, value in flat(record).items() if name not in free | {"data", "data_content"}}


def _index_of(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline; {} if there is none, or a damaged one."""
    try:
        return pipeline_index(folder)
    except (OSError, DataError):
        return {}


def export_pipeline(pipeline: ITARFlowPipeline, folder: Path) -> None:
    """Write a pipeline in the place of an older one, whole or not at all.

    A model card that was written by hand stays, and so does where the older one is shared; what was measured with it,
    `evaluations` and `plans`, stays if the weights are the very same.

    Raises:
        RunError: it can't be written; the older one is whole.
    """

    def write(place: Path) -> None:
        place.mkdir()
        old, card = _index_of(folder), folder / CARD
        if not is_free(card) and card.is_file() and not card.is_symlink():
            shutil.copyfile(card, place / CARD)
        write_json(place / INDEX, {name: old[name] for name in (SHARED,) if name in old})  # `save_pretrained` keeps it
        pipeline.save_pretrained(place)
        sums = _index_of(place)[CHECKSUMS]
        if all((folder / name).is_file() and file_sha256(folder / name) == value for name, value in sums.items()):
            for name in MEASURED:
                if old.get(name):
                    pipeline.record(place, name, partial(lambda value, _: value, old[name]))

    replace_folder(folder, write)


def training_record(recipe: Recipe, held_out: Evaluation, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a training in the pipeline, its model card and `itarflow info`.

    Args:
        recipe: resolved. Of data, VAE, text encoder or denoiser in a local folder, only the folder's name is recorded.
        held_out: as `held_out.evaluate_held_out` returns it.
        facts: such as steps, seconds and numbers of images.
    """
    settings = to_json(recipe)
    for section, name in (("data", "path"), ("codec", "vae"), ("text", "encoder"), ("sampling", "denoiser")):
        if settings[section][name] is not None:
            settings[section][name] = display_name(settings[section][name])
    metrics = {f"held-out nll at t={level} (nats/dim)": value for level, value in held_out.nll.items()}
    if held_out.bpd is not None:
        metrics["held-out bits/dim"] = held_out.bpd
    return {
        "name": recipe.name,
        "data": settings["data"]["path"],
        **facts,
        "metrics": metrics,
        "recipe": settings,
    }
