"""Noisy samples of several flows, each cleaned in several ways, side by side (iTARFlow, table 7).

Rows are generators: pipelines that make noisy codes from the same seeds and labels. Columns are ways of cleaning them.
What is measured of each is in measures.py.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from itarflow.codec import Vae, differing, to_pil, to_pixels, to_uint8, vae_identity
from itarflow.data.load import DataConfig, load_data
from itarflow.denoisers.diffusion import DiffusionDenoiser
from itarflow.denoisers.score import check_level
from itarflow.evaluation.samples.denoising import (
    Cleaned,
    clean,
    columns_of,
    decoder_columns,
    parts,
    settings_of,
    solvers_of,
)
from itarflow.flow.embedding import NULL_LABEL
from itarflow.flow.tarflow import TARFlow
from itarflow.inverse.guidance import Guidance
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.files import check_writable
from itarflow.runtime.pictures import blank_figure, draw_pictures, image_grid
from itarflow.runtime.progress import step_progress
from itarflow.runtime.seeds import image_generators
from itarflow.runtime.text import file_name

REAL_IMAGES = 256
"""How many real images are measured for reference, at most."""


@dataclass(frozen=True)
class Result:
    """The figures of one generator's images, cleaned in one way."""

    generator: str
    method: str
    grid: str
    """The picture of all images, in the folder of the comparison."""
    values: Mapping[str, float | None]
    """By the titles of the metrics; None = there is no such figure, or it is not finite."""
    broken: int
    """Images with values that are not finite: the flow's inverse or the cleaning diverged."""


@dataclass(frozen=True)
class Comparison:
    """All that `compare` has found, as it is in compare.json."""

    settings: Mapping[str, Any]
    metrics: Mapping[str, str]
    """Titles and meanings."""
    results: tuple[Result, ...]
    real: Mapping[str, float | None] | None
    """The residual noise of real images, and how many they are."""


@torch.no_grad()
def compare(
    pipelines: Mapping[str, ITARFlowPipeline],
    class_labels: Sequence[int | None],
    *,
    output: Path,
    diffusion: Mapping[str, DiffusionDenoiser] | None = None,
    decoders: Mapping[str, Vae] | None = None,
    data: str | None = None,
    seed: int = 0,
    guidance_weight: float | None = None,
    num_denoise_steps: int | None = None,
    batch_size: int = 16,
    denoise_batch_size: int | None = None,
    picture_rows: int = 2,
    console: Console | None = None,
) -> Comparison:
    """Generate noisy images with each pipeline once, clean them in every way that applies, and write what comes out.

    The columns: "noisy", as generated; "self", one Tweedie step of the generator at its t_max; "own iterative", its
    own ODE, if it is noise-conditioned; "iterative: NAME", the ODE of each other noise-conditioned pipeline that knows
    the generator's t_max; "diffusion: NAME", that of each diffusion model that does; and, if the pipelines have a VAE,
    "decoder: NAME", which decodes the noisy codes as they are.

    Args:
        pipelines: by name, all on one device; they generate, and clean one another's images.
        class_labels: one an image; None = no label.
        output: folder for GENERATOR/METHOD.png, a grid each, compare.png, the first images of all side by side, and
            compare.json. Made if needed; files of these names are replaced.
        diffusion: diffusion models by name, on the same device.
        decoders: autoencoders by name, fine-tuned to decode noisy codes of the pipelines' VAE, on the same device.
        data: real images to measure for reference: anything that `DataConfig.path` takes, at most 256 of it.
        seed: image i depends on it, on i and on its label alone.
        guidance_weight: of all generators; None = each pipeline's own.
        num_denoise_steps: evaluations in each iterative column; None = as the pipeline says that denoises, 10 for a
            diffusion model.
        batch_size: images that are generated, and cleaned, at a time.
        denoise_batch_size: images that a flow differentiates, or a diffusion model sees, at a time; None = batch_size.
        picture_rows: images of each pipeline in compare.png.
        console: where to show progress; None = nowhere.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder can't be written.
        ValueError: pipelines that don't agree in image shape, classes and VAE, settings out of range, or a diffusion
            model or decoder for other images. Nothing has been generated then.
        DataError: the real images can't be used.
    """
    blank_figure(1, 1)  # refuses now, not when the images are done, if matplotlib is missing
    check_writable(output)
    _check_names(pipelines, diffusion or {}, decoders or {})
    _check_counts(class_labels, batch_size, denoise_batch_size, num_denoise_steps, picture_rows)
    _check_alike(pipelines)
    first = next(iter(pipelines.values()))
    labels = _labels(first, class_labels)
    guidance = {name: _guidance(pipe, guidance_weight, labels) for name, pipe in pipelines.items()}
    solvers = solvers_of(pipelines, diffusion or {}, num_denoise_steps, denoise_batch_size or batch_size)
    num_classes = 0 if labels is None else first.flow.config.num_classes
    unlabelled = any(label is None for label in class_labels)
    decoding, slice_size = decoder_columns(decoders or {}, first.vae, batch_size), denoise_batch_size or batch_size
    columns = columns_of(pipelines, solvers, decoding, num_classes, unlabelled, batch_size, slice_size)
    real = None if data is None else _real_images(first, data)
    judges = {name: pipe for name, pipe in pipelines.items() if pipe.flow.config.noise_conditioned}
    metrics = [*METRICS, *(nats_per_dim(name, pipe, batch_size) for name, pipe in judges.items())]
    comparison = Comparison(
        settings={
            "seed": seed,
            "class_labels": list(class_labels),
            "guidance_weight": {name: chosen.weight for name, chosen in guidance.items()},
            "columns": {
                name: {column.title: settings_of(column.schedule) for column in of_pipe if column.schedule is not None}
                for name, of_pipe in columns.items()
            },
        },
        metrics={metric.title: metric.meaning for metric in metrics},
        results=(),
        real=real,
    )
    batches, pictures = math.ceil(len(class_labels) / batch_size), dict[tuple[str, str], Tensor]()
    work = sum(batches * pipe.flow.num_solved_tokens for pipe in pipelines.values())
    work += sum(batches * (column.evaluations + 1) for of_pipe in columns.values() for column in of_pipe)
    with step_progress(console, work) as show:
        for name, pipe in pipelines.items():
            seeds = image_generators(torch.Generator().manual_seed(seed), len(class_labels))
            noisy = _generate(pipe, labels, seeds, guidance[name], batch_size, partial(show, f"{name}: noisy"))
            for column in columns[name]:
                count = partial(show, f"{name}: {column.title}")
                cleaned = clean(column, noisy, labels, seeds, batch_size, pipe.flow.device, count)
                grid = f"{name}/{file_name(column.title)}.png"
                _save_grid(cleaned.images, output / grid)
                values = {metric.title: _finite(metric.measure(cleaned)) for metric in metrics}
                broken = int((~cleaned.images.isfinite().flatten(1).all(dim=1)).sum())
                result = Result(name, column.title, grid, values, broken)
                comparison = replace(comparison, results=(*comparison.results, result))
                (output / "compare.json").write_text(json.dumps(asdict(comparison), indent=2) + "\n")
                pictures[name, column.title] = cleaned.images[
                    :picture_rows
                ].clone()  # not a view, which would keep all of them
    methods = sorted(dict.fromkeys(method for _, method in pictures), key=_kind)
    draw_pictures({place: to_pil(images) for place, images in pictures.items()}, methods, output / "compare.png")
    return comparison


# -- what there is to do, and what is refused -------------------------------------------------------------------


def _check_names(*named: Mapping[str, Any]) -> None:
    if not named[0]:
        raise ValueError("no checkpoint is named; expected folders such as runs/NAME/pipeline.")
    for name in itertools.chain(*named):
        if not name or name in (".", "..") or file_name(name) != name:
            raise ValueError(f"the name {name!r} is not fit for a file; use letters, digits, '_', '.' and inner '-'.")


def _check_counts(
    class_labels: Sequence[int | None],
    batch_size: int,
    denoise_batch_size: int | None,
    num_denoise_steps: int | None,
    picture_rows: int,
) -> None:
    if not class_labels:
        raise ValueError("there are no images to make; expected at least one.")
    counts = {"batch_size": batch_size, "denoise_batch_size": denoise_batch_size, "picture_rows": picture_rows}
    for name, value in {**counts, "num_denoise_steps": num_denoise_steps}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected a number >= 1.")


def _check_alike(pipelines: Mapping[str, ITARFlowPipeline]) -> None:
    """Refuse pipelines whose noisy codes are not of one kind, or can't be shown."""
    (name, first), *others = pipelines.items()
    identity = None if first.vae is None else vae_identity(first.vae)
    for other_name, other in others:
        facts = {
            "image shape (C, H, W)": (first.flow.image_shape, other.flow.image_shape),
            "number of classes": (first.flow.config.num_classes, other.flow.config.num_classes),
            "VAE": ("none" if first.vae is None else "one", "none" if other.vae is None else "one"),
        }
        for fact, (ours, theirs) in facts.items():
            if ours != theirs:
                raise ValueError(
                    f"the checkpoints do not agree in their {fact}: {name} has {ours}, {other_name} has {theirs}; "
                    "only those that do can clean one another's images. Compare the others on their own."
                )
        if identity is not None and (lines := differing(identity, vae_identity(other.vae))):
            raise ValueError(f"{name} and {other_name} model codes of different VAEs:\n  " + "\n  ".join(lines))
    for pipe_name, pipe in pipelines.items():
        check_level(pipe.flow, f"{pipe_name}: t_max", pipe.scheduler.config.t_max)
    channels, size, _ = first.picture_shape
    if size < 3:
        raise ValueError(f"{name} makes images of {size} x {size} pixels; expected at least 3 x 3.")
    if channels not in (1, 3):
        raise ValueError(
            f"{name} makes images of {channels} channels, which are no pictures; expected 1 or 3. If they are codes, "
            "the pipeline lacks their VAE."
        )


def _labels(pipe: ITARFlowPipeline, class_labels: Sequence[int | None]) -> Tensor | None:
    if all(label is None for label in class_labels):
        return None
    return torch.tensor([NULL_LABEL if label is None else pipe.label_id(label) for label in class_labels])


def _guidance(pipe: ITARFlowPipeline, weight: float | None, labels: Tensor | None) -> Guidance:
    if weight and labels is None:
        raise ValueError(f"guidance_weight is {weight}, but there are no labels to guide by; leave it out.")
    return pipe.default_guidance if weight is None else replace(pipe.default_guidance, weight=weight)


def _real_images(pipe: ITARFlowPipeline, path: str) -> dict[str, float | None]:
    """The residual noise of images from all over a data set, in the size of those that are generated."""
    channels, size, _ = pipe.picture_shape
    images = load_data(DataConfig(path=path, held_out_images=0), image_size=size, in_channels=channels).train
    count = min(len(images), REAL_IMAGES)
    chosen = torch.stack([images[index * len(images) // count].image for index in range(count)])
    return {"residual noise": _finite(float(residual_noise(to_pixels(chosen)).mean())), "images": count}


# -- the work ---------------------------------------------------------------------------------------------------


def _generate(
    pipe: ITARFlowPipeline,
    labels: Tensor | None,
    seeds: Sequence[torch.Generator],
    guidance: Guidance,
    batch_size: int,
    count: Callable[[int], None],
) -> Tensor:
    """Noisy codes (B, C, H, W) on the CPU. The generators are left behind what the prior took of them."""
    flow, t_max = pipe.flow, pipe.scheduler.config.t_max
    noisy = []
    for part in parts(len(seeds), batch_size):
        z = flow.sample_prior(len(seeds[part]), list(seeds[part]))
        given = None if labels is None else labels[part].to(flow.device)
        noisy.append(flow.inverse(z, given, t_max, guidance=guidance, progress=count).cpu())
    return torch.cat(noisy)


def _save_grid(images: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(to_pil(images), math.ceil(math.sqrt(len(images)))).save(path)


_KINDS = ("noisy", "self", "own iterative", "iterative", "diffusion", "decoder")


def _kind(method: str) -> int:
    """The place of a method's kind; one generator may have kinds that another lacks."""
    return _KINDS.index(method.partition(":")[0])


def _finite(value: float | None) -> float | None:
    """None for what is no number, which JSON can't hold."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Metric:
    """A figure for each generator and way of cleaning."""

    title: str
    meaning: str
    """What is computed, exactly."""
    measure: Callable[[Cleaned], float | None]
    """None = there is no such figure."""


def residual_noise(images: Tensor) -> Tensor:
    """Standard deviation (B,) of the noise in images (B, C, H, W) in [-1, 1], in grey levels of 255.

    By Immerkaer, "Fast noise variance estimation" (1996). The images, rounded to 8 bits, are filtered by the
    difference of two Laplacians, which lets nothing of a smooth image through; sqrt(pi / 2) / 6 times the mean
    magnitude of the rest is the standard deviation of white Gaussian noise. Fine texture counts as noise too, so
    compare with real images. Channels are averaged.

    Raises:
        ValueError: images of less than 3 pixels a side.
    """
    if min(images.shape[-2:]) < 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected at least 3 x 3 pixels.")
    kernel = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    grey = to_uint8(images.nan_to_num()).float().cpu()
    filtered = F.conv2d(grey.flatten(0, 1)[:, None], kernel[None, None])
    return math.sqrt(math.pi / 2) / 6 * filtered.abs().mean(dim=(1, 2, 3)).unflatten(0, images.shape[:2]).mean(dim=1)


METRICS = (
    Metric(
        "residual noise",
        "noise that is left in the images, estimated by Immerkaer's filter (1996), in grey levels of 255; mean over "
        "channels and images. Fine texture counts as noise, and noise of codes, once decoded, looks like texture: "
        "compare with real images, and look at the pictures",
        lambda cleaned: float(residual_noise(cleaned.images).mean()),
    ),
    Metric(
        "seconds an image",
        "from noisy codes to pixels, cleaning and decoding, in the batches of this comparison; the first use of a "
        "model included",
        lambda cleaned: cleaned.seconds,
    ),
)
"""The metrics that need no model; a `nats_per_dim` for each flow that can judge comes on top."""


def nats_per_dim(name: str, pipeline: ITARFlowPipeline, batch_size: int) -> Metric:
    """How improbable a noise-conditioned flow finds cleaned codes, at the smallest noise level it was trained on."""
    noise_range = pipeline.flow.config.noise_range
    level = noise_range[0] if noise_range else pipeline.scheduler.config.t_min
    meaning = (
        f"-log p(x, t = {level:g}) / (C * H * W) under {name}, in nats, of the cleaned codes x as they are, without "
        "adding noise of that level, given their labels; mean over images. Overly smooth images score low too"
    )
    return Metric(
        f"nats/dim, {name}", meaning, lambda cleaned: _nats_per_dim(pipeline.flow, level, batch_size, cleaned)
    )


def _nats_per_dim(flow: TARFlow, level: float, batch_size: int, cleaned: Cleaned) -> float | None:
    if cleaned.codes is None:
        return None
    total = 0.0
    for part in parts(len(cleaned.codes), batch_size):
        labels = None if cleaned.labels is None else cleaned.labels[part].to(flow.device)
        total -= float(flow.log_prob(cleaned.codes[part].to(flow.device), labels, level).sum())
    return total / cleaned.codes.numel()
