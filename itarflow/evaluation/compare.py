"""Noisy samples of several flows, each in several denoising variants, side by side (iTARFlow, table 7).

Rows are generators: pipelines that make noisy codes from the same seeds and labels. Columns are denoising variants. A
figure is a `Metric` of the images; `METRICS` are those in use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from itarflow.codec import Vae, check_same_codes, codec_of, differing, to_pil, to_pixels, to_uint8, vae_identity
from itarflow.data.images import spread_over, square_side
from itarflow.data.load import DataConfig, load_data
from itarflow.denoisers.diffusion import DiffusionDenoiser
from itarflow.denoisers.ode import DenoiseScheduler
from itarflow.denoisers.score import CheckedDenoiser
from itarflow.evaluation.samples.denoising import Denoising, one_step, settings_of
from itarflow.evaluation.samples.generate import Batch, Generation, generate, given_labels
from itarflow.pipeline.call import positive
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.pipeline.prompts import refuse_flow_of_prompts
from itarflow.presets import T_MIN
from itarflow.runtime.devices import tf32_products
from itarflow.runtime.files import check_writable, write_json
from itarflow.runtime.pictures import balanced_columns, blank_figure, draw_comparison, image_grid, save_picture
from itarflow.runtime.progress import image_progress
from itarflow.runtime.text import file_name

REAL_IMAGES = 256
"""How many real images are measured for reference, at most."""
_KINDS = ("noisy", "self", "own iterative", "iterative", "diffusion", "decoder")
"""Columns of compare.png, in order."""


@dataclass(frozen=True)
class Metric:
    """A figure for each generator and denoising variant."""

    title: str
    meaning: str
    """What is computed, exactly."""
    measure: Callable[[Batch], float | None]
    """Of all images of a generator in one denoising variant; None = there is no such figure."""


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
        "compare with real images, and look at the images",
        lambda made: float(residual_noise(made.images).mean()),
    ),
    Metric(
        "seconds an image",
        "from noisy codes to pixels, denoising and decoding, in the batches of this comparison; the first use of a "
        "model included",
        lambda made: made.seconds / len(made.images),
    ),
)
"""The metrics that need no model; a `nats_per_dim` for each noise-conditioned flow is added."""


def nats_per_dim(name: str, pipeline: ITARFlowPipeline, batch_size: int) -> Metric:
    """How improbable a noise-conditioned flow finds denoised codes, at the smallest noise level it was trained on."""
    flow = pipeline.flow
    level = flow.config.noise_range[0] if flow.config.noise_range else pipeline.scheduler.config.t_min

    @tf32_products(False)
    def measure(made: Batch) -> float | None:
        if made.codes is None:
            return None
        total, labels = 0.0, given_labels(made.labels)
        for start in range(0, len(made.codes), batch_size):
            part = slice(start, start + batch_size)
            given = None if labels is None else labels[part].to(flow.device)
            total -= float(flow.log_prob(made.codes[part].to(flow.device), given, level).sum())
        return total / made.codes.numel()

    meaning = (
        f"-log p(x, t = {level:g}) / (C * H * W) under {name}, in nats, of the denoised codes x as they are, without "
        "adding noise of that level, given their labels; mean over images. Overly smooth images score low too"
    )
    return Metric(f"nats/dim, {name}", meaning, measure)


@dataclass(frozen=True)
class Result:
    """The figures of one generator's images in one denoising variant."""

    generator: str
    method: str
    grid: str
    """The grid of all images, a file in the folder of the comparison."""
    values: Mapping[str, float | None]
    """By the titles of the metrics; None = there is no such figure, or it is not finite."""
    broken: int
    """Images with values that are not finite: the flow's inverse or the denoising diverged."""


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
    guidance: Mapping[str, Any] | None = None,
    num_denoise_steps: int | None = None,
    batch_size: int = 16,
    denoise_batch_size: int | None = None,
    picture_rows: int = 2,
    console: Console | None = None,
) -> Comparison:
    """Generate noisy images with each pipeline once, denoise them in every variant that applies, write the results.

    The columns: "noisy", as generated; "self", one Tweedie step of the generator at its t_max; "own iterative", its
    own ODE, if it is noise-conditioned; "iterative: NAME", the ODE of each other noise-conditioned pipeline that knows
    the generator's t_max; "diffusion: NAME", that of each diffusion model that does; and, if the pipelines have a VAE,
    "decoder: NAME", which decodes the noisy codes as they are.

    Args:
        pipelines: by name, all on one device; they generate, and denoise one another's images.
        class_labels: one an image; None = no label.
        output: folder for GENERATOR/METHOD.png, a grid each, compare.png, the first images of all side by side, and
            compare.json. Made if needed; files of these names are replaced, compare.json
            whenever a pipeline is done.
        diffusion: diffusion models by name, on the same device.
        decoders: autoencoders by name, fine-tuned to decode noisy codes of the pipelines' VAE, on the same device.
        data: real images to measure for reference: anything that `DataConfig.path` takes, at most 256 of it.
        seed: image i depends on it, on i and on its label alone; it is image i of a call of the pipeline, and of
            `itarflow evaluate`, with the same settings.
        guidance_weight: of all generators; None = each pipeline's own.
        guidance: other fields of `Guidance` that all generators have in place of each pipeline's own, such as
            {"rule": "scale"}.
        num_denoise_steps: evaluations in each iterative column; None = as the pipeline says that denoises, 10 for a
            diffusion model.
        batch_size: images that are generated, and denoised, at a time; a pipeline's plan goes by it.
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
    for pipe in pipelines.values():
        refuse_flow_of_prompts(pipe.flow, "compare")
    blank_figure(1, 1)  # raises now, not after the images are made, if matplotlib is missing
    check_writable(output)
    _check_names(pipelines, diffusion or {}, decoders or {})
    _check_alike(pipelines)
    positive("denoise_batch_size", denoise_batch_size)
    positive("num_denoise_steps", num_denoise_steps)
    if picture_rows < 1:
        raise ValueError(f"picture_rows is {picture_rows}; expected a number >= 1.")
    first = next(iter(pipelines.values()))
    labels = torch.tensor([first.label_id(label) for label in class_labels], dtype=torch.int64)
    given = {**(guidance or {}), **({} if guidance_weight is None else {"weight": guidance_weight})}
    bare = {name: _generation(name, pipe, labels, seed, given, batch_size) for name, pipe in pipelines.items()}
    variants = _variants(bare, diffusion or {}, decoders or {}, num_denoise_steps, denoise_batch_size)
    real = None if data is None else _real_images(first, data)
    scoring = {name: pipe for name, pipe in pipelines.items() if pipe.flow.config.noise_conditioned}
    metrics = [*METRICS, *(nats_per_dim(name, pipe, batch_size) for name, pipe in scoring.items())]
    chosen = {name: one.guidance or one.pipe.default_guidance for name, one in bare.items()}
    comparison = Comparison(
        settings={
            "seed": seed,
            "class_labels": list(class_labels),
            "guidance_weight": {name: one.weight for name, one in chosen.items()},
            "guidance": {name: asdict(one) for name, one in chosen.items()},
            "dtype": {name: str(pipe.sampling_dtype() or pipe.flow.dtype) for name, pipe in pipelines.items()},
            "columns": {
                name: {title: settings_of(one.schedule) for title, one in of_pipe.items() if one.schedule is not None}
                for name, of_pipe in variants.items()
            },
        },
        metrics={metric.title: metric.meaning for metric in metrics},
        results=(),
        real=real,
    )
    pictures = dict[tuple[str, str], Tensor]()
    total = len(labels) * sum(map(len, variants.values()))
    with image_progress(console, "making images", total, 0) as show:
        for name, generation in bare.items():
            made: dict[str, list[Batch]] = {}
            for batch in generate(replace(generation, variants=variants[name])):
                made.setdefault(batch.variant, []).append(batch)
                show(len(batch.images))
            for title, batches in made.items():
                images = _joined(batches)
                grid = f"{name}/{file_name(title)}.png"
                _save_grid(images.images, output / grid)
                values = {metric.title: _finite(metric.measure(images)) for metric in metrics}
                result = Result(name, title, grid, values, int(images.broken.sum()))
                comparison = replace(comparison, results=(*comparison.results, result))
                pictures[name, title] = images.images[:picture_rows].clone()  # not a view, which would keep all
            write_json(output / "compare.json", asdict(comparison))
    # One generator may have columns that another lacks.
    titles = sorted({title: None for _, title in pictures}, key=lambda title: _KINDS.index(title.split(":")[0]))
    draw_comparison({place: to_pil(images) for place, images in pictures.items()}, titles, output / "compare.png")
    return comparison


# -- what there is to do, and what is refused -------------------------------------------------------------------


def _check_names(*named: Mapping[str, Any]) -> None:
    if not named[0]:
        raise ValueError("no checkpoint is named; expected folders such as runs/NAME/pipeline.")
    for name in itertools.chain(*named):
        if not name or name in (".", "..") or file_name(name) != name:
            raise ValueError(f"the name {name!r} is not fit for a file; use letters, digits, '_', '.' and inner '-'.")


def _check_alike(pipelines: Mapping[str, ITARFlowPipeline]) -> None:
    """Refuse pipelines whose noisy codes are not of one kind, or can't be measured."""
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
                    "only those that do can denoise one another's images. Compare the others on their own."
                )
        if identity is not None and (lines := differing(identity, vae_identity(other.vae))):
            raise ValueError(f"{name} and {other_name} model codes of different VAEs:\n  " + "\n  ".join(lines))
    size = min(first.picture_shape[1:])
    if size < 3:
        raise ValueError(f"{name} makes images of {size} pixels; expected at least 3 x 3.")


def _generation(
    name: str, pipe: ITARFlowPipeline, labels: Tensor, seed: int, given: Mapping[str, Any], batch_size: int
) -> Generation:
    """What a pipeline generates, checked, before it is known how it is denoised."""
    guidance = replace(pipe.default_guidance, **given) if given else None
    generation = Generation(pipe=pipe, variants={}, labels=labels, seed=seed, guidance=guidance, batch_size=batch_size)
    try:
        generation.check()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return generation


class _Ode(NamedTuple):
    """A denoiser, and how its ODE is solved."""

    title: str
    owner: str | None
    """The pipeline whose flow it is."""
    denoiser: CheckedDenoiser
    settings: Mapping[str, Any]
    """Of `DenoiseScheduler`; t_max is that of the images."""


def _odes(
    pipelines: Mapping[str, ITARFlowPipeline], diffusion: Mapping[str, DiffusionDenoiser], slice_size: int | None
) -> Iterator[_Ode]:
    """All whose ODE can be solved: the noise-conditioned flows, and the diffusion models."""
    for name, pipe in pipelines.items():
        if pipe.flow.config.noise_conditioned and pipe.scheduler.config.method != "skip":
            yield _Ode(f"iterative: {name}", name, pipe.flow_denoiser(slice_size), settings_of(pipe.scheduler))
    for name, denoiser in diffusion.items():
        yield _Ode(f"diffusion: {name}", None, denoiser, {"t_min": max(T_MIN, denoiser.noise_range[0])})


def _variants(
    generations: Mapping[str, Generation],
    diffusion: Mapping[str, DiffusionDenoiser],
    decoders: Mapping[str, Vae],
    num_denoise_steps: int | None,
    slice_size: int | None,
) -> dict[str, dict[str, Denoising]]:
    """Those of each pipeline by name and title; ODEs of denoisers that don't know its t_max are left out.

    Raises:
        ValueError: a pipeline that can't denoise its own images, a diffusion model that can denoise none of the
            pipelines' images, or a decoder of other codes.
    """
    vae = next(iter(generations.values())).pipe.vae
    decoding = []
    for name, decoder in decoders.items():
        if vae is None:
            raise ValueError(f"the decoder {name} is for codes, but the checkpoints make pixels: they have no VAE.")
        check_same_codes(name, decoder, vae)
        decoding.append(Denoising(f"decoder: {name}", codec_of(decoder), by_decoder=True))
    odes = list(_odes({name: one.pipe for name, one in generations.items()}, diffusion, slice_size))
    steps = {} if num_denoise_steps is None else {"num_denoise_steps": num_denoise_steps}
    variants: dict[str, dict[str, Denoising]] = {}
    refusals: dict[str, list[ValueError]] = {ode.title: [] for ode in odes}
    for name, generation in generations.items():
        pipe, level, labels = generation.pipe, generation.level, given_labels(generation.labels)
        codec, own = codec_of(pipe.vae), pipe.flow_denoiser(slice_size)
        found = [Denoising("noisy", codec), Denoising("self", codec, own, one_step(pipe.scheduler))]
        for ode in sorted(odes, key=lambda ode: ode.owner != name):
            title = "own iterative" if ode.owner == name else ode.title
            try:
                schedule = DenoiseScheduler(**{**ode.settings, **steps, "t_max": level})
                variant = Denoising(title, codec, ode.denoiser, schedule)
                variant.check(pipe.flow, labels, level)
                found.append(variant)
            except ValueError as error:
                refusals[ode.title].append(error)
                if ode.owner == name:
                    raise ValueError(f"{name} can't denoise its own images: {error}") from error
        variants[name] = {variant.title: variant for variant in [*found, *decoding]}
    for ode in odes:
        if ode.owner is None and len(refusals[ode.title]) == len(generations):
            reason = refusals[ode.title][0]
            raise ValueError(f"{ode.title} can denoise the images of no checkpoint here: {reason}") from reason
    return variants


def _real_images(pipe: ITARFlowPipeline, path: str) -> dict[str, float | None]:
    """The residual noise of images from all over a data set, in the size of those that are generated."""
    shape, config = pipe.picture_shape, DataConfig(path=path, held_out_images=0)
    images = load_data(config, image_size=square_side(shape), in_channels=shape[0]).train
    count = min(len(images), REAL_IMAGES)
    chosen = torch.stack([images[index].image for index in spread_over(len(images), count)])
    return {"residual noise": _finite(float(residual_noise(to_pixels(chosen)).mean())), "images": count}


# -- what comes out ---------------------------------------------------------------------------------------------


def _joined(batches: Sequence[Batch]) -> Batch:
    """All images of a variant as one batch."""
    codes = [one.codes for one in batches if one.codes is not None]
    return batches[0]._replace(
        labels=torch.cat([one.labels for one in batches]),
        codes=torch.cat(codes) if codes else None,
        images=torch.cat([one.images for one in batches]),
        seconds=sum(one.seconds for one in batches),
    )


def _save_grid(images: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(image_grid(to_pil(images), balanced_columns(len(images))), path)


def _finite(value: float | None) -> float | None:
    """None for what is no number, which JSON can't hold."""
    return value if value is not None and math.isfinite(value) else None
