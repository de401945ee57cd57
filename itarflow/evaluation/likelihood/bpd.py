"""The likelihood of each image of a data set, by one or several processes, so that it goes on where it was stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from itarflow.codec import Codec, VaeCodec, codec_of, to_pixels, vae_identity, vae_traits
from itarflow.data.context import CaptionError, ContextCard
from itarflow.data.dataset import ImageDataset, too_many_broken
from itarflow.data.images import Crop, spread_over, square_side
from itarflow.data.load import DataConfig, ImageData, load_data
from itarflow.data.loader import ignore_interrupts, watched, without_alarm
from itarflow.data.prepare.shards import Reader
from itarflow.evaluation.likelihood.bounds import Kind, Noise, likelihoods, mean_of, noises_of
from itarflow.evaluation.likelihood.captions import captions_facts, checked_captions, context_shape
from itarflow.evaluation.likelihood.report import Figures, Report, Rows, append, open_report, write_report
from itarflow.flow.embedding import NULL_LABEL
from itarflow.flow.tarflow import TARFlow
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.pipeline.prompts import takes_prompts
from itarflow.runtime.devices import tf32_products
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import check_writable, folder_lock, weights_digest
from itarflow.runtime.launch import joined
from itarflow.runtime.pictures import blank_figure
from itarflow.runtime.processes import main_first, on_main, shared_images
from itarflow.runtime.text import display_name, short_names


@dataclass(frozen=True, kw_only=True)
class BpdConfig:
    """What to measure, and how."""

    checkpoint: str
    """A folder with a pipeline, or a Hub id."""
    data: str
    """Where the images are: as `DataConfig.path`."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    split: str = "test"
    """Split to measure on, such as test or train[:10%]."""
    held_out_images: int = 0
    """0 = all images of the split. N = those that a training with --data.held-out-images N sets aside from it."""
    num_images: int | None = None
    """So many, evenly spaced over the split. None = all."""
    crop: Crop = "center"
    """How images of another size become square: as --data.crop in training. The figures depend on it."""
    image_column: str | None = None
    """Column with the images. None = it is found."""
    label_column: str | None = None
    """Column with the class labels. None = it is found."""
    unlabelled: bool = False
    """Compute the unconditional likelihood, even if flow and data have labels, or captions: the empty one is taken."""
    noise: Kind | None = None
    """uniform: that of one grey level, which gives the usual bits/dim. gaussian: that of the flow's training.
    None = all that applies."""
    noise_levels: tuple[float, ...] | None = None
    """Of the Gaussian noise, inside the range that the flow was trained on. None = evenly over it; see num_levels."""
    num_levels: int = 4
    """How many noise levels, if they are not named."""
    draws: int = 1
    """k: times that noise is drawn for each image. bits/dim are importance-averaged: -log2 of the mean of k
    probabilities, a bound that comes the nearer the larger k is. It takes k times as long."""
    seed: int = 0
    """Of the noise, 0 or more. An image's noise depends on it, on the image's number and on that of the draw alone."""
    batch_size: int = 50
    """Images at a time, in each process; lower it if memory runs out. Figures differ by rounding only."""
    num_workers: int = 2
    """Processes that decode images ahead; 0 = none."""
    max_broken: int = 100
    """Unreadable images are left out and named; a process stops at more than this many."""
    output: Path | None = None
    """Folder for bpd.json (means, settings and versions), images.csv (the figures of each image) and nll.png (the
    curve over the noise levels). The same command goes on with it if it is stopped. None = they are only printed."""
    device: str | None = None
    """Such as cuda, cuda:1, mps or cpu. None = a GPU if there is one."""


def measure_bpd(config: BpdConfig, *, console: Console | None = None) -> Report | None:
    """Measure the likelihood of each image; go on where an earlier call stopped. All processes of a launch call it.

    Args:
        config: what to measure, and how.
        console: where the main process draws a bar; None = nowhere.

    Returns:
        On the main process what was measured, including what earlier calls did; None on the others.

    Raises:
        DataError: the data can't be used, or too many images can't be read.
        ImportError: a curve is to be drawn into the folder, but matplotlib is not installed.
        OSError: there is no such checkpoint, or the folder can't be written.
        ValueError: settings out of range, or that do not suit the checkpoint.
        RunError: one of these has met another process, or the folder holds other figures.
    """
    state = joined()
    _check_counts(config)
    if config.device is not None and state.num_processes > 1:
        raise ValueError(
            f"device is {config.device}, but {state.num_processes} processes take one each; leave it out."
        )
    with ExitStack() as locks:
        work = main_first(state, lambda: _open(config))
        work = _with_null_context(work, config, state)
        folder = config.output
        known = [Rows()]  # the main process's, for all

        def open_folder() -> None:
            if folder is not None:
                if len(work.noises) > 1:
                    blank_figure(1, 1)  # raises now, not after the measurement, if matplotlib is missing
                check_writable(folder)
                locks.enter_context(folder_lock(folder))
                known[0] = open_report(folder, work.settings)

        on_main(state, open_folder)
        broadcast_object_list(known)
        rows = known[0]
        start = time.monotonic()
        missing = [number for number in work.numbers if number not in rows]
        done, total = Rows(), len(work.numbers)
        with shared_images(state, console, "measuring", total, total - len(missing)) as count:
            for part in _measured(work, missing, config, state):
                done |= part
                if folder is not None:
                    append(folder, state.process_index, part)
                count(len(part))
        everywhere = gather_object([done])
        if not state.is_main_process:
            return None
        for part in everywhere:
            rows = rows | part
        speed = len(missing) / (time.monotonic() - start) if missing else None
        wanted = {number: rows[number] for number in work.numbers}
        report = replace(_summary(work, list(wanted.values())), images_per_second=speed)
        if folder is not None:
            write_report(folder, report, wanted)
        return report


# -- what there is to do, and what is refused --------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    flow: TARFlow
    codec: Codec
    dataset: ImageDataset
    labels: Tensor | None
    """(N,) of all images of the set, as the flow numbers them; None = unlabelled."""
    numbers: tuple[int, ...]
    """Of the images to measure, in the set."""
    noises: tuple[Noise, ...]
    settings: Mapping[str, Any]
    """All that decides the figures."""
    captions: ContextCard | None
    """Of the images' captions; None if they are not read."""
    null_context: Tensor | None = None
    """(T, E) of the empty caption, if it is to stand in for those of the images."""

    def context(self, numbers: Sequence[int]) -> Tensor | None:
        """(B, T, E) of the captions of these images; None if the flow takes none."""
        if self.null_context is not None:
            return self.null_context.float().expand(len(numbers), -1, -1)
        found = self.dataset.contexts(numbers)
        return None if found is None else found.float()


def _check_counts(config: BpdConfig) -> None:
    lowest = {"num_images": 1, "draws": 1, "num_levels": 1, "batch_size": 1, "seed": 0, "held_out_images": 0}
    for name, least in {**lowest, "num_workers": 0, "max_broken": 0}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; expected a number >= {least}.")


def _open(config: BpdConfig) -> _Work:
    # Without its text encoder, which is large.
    pipe = ITARFlowPipeline.from_pretrained(config.checkpoint, text_encoder=None, tokenizer=None)
    flow: TARFlow = pipe.flow.float().eval().requires_grad_(False)
    context = context_shape(flow) if pipe.takes_prompts and not config.unlabelled else None
    schedule = pipe.scheduler.config
    noises = noises_of(
        flow,
        kind=config.noise,
        levels=config.noise_levels,
        count=config.num_levels,
        noise_range=(schedule.t_min, schedule.t_max) if flow.config.noise_conditioned else None,
        codes=pipe.vae is not None,
    )
    channels, size = flow.image_shape[0], square_side(flow.image_shape)
    if pipe.vae is not None:
        traits = vae_traits(pipe.vae)
        channels, size = traits.in_channels, size * traits.stride
    opened = _data(
        DataConfig(
            path=config.data,
            name=config.name,
            split=config.split,
            held_out_images=config.held_out_images,
            image_column=config.image_column,
            label_column=config.label_column,
            crop=config.crop,
            max_broken=config.max_broken,
        ),
        image_size=size,
        in_channels=channels,
        context=context,
    )
    dataset = opened.held_out if config.held_out_images else opened.train
    count = len(dataset) if config.num_images is None else config.num_images
    if count > len(dataset):
        raise DataError(
            f"num_images is {count}, but {config.data} has {len(dataset)} images; expected at most that many, or None "
            "for all."
        )
    card = opened.captions.card if opened.captions else None
    labels = None if config.unlabelled else _labels(pipe, dataset, opened.class_names, config.data)
    settings = {
        "checkpoint": short_names([config.checkpoint])[0],
        "weights": weights_digest(flow.state_dict()),
        "codes": pipe.vae is not None,
        **(
            {}
            if pipe.vae is None
            else {f"vae {name}": value for name, value in asdict(vae_identity(pipe.vae)).items()}
        ),
        "data": display_name(config.data),
        "name": config.name,
        "split": config.split,
        "held_out_images": config.held_out_images,
        "images_of_the_set": len(dataset),
        "images_digest": dataset.fingerprint(),
        "num_images": count,
        "crop": config.crop,
        "trained_on": "gaussian" if flow.config.noise_range or flow.config.noise_conditioned else "not recorded",
        "labels": "none" if labels is None else _LABELS[_same_names(pipe, opened.class_names)],
        "labels_digest": None if labels is None else hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        **captions_facts(card, pipe.takes_prompts),
        "noises": [{"noise": noise.kind, "noise_level": noise.level} for noise in noises],
        "draws": config.draws,
        "seed": config.seed,
        "dtype": "float32",
    }
    numbers = tuple(spread_over(len(dataset), count))
    return _Work(flow, codec_of(pipe.vae), dataset, labels, numbers, noises, settings, card)


def _data(config: DataConfig, **options: Any) -> ImageData:
    try:
        return load_data(config, **options)
    except CaptionError as error:
        raise DataError(f"{error}; or ask for the likelihood without them, by unlabelled.") from error


def _with_null_context(work: _Work, config: BpdConfig, state: PartialState) -> _Work:
    """The same with the empty caption, where that is to be taken; captions of another text encoder are refused."""
    found: list[Tensor | None] = [None]  # the main process's, for all

    def look() -> None:
        if takes_prompts(work.flow):
            found[0] = checked_captions(config.checkpoint, work.flow, config.data, work.captions)

    on_main(state, look)
    broadcast_object_list(found)
    if found[0] is None:
        return work
    digest = hashlib.sha256(found[0].view(torch.int16).numpy().tobytes()).hexdigest()
    return replace(work, null_context=found[0], settings={**work.settings, "null_context": digest})


def _labels(pipe: ITARFlowPipeline, dataset: ImageDataset, names: Sequence[str], path: str) -> Tensor | None:
    """The labels of a set by the numbers of the flow, whose names may come in another order."""
    num_classes = pipe.flow.config.num_classes
    if num_classes == 0:
        return None
    if len(names) != num_classes:
        found = f"{len(names)} classes" if names else "no labels"
        raise DataError(
            f"the images in {path} have {found}, but the flow knows {num_classes}; expected the data it was trained "
            "on, a label_column, or unlabelled, which asks for the likelihood without a label."
        )
    if not _same_names(pipe, names):  # such as "n01440764" for "tench": then their order has to do
        return dataset.labels
    own = pipe.config.class_names or list(names)
    order = torch.tensor([*(own.index(name) for name in names), NULL_LABEL])
    return order[dataset.labels]


_LABELS = {True: "of the data", False: "of the data, by number: its class names are not the checkpoint's"}


def _same_names(pipe: ITARFlowPipeline, names: Sequence[str]) -> bool:
    """Whether the classes have the flow's names, in any order."""
    return sorted(pipe.config.class_names or names) == sorted(names)


# -- the work ----------------------------------------------------------------------------------------------------


def _measured(work: _Work, missing: Sequence[int], config: BpdConfig, state: PartialState) -> Iterator[Rows]:
    """The rows of this process's share of what is missing, batch by batch."""
    device = torch.device(config.device or state.device)
    lists = [list(missing[start : start + config.batch_size]) for start in range(0, len(missing), config.batch_size)]
    own = lists[state.process_index :: state.num_processes]
    flow, codec = work.flow.to(device), work.codec
    if isinstance(codec, VaeCodec):
        codec.vae.to(device)
    workers, broken = min(config.num_workers, len(own)), list[str]()
    loader = DataLoader(
        Reader({config.split: work.dataset}, config.data),
        batch_sampler=[[(config.split, number) for number in part] for part in own],
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # else the loader would advance torch's global one
    )
    for part, results in zip(own, watched(without_alarm(loader), "lower num_workers"), strict=True):
        batch = dict(zip(part, results, strict=True))
        rows: Rows = {number: {"broken": read} for number, read in batch.items() if isinstance(read, str)}
        broken += [row["broken"] for row in rows.values()]
        if len(broken) > config.max_broken:
            raise too_many_broken(broken, config.max_broken)
        numbers = [number for number, read in batch.items() if isinstance(read, Tensor)]
        if numbers:
            images = torch.stack([read for read in batch.values() if isinstance(read, Tensor)]).to(device)
            labels = None if work.labels is None else work.labels[numbers].to(device)
            context = work.context(numbers)
            with torch.no_grad(), tf32_products(False):
                posterior = codec.encode(to_pixels(images))
            found = likelihoods(
                flow,
                posterior,
                labels,
                work.noises,
                draws=config.draws,
                seed=config.seed,
                numbers=numbers,
                bits=not work.settings["codes"],
                context=None if context is None else context.to(device),
            )
            for row, number in enumerate(numbers):
                values = [None if part is None else part[row].tolist() for part in found]
                label = NULL_LABEL if work.labels is None else int(work.labels[number])
                rows[number] = {"label": label, "values": values}
        yield rows


def _summary(work: _Work, rows: Sequence[Mapping[str, Any]]) -> Report:
    broken = tuple(row["broken"] for row in rows if "broken" in row)
    values = [row["values"] for row in rows if "values" in row]
    if not values:
        raise DataError(f"none of {len(rows)} images can be read; the first one: {broken[0]}")
    columns = [
        None if part[0] is None else torch.tensor(part, dtype=torch.float64) for part in zip(*values, strict=True)
    ]
    figures = tuple(
        Figures(noise, *(None if part is None else mean_of(part[:, index]) for part in columns))  # type: ignore[arg-type]
        for index, noise in enumerate(work.noises)
    )
    return Report(work.settings, len(values), broken, figures, None)
