"""What commands share that make samples of a checkpoint and compare them with real images: options, and how they open.

Fields of bases come first in --help, the last base's foremost: `class Command(Making, _OwnOptions)`, where
`_OwnOptions` is a `Judged`, lists what is judged, what the command is for, and how images are made.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import PartialState
from rich.console import Console
from torch import Tensor

from itarflow.data.images import Crop
from itarflow.data.load import DataConfig, load_data
from itarflow.denoisers.load import load_denoiser
from itarflow.denoisers.ode import Method, Spacing
from itarflow.denoisers.score import Denoiser
from itarflow.evaluation.metrics.extractors import INCEPTION, Extractor, load_extractor
from itarflow.evaluation.metrics.reference import Reference, read_reference, reference_of
from itarflow.evaluation.metrics.scores import Figure
from itarflow.evaluation.samples.generate import LabelRule, labels_by
from itarflow.inverse.solvers import sequential
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.devices import usable_device
from itarflow.runtime.errors import DataError
from itarflow.runtime.processes import main_first


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A checkpoint, its samples, and the real images that they are compared with."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, such as runs/cifar10/pipeline, or a Hugging Face Hub id."""
    data: str | None = None
    """Real images: as --data.path in training. Their statistics are computed once, and kept."""
    split: str = "train"
    """Split of the real images. Papers compare with the training images."""
    crop: Crop | None = None
    """How the real images become square; figures depend on it. None = as in the checkpoint's training,
    where that is known: another one is then refused."""
    image_column: str | None = None
    """Column with the real images. None finds the first one."""
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

    def check_judged(self) -> None:
        """Refuse what needs no checkpoint to be told wrong; raises ValueError."""
        if (self.data is None) == (self.reference is None):
            raise ValueError("give either --data (real images) or --reference (a file with their statistics).")
        if self.num_samples < 2:
            raise ValueError(
                f"--num-samples is {self.num_samples}; expected 2 or more, since there is no covariance of one."
            )
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; expected a number >= 0.")

    def sample_labels(self, pipe: ITARFlowPipeline) -> Tensor:
        """(N,) int64, a label each sample; -1 = none."""
        return labels_by(self.labels, self.num_samples, pipe.flow.config.num_classes, self.seed)

    def crop_for(self, pipe: ITARFlowPipeline) -> Crop:
        """How real images become square: as asked for, else as in the checkpoint's training, as far as that is known.

        Raises:
            ValueError: another one is asked for than the checkpoint was trained with.
        """
        trained = ((pipe.config.training or {}).get("recipe") or {}).get("data", {}).get("crop")
        if self.crop is not None and trained is not None and self.crop != trained:
            raise ValueError(
                f"--crop is {self.crop}, but the checkpoint was trained on images with crop {trained}; the figures "
                "would tell the crops apart, not the images. Leave --crop out."
            )
        return self.crop or trained or "center"

    def open_extractor(self, state: PartialState, device: str) -> Extractor:
        """On all processes."""
        return main_first(state, lambda: load_extractor(self.extractor, self.features, device))

    def open_reference(
        self, pipe: ITARFlowPipeline, extractor: Extractor, state: PartialState, num_workers: int, console: Console
    ) -> Reference:
        """Statistics of the real images, on all processes; computed now, unless they are kept.

        Raises:
            DataError: the images have another number of classes than the checkpoint.
        """
        channels, size, _ = pipe.picture_shape
        crop = self.crop_for(pipe)
        shared: dict[str, Any] = {
            "extractor": extractor,
            "accelerator": state,
            "cache": self.cache,
            "console": console,
        }
        if self.reference is not None:
            return read_reference(self.reference, image_size=size, crop=crop, **shared)
        config = DataConfig(
            path=self.data,
            split=self.split,
            crop=crop,
            image_column=self.image_column,
            held_out_images=0,
            num_workers=num_workers,
        )
        data = main_first(state, lambda: load_data(config, image_size=size, in_channels=channels))
        ours, theirs = pipe.flow.config.num_classes, len(data.class_names)
        if ours and theirs and ours != theirs:
            raise DataError(
                f"the images in {self.data} have {theirs} classes, but the checkpoint knows {ours}; expected images "
                "like those that it was trained on. Statistics of whatever images are taken by --reference."
            )
        return reference_of(config, image_size=size, in_channels=channels, **shared)


@dataclass(frozen=True, kw_only=True)
class Making:
    """How images are made and cleaned, and where."""

    method: Method | None = None
    """Solver of iterative denoising. None = the checkpoint's."""
    spacing: Spacing | None = None
    """Of its noise levels. None = the checkpoint's."""
    denoiser: str | None = None
    """What denoises iteratively instead of the checkpoint itself: a pipeline of another flow, or a diffusion model of
    diffusers."""
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

    def check_making(self) -> None:
        """Refuse sizes that are none; raises ValueError."""
        for name in ("batch_size", "decode_batch_size", "denoise_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; expected 1 or more.")

    def open_pipe(self, checkpoint: str, state: PartialState) -> tuple[ITARFlowPipeline, str]:
        """The checkpoint on this process's device, and that device.

        Raises:
            ValueError: a device is named for several processes.
            OSError: there is no such checkpoint.
        """
        if self.device is not None and state.num_processes > 1:
            raise ValueError(
                f"--device is {self.device}, but {state.num_processes} processes take one each; leave it out."
            )
        device = str(state.device) if state.num_processes > 1 else usable_device(self.device)
        pipe = main_first(state, lambda: ITARFlowPipeline.from_pretrained(checkpoint)).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe, device

    def open_denoiser(self, pipe: ITARFlowPipeline, device: str) -> Denoiser | None:
        """What denoises instead of the checkpoint; None = itself."""
        if self.denoiser is None:
            return None
        return load_denoiser(
            self.denoiser, vae=pipe.vae, slice_size=self.denoise_batch_size, dtype=self.cleaning_dtype, device=device
        )

    @property
    def cleaning_dtype(self) -> torch.dtype | None:
        """Of a flow's layers in denoising; None = their own."""
        return torch.bfloat16 if self.denoise_dtype == "bf16" else None

    def inverting(self) -> dict[str, Any]:
        """What a `Generation` is told of the inverse."""
        return {
            "solver": sequential if self.exact else None,
            "inverse_dtype": torch.bfloat16 if self.inverse_dtype == "bf16" else None,
            "file_size": self.batch_size,
        }


def device_name(pipe: ITARFlowPipeline) -> str:
    """Where a pipeline computes, for people."""
    return torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else str(pipe.device)


def figure_text(figure: Figure) -> str:
    """A figure to four digits, with its spread if it has one."""
    return f"{figure.value:.4g}" + ("" if figure.std is None else f" ± {figure.std:.2g}")


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("itarflow", "torch", "diffusers", "torch-fidelity"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
