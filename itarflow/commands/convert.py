"""`itarflow convert`: official checkpoints to pipelines, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from itarflow.commands.console import say
from itarflow.convert import export_official, load_official
from itarflow.denoisers.ode import DenoiseScheduler
from itarflow.flow.tarflow import TARFlow
from itarflow.pipeline.folder import foreign_entries
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.presets import T_MAX, T_MIN, TARFLOW
from itarflow.runtime.files import check_writable, replace_folder


@dataclass(frozen=True)
class Convert:
    """Turn an official ml-tarflow or ml-itarflow checkpoint into a pipeline, or back by --to-official.

    Example: itarflow convert imagenet_model.pth imagenet64/ --t-max 0.3
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """An official .pth file; with --to-official a pipeline's folder or Hub id."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """The folder to write; with --to-official the .pth file."""
    to_official: bool = False
    """Write the official format from ours."""
    overwrite: bool = False
    """Replace the target if it exists."""
    in_channels: int = 3
    """Channels of the images, which the file does not record."""
    input_scale: float = 1.0
    """The official input_scale, which the file does not record."""
    t_max: float | None = None
    """Noise level at which to sample: the official t1, or TARFlow's noise_std. None = the paper's for the image
    size, else 0.3."""
    t_min: float | None = None
    """Smallest noise level for denoising: the official t0. None = the paper's 0.01, or less if t_max asks for it."""
    guidance_weight: float = 0.0
    """Default guidance weight, with the rule of the official code that made the checkpoint."""
    num_denoise_steps: int | None = None
    """Score evaluations by default. None = 10 for an iTARFlow, 1 for a TARFlow."""

    def run(self) -> None:
        """Carry the command out."""
        self._check()
        if self.to_official:
            flow = ITARFlowPipeline.from_pretrained(self.source).flow
            say(f"official checkpoint in {export_official(flow, self.target)}")
            return
        flow = load_official(Path(self.source), in_channels=self.in_channels, input_scale=self.input_scale)
        pipeline = self._pipeline(flow)
        if self.t_max is not None:  # an assumed level must not make the flow refuse others
            only_level = not flow.config.noise_conditioned and self.t_min is None
            low = self.t_max if only_level else pipeline.scheduler.config.t_min
            flow.register_to_config(noise_range=(low, self.t_max))
        replace_folder(self.target.absolute(), pipeline.save_pretrained)
        parameters = sum(parameter.numel() for parameter in flow.parameters())
        defaults, weight = pipeline.scheduler.config, pipeline.default_guidance.weight
        say(
            f"pipeline with {parameters:,} parameters in {self.target}/; it samples at t_max {defaults.t_max:g}, "
            f"guidance {weight:g}, and denoises in {defaults.num_denoise_steps} steps down to t_min "
            f"{defaults.t_min:g} unless a call overrides them. See `itarflow info {self.target}`."
        )

    def _check(self) -> None:
        """Refuse, before anything is read, a target that can't be written or that would be lost."""
        if not self.to_official and Path(self.source).is_dir():
            raise ValueError(
                f"{self.source} is a folder; expected an official .pth file. To write one from the pipeline in it, "
                "add --to-official."
            )
        holds = any(self.target.iterdir()) if self.target.is_dir() else self.target.exists()
        if self.target.is_dir() and self.to_official:
            raise ValueError(f"{self.target} is a folder; expected a file name ending in .pth.")
        others = foreign_entries(self.target) if self.target.is_dir() else []
        if others:
            raise ValueError(
                f"{self.target} is a folder with other things in it ({others[0]}); expected a new one or a pipeline's."
            )
        if self.target.is_file() and not self.to_official:
            raise ValueError(f"{self.target} is a file; expected a folder for the pipeline.")
        if holds and not self.overwrite:
            raise ValueError(f"{self.target} exists; add --overwrite to replace it, or choose another name.")
        check_writable(self.target.parent)

    def _pipeline(self, flow: TARFlow) -> ITARFlowPipeline:
        iterative, size = flow.config.noise_conditioned, flow.config.image_size
        of_paper = T_MAX if iterative else {row.image_size: row.noise_std for row in TARFLOW.values() if row.noise_std}
        t_max = self.t_max if self.t_max is not None else of_paper.get(size, 0.3)
        if self.t_max is None:
            Console().print(f"[yellow]t_max is not in the file; {t_max} is assumed. Say --t-max if it is another.")
        scheduler = DenoiseScheduler(
            t_max=t_max,
            t_min=self.t_min if self.t_min is not None else min(T_MIN, t_max / 2),
            num_denoise_steps=self.num_denoise_steps or (10 if iterative else 1),
        )
        guidance = {
            "weight": self.guidance_weight,
            "rule": "scale" if iterative else "log_scale",
            "schedule": "linear",
        }
        return ITARFlowPipeline(flow, scheduler, guidance=guidance, training={"name": Path(self.source).stem})
