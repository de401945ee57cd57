"""The likelihood of each image of a data set, by one or several processes, so that it goes on where it was stopped."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itarflow import __version__
from itarflow.batches import ignore_interrupts, without_alarm
from itarflow.codec import Codec, VaeCodec, codec_of, to_pixels, vae_stride
from itarflow.codes import display_name
from itarflow.compare import short_names
from itarflow.data import DataConfig, load_data
from itarflow.dataset import ImageDataset, too_many_broken
from itarflow.digest import weights_digest
from itarflow.embedding import NULL_LABEL
from itarflow.flow import TARFlow
from itarflow.images import Crop, DataError
from itarflow.likelihood import Kind, Mean, Noise, likelihoods, mean_of, noises_of
from itarflow.pipeline import ITARFlowPipeline
from itarflow.plot import blank_figure
from itarflow.processes import main_first, on_cpu, on_main, shared_counter
from itarflow.progress import image_progress
from itarflow.run import RunError, check_writable
from itarflow.shards import alone, atomically, write_json

SUMMARY, TABLE, CURVE = "bpd.json", "images.csv", "nll.png"
"""What a folder of figures holds."""
_PROGRESS = ".rows-*.jsonl"
"""What each process has measured, batch by batch; it stays, so that the same command has nothing left to do."""


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
    """Column with the images. None = the first one."""
    label_column: str | None = None
    """Column with the class labels. None = it is found."""
    unlabelled: bool = False
    """Ask a flow with classes for the likelihood without a label, whatever labels the data has."""
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


@dataclass(frozen=True)
class Figures:
    """The means over images with one kind of noise; what they mean is in `Noise` and `likelihood.Likelihoods`."""

    noise: Noise
    nll: Mean
    bits: Mean | None
    bits_one_draw: Mean | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        means = {"nats/dim": self.nll, "bits/dim": self.bits, "bits/dim, one draw": self.bits_one_draw}
        values = {name: None if mean is None else mean._asdict() for name, mean in means.items()}
        return {"noise": self.noise.kind, "noise_level": self.noise.level, **values}


@dataclass(frozen=True)
class Report:
    """What has been measured."""

    settings: Mapping[str, Any]
    images: int
    broken: tuple[str, ...]
    """ "name: reason" of each image that could not be read, and is left out."""
    figures: tuple[Figures, ...]
    images_per_second: float | None
    """Of all processes; None if nothing was left to do."""


def measure(config: BpdConfig, *, console: Console | None = None) -> Report | None:
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
    state = PartialState(cpu=on_cpu())
    _check_counts(config)
    if config.device is not None and state.num_processes > 1:
        raise ValueError(
            f"device is {config.device}, but {state.num_processes} processes take one each; leave it out."
        )
    with ExitStack() as locks:
        work = main_first(state, lambda: _open(config))
        folder, known = config.output, [dict[int, dict[str, Any]]()]

        def begin() -> None:
            if folder is not None:
                if len(work.noises) > 1:
                    blank_figure(1, 1)  # refuses now, not when the figures are there, if matplotlib is missing
                check_writable(folder)
                locks.enter_context(alone(folder))
                known[0] = _begin(folder, work)

        on_main(state, begin)
        broadcast_object_list(known)
        rows, start = known[0], time.monotonic()
        missing = [number for number in work.numbers if number not in rows]
        counted = shared_counter("images measured")
        bar = image_progress(
            console if state.is_main_process else None,
            "measuring",
            len(work.numbers),
            len(work.numbers) - len(missing),
        )
        done: dict[int, dict[str, Any]] = {}
        with bar as show:
            shown = 0
            for part in _measured(work, missing, config, state):
                done |= part
                if folder is not None:
                    _append(folder / _PROGRESS.replace("*", f"{state.process_index:05d}"), part)
                total = counted(len(part))
                show(total - shown)
                shown = total
            try:
                everywhere = gather_object([done])
            except RuntimeError as error:
                goes_on = " The same command goes on." if folder is not None else ""
                raise RunError(f"another process has stopped; see what it said.{goes_on}") from error
            show(len(missing) - shown)
        if not state.is_main_process:
            return None
        for part in everywhere:
            rows = rows | part
        speed = len(missing) / (time.monotonic() - start) if missing else None
        report = replace(_report(work, [rows[number] for number in work.numbers]), images_per_second=speed)
        if folder is not None:
            _finish(folder, work, report, [rows[number] for number in work.numbers])
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


def _check_counts(config: BpdConfig) -> None:
    lowest = {"num_images": 1, "draws": 1, "num_levels": 1, "batch_size": 1, "seed": 0, "held_out_images": 0}
    for name, least in {**lowest, "num_workers": 0, "max_broken": 0}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; expected a number >= {least}.")


def _open(config: BpdConfig) -> _Work:
    pipe = ITARFlowPipeline.from_pretrained(config.checkpoint)
    flow: TARFlow = pipe.flow.float().eval().requires_grad_(False)
    schedule = pipe.scheduler.config
    noises = noises_of(
        flow,
        kind=config.noise,
        levels=config.noise_levels,
        count=config.num_levels,
        noise_range=(schedule.t_min, schedule.t_max) if flow.config.noise_conditioned else None,
        codes=pipe.vae is not None,
    )
    channels, size, _ = flow.image_shape
    if pipe.vae is not None:
        channels, size = pipe.vae.config.in_channels, size * vae_stride(pipe.vae)
    opened = load_data(
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
    )
    dataset = opened.held_out if config.held_out_images else opened.train
    count = len(dataset) if config.num_images is None else config.num_images
    if count > len(dataset):
        raise DataError(
            f"num_images is {count}, but {config.data} has {len(dataset)} images; expected at most that many, or None "
            "for all."
        )
    labels = None if config.unlabelled else _labels(pipe, dataset, opened.class_names, config.data)
    settings = {
        "checkpoint": short_names([config.checkpoint])[0],
        "weights": weights_digest(flow.state_dict()),
        "codes": pipe.vae is not None,
        "data": display_name(config.data),
        "name": config.name,
        "split": config.split,
        "held_out_images": config.held_out_images,
        "images_of_the_set": len(dataset),
        "num_images": count,
        "crop": config.crop,
        "trained_on": "gaussian" if flow.config.noise_range or flow.config.noise_conditioned else "not recorded",
        "labels": "none" if labels is None else "of the data",
        "noises": [{"noise": noise.kind, "noise_level": noise.level} for noise in noises],
        "draws": config.draws,
        "seed": config.seed,
        "dtype": "float32",
    }
    numbers = tuple(index * len(dataset) // count for index in range(count))
    return _Work(flow, codec_of(pipe.vae), dataset, labels, numbers, noises, settings)


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
    own = pipe.config.class_names or list(names)
    if sorted(own) != sorted(names):  # such as "n01440764" for "tench": then their order has to do
        return dataset.labels
    order = torch.tensor([*(own.index(name) for name in names), NULL_LABEL])
    return order[dataset.labels]


# -- the work ----------------------------------------------------------------------------------------------------


class _Readable(Dataset[tuple[int, Tensor | str]]):
    """The number of an image and what is read of it, or "name: reason"."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        return number, self._dataset.read(number)


def _measured(
    work: _Work, missing: Sequence[int], config: BpdConfig, state: PartialState
) -> Iterator[dict[int, dict[str, Any]]]:
    """The rows of this process's share of what is missing, batch by batch."""
    device = torch.device(config.device or state.device)
    lists = [list(missing[start : start + config.batch_size]) for start in range(0, len(missing), config.batch_size)]
    own = lists[state.process_index :: state.num_processes]
    flow, codec = work.flow.to(device), work.codec
    if isinstance(codec, VaeCodec):
        codec.vae.to(device)
    workers, broken = min(config.num_workers, len(own)), list[str]()
    loader = DataLoader(
        _Readable(work.dataset),
        batch_sampler=own,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # else the loader draws from the global one, which is not its to advance
    )
    for batch in _watched(without_alarm(loader)):
        rows: dict[int, dict[str, Any]] = {number: {"broken": read} for number, read in batch if isinstance(read, str)}
        broken += [row["broken"] for row in rows.values()]
        if len(broken) > config.max_broken:
            raise too_many_broken(broken, config.max_broken)
        numbers = [number for number, read in batch if isinstance(read, Tensor)]
        if numbers:
            images = torch.stack([read for _, read in batch if isinstance(read, Tensor)]).to(device)
            labels = None if work.labels is None else work.labels[numbers].to(device)
            with torch.no_grad():
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
            )
            for row, number in enumerate(numbers):
                values = [None if part is None else part[row].tolist() for part in found]
                label = NULL_LABEL if work.labels is None else int(work.labels[number])
                rows[number] = {"label": label, "values": values}
        yield rows


def _watched(stream: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from stream
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that decodes images has died ({error}). Often the system was out of memory; lower num_workers"
        ) from error


def _report(work: _Work, rows: Sequence[Mapping[str, Any]]) -> Report:
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


# -- the folder --------------------------------------------------------------------------------------------------


def _begin(folder: Path, work: _Work) -> dict[int, dict[str, Any]]:
    """What is measured already, by the numbers of the images; the settings are written down if they are not yet."""
    summary = folder / SUMMARY
    if not summary.exists():
        if (folder / TABLE).exists() or any(folder.glob(_PROGRESS)):
            raise RunError(f"{folder} holds figures, but {SUMMARY} is missing; choose another folder.")
        write_json(summary, {"settings": dict(work.settings)})
        return {}
    stored = json.loads(summary.read_text())["settings"]
    changed = [
        f"{name}: {stored.get(name)} -> {value}" for name, value in work.settings.items() if stored.get(name) != value
    ]
    if changed:
        raise RunError(
            f"{folder} holds figures of other settings:\n  " + "\n  ".join(changed) + "\nChoose another folder."
        )
    rows: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob(_PROGRESS)):
        *whole, _torn = path.read_text().split("\n")
        for line in whole:
            rows |= {int(number): row for number, row in json.loads(line).items()}
        # Else the next line would go on with a torn one.
        path.write_text("".join(f"{line}\n" for line in whole))
    return rows


def _append(path: Path, rows: Mapping[int, Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(rows) + "\n")


def _finish(folder: Path, work: _Work, report: Report, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [
        f"{name}, {noise.title}" for name in ("nats/dim", "bits/dim", "bits/dim, one draw") for noise in work.noises
    ]
    with atomically(folder / TABLE) as partial, partial.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", *names[: len(names) if not work.settings["codes"] else len(work.noises)]])
        for number, row in zip(work.numbers, rows, strict=True):
            if "values" in row:
                parts = [part for part in row["values"] if part is not None]
                table.writerow([number, row["label"], *(value for part in parts for value in part)])
    gaussian = [figures for figures in report.figures if figures.noise.kind == "gaussian"]
    if sum(figures.nll.mean is not None for figures in gaussian) > 1:
        _draw(gaussian, report, folder / CURVE)
    write_json(folder / SUMMARY, {
        "settings": dict(work.settings),
        "versions": {"itarflow": __version__, "torch": torch.__version__},
        "images": report.images,
        "broken": list(report.broken),
        "results": [figures.to_json() for figures in report.figures],
    })  # fmt: skip


def _draw(figures: Sequence[Figures], report: Report, path: Path) -> None:
    """Nats/dim over the noise level, beside the entropy of the noise, below which they can't be."""
    known = [(one.noise.level or math.nan, one.nll) for one in sorted(figures, key=lambda one: one.noise.level or 0.0)]
    drawn = [(level, mean.mean, mean.standard_error or 0.0) for level, mean in known if mean.mean is not None]
    levels, means, errors = zip(*drawn, strict=True)
    figure = blank_figure(6.0, 4.0)
    axis = figure.subplots()
    axis.errorbar(levels, means, errors, marker="o", markersize=4, capsize=3, label="noisy images")
    fine = np.linspace(levels[0], levels[-1], 200)
    entropy = [Noise("gaussian", float(level)).entropy for level in fine]
    axis.plot(fine, entropy, "--", color="grey", linewidth=1, label="entropy of the noise alone: the least")
    axis.set_xlabel("noise level t")
    axis.set_ylabel("nats/dim")
    axis.set_title(
        f"{report.settings['checkpoint']}: {report.images:,} images of {report.settings['data']}", fontsize=10
    )
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
