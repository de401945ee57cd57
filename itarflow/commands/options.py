"""What `evaluate` and `sweep` share: options, how what they need is opened, and how it is carried out."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import PartialState
from rich.console import Console
from torch import Tensor

from itarflow import __version__
from itarflow.commands.class_labels import check_seed
from itarflow.commands.console import resumable, say
from itarflow.commands.guidance import GuidanceOptions
from itarflow.commands.prompts import PromptOptions, put_encoder, take_encoder
from itarflow.data.images import Crop, square_side
from itarflow.data.load import DataConfig
from itarflow.denoisers.load import load_denoiser
from itarflow.denoisers.ode import Spacing
from itarflow.denoisers.score import Denoiser
from itarflow.evaluation.conversion import CONVERSIONS, PROTOCOLS, Protocol
from itarflow.evaluation.metrics.extractors import INCEPTION, Extractor, load_extractor
from itarflow.evaluation.metrics.reference import Reference, read_reference
from itarflow.evaluation.metrics.scores import Scores
from itarflow.evaluation.real_images import crop_for, reference_for
from itarflow.evaluation.samples.generate import Generation, LabelRule, labels_by, manifest_of
from itarflow.evaluation.samples.prompts import SamplePrompts
from itarflow.evaluation.scoring import save_samples, scores_of
from itarflow.inverse.solvers import sequential
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.devices import Precision, asked_dtype, device_name, usable_device
from itarflow.runtime.files import check_no_link, check_writable
from itarflow.runtime.json_file import as_type
from itarflow.runtime.launch import joined
from itarflow.runtime.processes import main_first, on_main
from itarflow.runtime.text import display_name, short_names

MOST_SAMPLES = 10**8
"""More could not be listed in memory."""


@dataclass(frozen=True, kw_only=True)
class Scoring(GuidanceOptions, PromptOptions):
    """A checkpoint, how its samples are made, and the real images that they are compared with.

    A command implements `generations`, what to sample, and `finish`, the report.
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, such as runs/cifar10/pipeline, or a Hugging Face Hub id."""
    output: Path | None = None
    """Folder for the figures, and for the samples of each denoising variant. None = runs/NAME/evaluation of a run's
    pipeline, runs/NAME/pipeline; NAME-evaluation of other checkpoints."""
    data: str | None = None
    """Real images: as --data.path in training. Their statistics are computed once, and cached."""
    split: str = "train"
    """Split of the real images. Papers compare with the training images."""
    crop: Crop | None = None
    """How the real images become square; figures depend on it. None = as in the checkpoint's training,
    where that is known: another one is then refused."""
    image_column: str | None = None
    """Column with the real images. None finds it."""
    reference: Path | None = None
    """Statistics of real images in place of --data: a file of ADM's evaluation (.npz), or one kept from --data."""
    extractor: str = INCEPTION
    """Network whose features are compared: inception-v3-compat, by which FID is defined; efficientnet-lite0, which
    needs no download (its distances are not FID, and are not called so); or another one that torch-fidelity knows."""
    features: Path | None = None
    """File with the extractor's weights, for machines that can't download them."""
    cache: Path | None = None
    """Folder where statistics of real images are kept. None = beside the caches of Hugging Face."""
    num_samples: int = 50_000
    """How many. Papers make 50,000; with fewer, FID is higher, and comparable only at equal numbers."""
    labels: LabelRule = "balanced"
    """balanced: every class in turn. random: drawn uniformly. none: without labels, and without guidance."""
    seed: int = 0
    """Of the noise and of random labels."""
    protocol: Protocol = "rounded"
    """How pixels become 8-bit: rounded to the nearest level, real images as they are; or official, as the papers'
    scripts do: truncated, with real images flipped at random. Figures of one only compare with figures of the same."""
    spacing: Spacing | None = None
    """Of its noise levels. None = the checkpoint's."""
    denoiser: str | None = None
    """Denoiser of the iterative variant instead of the checkpoint itself: a pipeline of another flow, or a diffusion
    model of diffusers."""
    exact: bool = False
    """Invert the flow token by token, even if the checkpoint has a plan of `itarflow profile`, and in float32."""
    inverse_dtype: Precision | None = None
    """Precision of the transformers in the inverse. None = bf16 on GPUs that have it, unless --exact is given; else
    the checkpoint's, float32."""
    denoise_dtype: Precision | None = None
    """Precision of a flow's layers in denoising. None = bf16 on GPUs that have it, else float32."""
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

    @property
    def kind(self) -> str:
        """What the default folder is called by."""
        return "evaluation"

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return default_folder(self.checkpoint, self.kind) if self.output is None else self.output

    def generations(
        self, pipe: ITARFlowPipeline, denoiser: Denoiser | None, prompts: SamplePrompts
    ) -> dict[str, Generation]:
        """What is made, by the names of folders in `output`; "" is the folder itself.

        Raises:
            ValueError: options that do not suit the checkpoint.
        """
        raise NotImplementedError

    def finish(self, made: Mapping[str, Generation], scores: Mapping[Path, Scores], report: dict[str, Any]) -> None:
        """Write, plot and print the results; called on the main process.

        Args:
            made: what `generations` gave.
            scores: by the folders of samples.
            report: what the reports of all commands hold.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Check the options that need no checkpoint; raises ValueError, OSError or ImportError."""
        if (self.data is None) == (self.reference is None):
            raise ValueError("give either --data (real images) or --reference (a file with their statistics).")
        if self.num_samples < 2:
            raise ValueError(
                f"--num-samples is {self.num_samples}; expected 2 or more, since there is no covariance of one."
            )
        if self.num_samples > MOST_SAMPLES:
            raise ValueError(f"--num-samples is {self.num_samples}; expected at most {MOST_SAMPLES:,}.")
        check_seed(self.seed)
        self.check_prompts(self.data)
        for name in ("batch_size", "decode_batch_size", "denoise_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; expected 1 or more.")
        if self.output is None:  # a folder that is named may be a link
            check_no_link(self.folder)
        check_writable(self.folder)

    def run(self) -> None:
        """Carry the command out."""
        with resumable(self.folder):
            self._run(joined())

    def _run(self, state: PartialState) -> None:
        self.check()
        pipe, device, prompts = self._open_pipe(state)
        denoiser = self._open_denoiser(pipe, device)
        generations = self.generations(pipe, denoiser, prompts)
        for generation in generations.values():
            generation.check()
        folders = {self.folder / name: generation for name, generation in generations.items()}
        on_main(state, lambda: self._look_at(folders))  # refused now, not after the reference
        if state.is_main_process:
            dtype = _dtype_name(pipe, self.inverting()["inverse_dtype"]).removeprefix("torch.")
            say(f"{_plan(generations, self.num_samples)}; on {device_name(pipe.device)} in {dtype}")
        console = Console(stderr=True)
        extractor = main_first(state, lambda: load_extractor(self.extractor, self.features, device))
        reference = self._open_reference(pipe, extractor, state, console)
        start = time.monotonic()
        made = save_samples(folders, state, console)
        making, start = time.monotonic() - start, time.monotonic()
        samples = [folder / name for folder, generation in folders.items() for name in generation.variants]
        found, scored = scores_of(samples, reference, extractor, state, device=device, console=console)
        if state.is_main_process:
            if prompts.encoder is not None and self.text_encoder is None:  # for the card, of which it is a part
                pipe.register_modules(text_encoder=prompts.encoder.encoder, tokenizer=prompts.encoder.tokenizer)
            report = {
                "checkpoint": display_name(self.checkpoint),
                "denoiser": None if self.denoiser is None else display_name(self.denoiser),
                "labels": self.labels,
                **self.told(),
                "reference": asdict(reference.origin),
                "protocol": PROTOCOLS[self.protocol],
                "conversion": CONVERSIONS[self.protocol],
                "speed": {
                    "making, images/s": made / making if made else None,
                    "scoring, images/s": scored / (time.monotonic() - start) if scored else None,
                },
                "made": {
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    **versions(),
                    "device": device_name(pipe.device),
                    "inverse dtype": _dtype_name(pipe, self.inverting()["inverse_dtype"]),
                    "denoise dtype": _dtype_name(pipe, self.denoising()["dtype"]),
                },
            }
            self.finish(generations, dict(zip(samples, found, strict=True)), report)

    def sample_labels(self, pipe: ITARFlowPipeline) -> Tensor:
        """(N,) int64, a label each sample; -1 = none."""
        return labels_by(self.labels, self.num_samples, pipe.flow.config.num_classes, self.seed)

    def guided_by(self, pipe: ITARFlowPipeline) -> bool:
        """Whether there are labels or prompts to guide by."""
        return pipe.takes_prompts or (self.labels != "none" and pipe.flow.config.num_classes > 0)

    def _sample_prompts(self, pipe: ITARFlowPipeline) -> SamplePrompts:
        """The prompts of the samples; none for a checkpoint that takes none.

        Raises:
            ValueError: a checkpoint that takes prompts, and no option that gives some.
        """
        if pipe.takes_prompts and not self.told():
            raise ValueError(
                "this checkpoint makes images from prompts; give some: --captions of the real images, or --prompts "
                "FILE."
            )
        return self.prompts_of(self._real_images(pipe), pipe.picture_shape, self.num_samples)

    def denoising(self) -> dict[str, Any]:
        """Options of denoising and decoding, for `variants_of` and `generations_of`."""
        return {
            "dtype": asked_dtype(self.denoise_dtype),
            "slice_size": self.denoise_batch_size,
            "decode_size": self.decode_batch_size,
        }

    def inverting(self) -> dict[str, Any]:
        """Options of the inverse, for `Generation`."""
        return {
            "protocol": self.protocol,
            "solver": sequential if self.exact else None,
            "inverse_dtype": asked_dtype(self.inverse_dtype, exact=self.exact),
            "batch_size": self.batch_size,
        }

    def _look_at(self, folders: Mapping[Path, Generation]) -> None:
        """Refuse folders that hold other things, or are links in the folder of the results."""
        for folder, generation in folders.items():
            if folder != self.folder:
                check_no_link(folder)
            manifest_of(generation, folder)

    def _open_pipe(self, state: PartialState) -> tuple[ITARFlowPipeline, str, SamplePrompts]:
        """The checkpoint without its text encoder on this process's device, that device, and what is sampled from.

        Raises:
            ValueError: a device is named for several processes, or labels for a checkpoint that takes prompts.
            OSError: there is no such checkpoint.
        """
        if self.device is not None and state.num_processes > 1:
            raise ValueError(
                f"--device is {self.device}, but {state.num_processes} processes take one each; leave it out."
            )
        device = str(state.device) if state.num_processes > 1 else usable_device(self.device)
        pipe = main_first(state, self._load_pipe)
        if pipe.takes_prompts and self.labels != "balanced":
            raise ValueError(
                f"--labels is {self.labels}, but this checkpoint takes prompts, and no labels; leave it out."
            )
        prompts = main_first(state, lambda: self._sample_prompts(pipe))
        prompts.check(pipe)
        if pipe.takes_prompts:  # the memory of the device is the flow's
            prompts = replace(prompts, encoder=take_encoder(pipe))
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        crop_for(pipe, self.crop), noted_evaluations(pipe.config.evaluations)  # refused now
        return pipe, device, prompts

    def _load_pipe(self) -> ITARFlowPipeline:
        pipe = ITARFlowPipeline.from_pretrained(self.checkpoint)
        if self.text_encoder is not None:
            put_encoder(pipe, self.text_encoder)
        return pipe

    def _open_denoiser(self, pipe: ITARFlowPipeline, device: str) -> Denoiser | None:
        """The denoiser instead of the checkpoint; None = itself."""
        if self.denoiser is None:
            return None
        return load_denoiser(
            self.denoiser,
            vae=pipe.vae,
            slice_size=self.denoise_batch_size,
            dtype=asked_dtype(self.denoise_dtype),
            device=device,
        )

    def _real_images(self, pipe: ITARFlowPipeline) -> DataConfig:
        return DataConfig(
            path=self.data,
            split=self.split,
            crop=crop_for(pipe, self.crop),
            image_column=self.image_column,
            held_out_images=0,
            num_workers=self.num_workers,
        )

    def _open_reference(
        self, pipe: ITARFlowPipeline, extractor: Extractor, state: PartialState, console: Console
    ) -> Reference:
        """Statistics of the real images, on all processes; computed now, unless they are cached.

        Raises:
            DataError: the images have another number of classes than the checkpoint.
        """
        crop = crop_for(pipe, self.crop)
        shared: dict[str, Any] = {
            "extractor": extractor,
            "accelerator": state,
            "cache": self.cache,
            "console": console,
            "protocol": self.protocol,
        }
        if self.reference is not None:
            return read_reference(self.reference, image_size=square_side(pipe.picture_shape), crop=crop, **shared)
        return reference_for(pipe, self._real_images(pipe), **shared)


def default_folder(checkpoint: str | Path, kind: str) -> Path:
    """runs/NAME/KIND for the pipeline of a run, runs/NAME/pipeline; else NAME-KIND in the working directory."""
    run = Path(checkpoint).parent
    if Path(checkpoint).name == "pipeline" and (run / "recipe.json").is_file():
        return run / kind
    return Path(f"{short_names([str(checkpoint)])[0]}-{kind}")


def noted_evaluations(values: Any) -> dict[str, str]:
    """The evaluations that are noted in a checkpoint; raises DataError if they are damaged."""
    return as_type(values or {}, dict[str, str], "evaluations, in the checkpoint's model_index.json,")


def _plan(generations: Mapping[str, Generation], count: int) -> str:
    """A summary of the work ahead."""
    variants = [variant for generation in generations.values() for variant in generation.variants.values()]
    steps = sum(one.schedule.config.num_denoise_steps for one in variants if one.schedule is not None)
    return (
        f"{len(variants)} settings of {count:,} images: {count * len(generations):,} images are generated, "
        f"{count * len(variants):,} denoised and scored, by {count * steps:,} evaluations of the denoiser in all"
    )


def _dtype_name(pipe: ITARFlowPipeline, asked: torch.dtype | None) -> str:
    """Of the layers while a pipeline samples."""
    return str(pipe.sampling_dtype(asked) or pipe.flow.dtype)


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version(), "itarflow": __version__}
    for package in ("torch", "diffusers", "torch-fidelity"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
