"""Ways of cleaning noisy codes, each a column of a comparison: ODEs of flows and diffusion models, and decoders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itarflow.codec import Codec, Vae, check_same_codes, codec_of
from itarflow.denoisers.diffusion import DiffusionDenoiser
from itarflow.denoisers.ode import DenoiseScheduler, denoise, noise_levels
from itarflow.denoisers.score import CheckedDenoiser, Denoiser, FlowDenoiser
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.presets import T_MIN
from itarflow.runtime.files import weights_digest


@dataclass(frozen=True)
class Column:
    """One way from noisy codes to images."""

    title: str
    codec: Codec
    denoiser: Denoiser | None = None
    """None = the codes are left as they are."""
    schedule: DenoiseScheduler | None = None
    """How the denoiser is asked."""
    by_decoder: bool = False
    """The codec cleans, so that there are no clean codes."""

    @property
    def evaluations(self) -> int:
        """Of the denoiser, in all."""
        return 0 if self.schedule is None else self.schedule.config.num_denoise_steps


@dataclass(frozen=True)
class Solver:
    """A denoiser, and how its ODE is solved."""

    title: str
    owner: str | None
    """The pipeline whose flow it is."""
    denoiser: CheckedDenoiser
    settings: Mapping[str, Any]
    """Of `DenoiseScheduler`, without t_max."""

    def schedule(self, t_max: float) -> DenoiseScheduler:
        """From t_max down; raises ValueError if there is nothing between it and t_min."""
        return DenoiseScheduler(t_max=t_max, **self.settings)

    def check(self, image_shape: tuple[int, int, int], num_classes: int, unlabelled: bool, t_max: float) -> None:
        """Raise a ValueError if it can't clean noise of t_max."""
        config = self.schedule(t_max).config
        levels = noise_levels(t_max, config.t_min, config.num_denoise_steps, config.spacing)[:-1]
        self.denoiser.check(image_shape, num_classes, levels, unlabelled=unlabelled)


def solvers_of(
    pipelines: Mapping[str, ITARFlowPipeline],
    diffusion: Mapping[str, DiffusionDenoiser],
    num_denoise_steps: int | None,
    slice_size: int,
) -> list[Solver]:
    """All whose ODE can be solved: the noise-conditioned flows, and the diffusion models."""
    solvers = []
    for name, pipe in pipelines.items():
        stored = pipe.scheduler.config
        if pipe.flow.config.noise_conditioned and stored.method != "skip":
            settings = {key: value for key, value in settings_of(pipe.scheduler).items() if key != "t_max"}
            settings["num_denoise_steps"] = num_denoise_steps or stored.num_denoise_steps
            solvers.append(Solver(f"iterative: {name}", name, FlowDenoiser(pipe.flow, slice_size), settings))
    for name, denoiser in diffusion.items():
        settings = {"t_min": max(T_MIN, denoiser.noise_range[0])}
        if num_denoise_steps is not None:
            settings["num_denoise_steps"] = num_denoise_steps
        solvers.append(Solver(f"diffusion: {name}", None, denoiser, settings))
    return solvers


def decoder_columns(decoders: Mapping[str, Vae], vae: Vae | None, slice_size: int) -> list[Column]:
    """The columns in which nothing but a decoder cleans."""
    if decoders and vae is None:
        raise ValueError(
            f"the decoder {next(iter(decoders))} is for codes, but the checkpoints make pixels: they have no VAE."
        )
    for name, decoder in decoders.items():
        if vae is not None:
            check_same_codes(name, decoder, vae)
    return [
        Column(f"decoder: {name}", codec_of(decoder, slice_size=slice_size), by_decoder=True)
        for name, decoder in decoders.items()
    ]


def columns_of(
    pipelines: Mapping[str, ITARFlowPipeline],
    solvers: Sequence[Solver],
    decoding: Sequence[Column],
    num_classes: int,
    unlabelled: bool,
    batch_size: int,
    slice_size: int,
) -> dict[str, list[Column]]:
    """The columns of each pipeline by its name: those of solvers that don't know its t_max are left out.

    Raises:
        ValueError: a pipeline that can't clean its own images, or a diffusion model that can clean nobody's.
    """
    columns: dict[str, list[Column]] = {}
    refusals: dict[str, list[ValueError]] = {solver.title: [] for solver in solvers}
    for name, pipe in pipelines.items():
        stored, codec = pipe.scheduler.config, codec_of(pipe.vae, slice_size=batch_size)
        one_step = DenoiseScheduler(t_max=stored.t_max, t_min=stored.t_min, num_denoise_steps=1, clip=stored.clip)
        columns[name] = [
            Column("noisy", codec),
            Column("self", codec, FlowDenoiser(pipe.flow, slice_size), one_step),
        ]
        for solver in sorted(solvers, key=lambda solver: solver.owner != name):
            try:
                solver.check(pipe.flow.image_shape, num_classes, unlabelled, stored.t_max)
            except ValueError as error:
                refusals[solver.title].append(error)
                if solver.owner == name:
                    raise ValueError(f"{name} can't clean its own images: {error}") from error
                continue
            title = "own iterative" if solver.owner == name else solver.title
            columns[name].append(Column(title, codec, solver.denoiser, solver.schedule(stored.t_max)))
        columns[name] += decoding
    for solver in solvers:
        if solver.owner is None and len(refusals[solver.title]) == len(pipelines):
            reason = refusals[solver.title][0]
            raise ValueError(f"{solver.title} can clean the images of no checkpoint here: {reason}") from reason
    return columns


def clean(
    column: Column,
    noisy: Tensor,
    labels: Tensor | None,
    seeds: Sequence[torch.Generator],
    batch_size: int,
    device: torch.device,
    count: Callable[[int], None],
) -> Cleaned:
    """Clean noisy codes (B, C, H, W), batch by batch, and decode them.

    Args:
        column: how.
        noisy: on the CPU.
        labels: (B,) int64, or None.
        seeds: one an image; they are copied, not advanced.
        batch_size: images at a time.
        device: where to compute.
        count: called with 1 after each evaluation of the denoiser, and after each batch.
    """

    def counted(noisy: Tensor, labels: Tensor | None, noise_level: Tensor) -> Tensor:
        assert column.denoiser is not None
        estimate = column.denoiser(noisy, labels, noise_level)
        count(1)
        return estimate

    codes, images, seconds = [], [], 0.0
    for part in parts(len(noisy), batch_size):
        x, given = noisy[part].to(device), None if labels is None else labels[part].to(device)
        start = time.perf_counter()
        if column.schedule is not None:
            config = column.schedule.config
            x = denoise(
                counted,
                x,
                given,
                t_max=config.t_max,
                t_min=config.t_min,
                num_steps=config.num_denoise_steps,
                method=config.method,
                spacing=config.spacing,
                clip=config.clip,
                generator=[generator.clone_state() for generator in seeds[part]],
            )
        images.append(column.codec.decode(x).cpu())  # which waits for the device
        seconds += time.perf_counter() - start
        codes.append(x.cpu())
        count(1)
    clean_codes = None if column.by_decoder else torch.cat(codes)
    return Cleaned(clean_codes, labels, torch.cat(images), seconds / len(noisy))


def identity_of(denoiser: Denoiser | None) -> str | None:
    """What a denoiser is, by its weights and schedule; of one that is neither flow nor diffusion model, its type."""
    if isinstance(denoiser, FlowDenoiser):
        return weights_digest(denoiser.flow.state_dict())
    if isinstance(denoiser, DiffusionDenoiser):
        return denoiser.identity
    return None if denoiser is None else type(denoiser).__name__


def settings_of(scheduler: DenoiseScheduler) -> dict[str, Any]:
    """The arguments that a scheduler was made of."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


class Cleaned(NamedTuple):
    """What a metric sees: the images of one generator, cleaned in one way."""

    codes: Tensor | None
    """(B, C, H, W) float32 on the CPU; None = cleaned by their decoder, so that there are no clean codes."""
    labels: Tensor | None
    """(B,) int64 on the CPU, or None."""
    images: Tensor
    """(B, C, H, W) float32 in about [-1, 1], on the CPU; the codes themselves in pixel space."""
    seconds: float
    """An image, from noisy codes to pixels."""


def parts(count: int, size: int) -> Iterator[slice]:
    """0 .. count - 1 in slices of at most `size`."""
    return (slice(start, start + size) for start in range(0, count, size))
