"""`itarflow evaluate`: samples of a checkpoint, and what they are worth by the figures of the field."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.codes import display_name
from itarflow.commands.shared import joined, say, usable_device
from itarflow.data import DataConfig, load_data
from itarflow.denoise import Method, Spacing
from itarflow.denoisers import load_denoiser
from itarflow.evaluate import Way, make_samples, score_samples, ways_of
from itarflow.extractors import INCEPTION, Extractor, load_extractor
from itarflow.generate import CONVERSION, MANIFEST, Generation, LabelRule, chosen_labels
from itarflow.guidance import Guidance
from itarflow.images import Crop, DataError
from itarflow.inverse import sequential
from itarflow.metrics import Figure, Scores
from itarflow.pipeline import ITARFlowPipeline
from itarflow.processes import main_first
from itarflow.reference import Reference, read_reference, reference_of
from itarflow.run import check_writable
from itarflow.samples import open_samples, write_npz, write_png
from itarflow.shards import write_json


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Make many samples of a checkpoint and compare them with real images: FID, sFID, IS, KID, precision, recall.

    Example: itarflow evaluate runs/cifar10/pipeline --data uoft-cs/cifar10 --num-samples 50000

    Samples are scored raw (noisy, as the flow has made them), self-denoised (one step, as TARFlow does) and
    iteratively denoised (as iTARFlow does). Image i depends on the checkpoint, the seed, i and its label, and on
    nothing else. The same command goes on after an interruption. Several GPUs share the work:
    accelerate launch -m itarflow evaluate ...
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, such as runs/cifar10/pipeline, or a Hugging Face Hub id."""
    data: str | None = None
    """Real images: as --data.path in training. Their statistics are computed once, and kept."""
    split: str = "train"
    """Split of the real images. Papers compare with the training images."""
    crop: Crop = "center"
    """How the real images become square, as --data.crop in training; figures depend on it."""
    image_column: str | None = None
    """Column with the real images. None finds the first one."""
    reference: Path | None = None
    """Statistics of real images in place of --data: a file of ADM's evaluation (.npz), or one kept from --data."""
    num_samples: int = 50_000
    """How many. Papers make 50,000; with fewer, FID is higher, and comparable only at equal numbers."""
    labels: LabelRule = "balanced"
    """balanced: every class in turn. random: drawn uniformly. none: without labels, and without guidance."""
    seed: int = 0
    """Of the noise and of random labels."""
    output: Path = Path("evaluation")
    """Folder for evaluation.json, and for the samples of each way of cleaning."""
    ways: tuple[Way, ...] | None = None
    """Ways of cleaning that are scored: raw, self, iterative. None = all that the checkpoint knows."""
    guidance_weight: float | None = None
    """w in (1 + w) * conditional - w * unconditional; 0 = off. None = the checkpoint's."""
    t_max: float | None = None
    """Noise level at which is generated. None = the checkpoint's."""
    num_denoise_steps: int | None = None
    """Score evaluations of the iterative way. None = the checkpoint's."""
    method: Method | None = None
    """Solver of the iterative way. None = the checkpoint's."""
    spacing: Spacing | None = None
    """Of its noise levels. None = the checkpoint's."""
    denoiser: str | None = None
    """What cleans in the iterative way instead of the checkpoint itself: a pipeline of another flow, or a diffusion
    model of diffusers."""
    extractor: str = INCEPTION
    """Network whose features are compared: inception-v3-compat, by which FID is defined; efficientnet-lite0, which
    needs no download (its distances are not FID, and are not called so); or another one that torch-fidelity knows."""
    features: Path | None = None
    """File with the extractor's weights, for machines that can't download them."""
    cache: Path | None = None
    """Folder where statistics of real images are kept. None = beside the caches of Hugging Face."""
    npz: bool = False
    """Write the samples of each way as an .npz file too, which ADM's evaluation suite reads."""
    png: bool = False
    """Write them as folders of PNG files too."""
    record: bool = True
    """Write the figures into the checkpoint's settings and model card, if it is a folder here."""
    exact: bool = False
    """Invert the flow token by token, whatever plan `itarflow profile` has left in the checkpoint."""
    inverse_dtype: Literal["float32", "bf16"] = "float32"
    """Precision of the transformers in the inverse."""
    denoise_dtype: Literal["float32", "bf16"] = "float32"
    """Precision of a flow's layers in denoising."""
    batch_size: int = 64
    """Images that are made at a time in each process, and lie in a file."""
    denoise_batch_size: int | None = None
    """Images that are denoised at a time. None = as many as are made."""
    decode_batch_size: int = 8
    """Images that a VAE decodes at a time."""
    num_workers: int = 2
    """Processes that decode real images."""
    device: str | None = None
    """Such as cuda, cuda:1, mps or cpu. None = a GPU if there is one; of several processes, one each."""

    def run(self) -> None:
        """Carry the command out."""
        state = joined()
        self._check()
        device = str(state.device) if state.num_processes > 1 else usable_device(self.device)
        pipe = main_first(state, lambda: ITARFlowPipeline.from_pretrained(self.checkpoint)).to(device)
        pipe.set_progress_bar_config(disable=True)
        generation = self._generation(pipe, device)
        generation.check()
        console = Console(stderr=True)
        extractor = main_first(state, lambda: load_extractor(self.extractor, self.features, device))
        reference = self._reference(pipe, extractor, state, console)
        start = time.monotonic()
        made = make_samples(generation, self.output, state, console)
        seconds = time.monotonic() - start
        scores = dict[str, Scores]()
        start = time.monotonic()
        for name in generation.columns:
            samples = open_samples(self.output / name)
            scores[name] = score_samples(samples, reference, extractor, state, console=console)
        extracting = time.monotonic() - start
        if state.is_main_process:
            speed = {
                "making, images/s": made / seconds if made else None,
                "scoring, images/s": len(scores) * self.num_samples / extracting,
            }
            self._report(pipe, generation, scores, speed)

    def _check(self) -> None:
        if (self.data is None) == (self.reference is None):
            raise ValueError("give either --data (real images) or --reference (a file with their statistics).")
        for name in ("num_samples", "batch_size", "decode_batch_size", "denoise_batch_size"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "num_samples" else 1):
                expected = "2 or more, since there is no covariance of one" if name == "num_samples" else "1 or more"
                raise ValueError(f"--{name.replace('_', '-')} is {value}; expected {expected}.")
        check_writable(self.output)

    def _generation(self, pipe: ITARFlowPipeline, device: str) -> Generation:
        """What is to be made."""
        dtype = torch.bfloat16 if self.denoise_dtype == "bf16" else None
        denoiser = None
        if self.denoiser is not None:
            denoiser = load_denoiser(
                self.denoiser, vae=pipe.vae, slice_size=self.denoise_batch_size, dtype=dtype, device=device
            )
        schedule = pipe.schedule(
            self.t_max, None, self.num_denoise_steps, self.method, self.spacing, denoiser=denoiser
        )
        guidance = pipe.default_guidance
        if self.guidance_weight is not None:
            guidance = replace(guidance, weight=self.guidance_weight)
        unlabelled = self.labels == "none" or pipe.flow.config.num_classes == 0
        return Generation(
            pipe=pipe,
            columns=ways_of(
                pipe,
                schedule,
                self.ways,
                denoiser=denoiser,
                dtype=dtype,
                slice_size=self.denoise_batch_size,
                decode_size=self.decode_batch_size,
            ),
            labels=chosen_labels(self.labels, self.num_samples, pipe.flow.config.num_classes, self.seed),
            seed=self.seed,
            # Without labels the checkpoint's own weight plays no part, and one given here is refused.
            guidance=None if unlabelled and self.guidance_weight is None else guidance,
            t_max=schedule.config.t_max,
            solver=sequential if self.exact else None,
            inverse_dtype=torch.bfloat16 if self.inverse_dtype == "bf16" else None,
            file_size=self.batch_size,
        )

    def _reference(
        self, pipe: ITARFlowPipeline, extractor: Extractor, state: PartialState, console: Console
    ) -> Reference:
        channels, size, _ = pipe.picture_shape
        shared: dict[str, Any] = {
            "extractor": extractor,
            "accelerator": state,
            "cache": self.cache,
            "console": console,
        }
        if self.reference is not None:
            return read_reference(self.reference, image_size=size, crop=self.crop, **shared)
        config = DataConfig(
            path=self.data,
            split=self.split,
            crop=self.crop,
            image_column=self.image_column,
            held_out_images=0,
            num_workers=self.num_workers,
        )
        data = main_first(state, lambda: load_data(config, image_size=size, in_channels=channels))
        ours, theirs = pipe.flow.config.num_classes, len(data.class_names)
        if ours and theirs and ours != theirs:
            raise DataError(
                f"the images in {self.data} have {theirs} classes, but the checkpoint knows {ours}; expected images "
                "like those that it was trained on. Statistics of whatever images are taken by --reference."
            )
        return reference_of(config, image_size=size, in_channels=channels, **shared)

    def _report(
        self, pipe: ITARFlowPipeline, generation: Generation, scores: dict[str, Scores], speed: dict[str, float | None]
    ) -> None:
        first = next(iter(scores.values()))
        made = json.loads((self.output / MANIFEST).read_text())
        counts = generation.labels[generation.labels >= 0].bincount(minlength=pipe.flow.config.num_classes)
        report = {
            "checkpoint": display_name(self.checkpoint),
            "samples": made,
            "labels": self.labels,
            "images of a class": sorted({int(count) for count in counts}) if self.labels != "none" else None,
            "crop": self.crop,
            "extractor": first.extractor,
            "reference": first.reference,
            "conversion": CONVERSION,
            "ways": {name: one.to_json() for name, one in scores.items()},
            "speed": speed,
            "made": {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                **_versions(),
                "device": self._device(pipe),
            },
        }
        write_json(self.output / "evaluation.json", report)
        for name in scores:
            if self.npz:
                write_npz(open_samples(self.output / name), self.output / f"{name}.npz")
            if self.png:
                write_png(open_samples(self.output / name), self.output / f"{name}-png")
        console = Console()
        console.print(_table(scores))
        for warning in dict.fromkeys(warning for one in scores.values() for warning in one.warnings):
            console.print(f"[yellow]Note:[/] {escape(warning)}.", soft_wrap=True, highlight=False)
        if len(counts) and int(counts.min()) != int(counts.max()):
            say(f"Classes have {int(counts.min()):,} to {int(counts.max()):,} samples.")
        say(
            f"figures in {self.output / 'evaluation.json'}; samples in "
            + ", ".join(str(self.output / name) for name in scores)
        )
        folder = Path(self.checkpoint)
        if self.record and folder.is_dir():
            lines = {_what(name, generation, one, self.labels): _line(one) for name, one in scores.items()}
            pipe.record(folder, "evaluations", {**(pipe.config.evaluations or {}), **lines})
            say(f"noted in {folder} and its model card")

    def _device(self, pipe: ITARFlowPipeline) -> str:
        return torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else str(pipe.device)


def _what(name: str, generation: Generation, scores: Scores, labels: str) -> str:
    """What was evaluated, for the model card."""
    schedule = generation.columns[name].schedule
    steps = "" if schedule is None or name != "iterative" else f", {schedule.config.num_denoise_steps} steps"
    guidance = generation.guidance or Guidance()
    return (
        f"{name}{steps}, guidance {guidance.weight:g}, t_max {generation.level:g}: {scores.samples:,} samples, labels "
        f"{labels}, seed {generation.seed}, against {scores.reference}"
    )


def _line(scores: Scores) -> str:
    return ", ".join(f"{figure.title} {_text(figure)}" for figure in scores.figures.values())


def _table(scores: dict[str, Scores]) -> Table:
    """A row for each way of cleaning, a column for each figure."""
    first = next(iter(scores.values()))
    table = Table(
        title=f"{first.samples:,} samples against {first.reference}, by {first.extractor}", title_justify="left"
    )
    table.add_column("samples")
    titles = list(dict.fromkeys(figure.title for one in scores.values() for figure in one.figures.values()))
    for title in titles:
        table.add_column(escape(title.removesuffix(f" ({first.extractor})")), justify="right")
    if any(one.broken for one in scores.values()):
        table.add_column("not finite", justify="right")
    for name, one in scores.items():
        figures = {figure.title: _text(figure) for figure in one.figures.values()}
        broken = [f"{one.broken:,}"] if any(other.broken for other in scores.values()) else []
        table.add_row(name, *(figures.get(title, "-") for title in titles), *broken)
    return table


def _text(figure: Figure) -> str:
    return f"{figure.value:.4g}" + ("" if figure.std is None else f" ± {figure.std:.2g}")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("itarflow", "torch", "diffusers", "torch-fidelity"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
