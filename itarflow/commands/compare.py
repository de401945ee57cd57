"""`itarflow compare`: checkpoints and denoising variants, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.codec import CodecConfig, load_vae
from itarflow.commands.class_labels import check_seed, chosen_labels
from itarflow.commands.console import say
from itarflow.commands.guidance import OneGuidance
from itarflow.denoisers.diffusion import DiffusionDenoiser
from itarflow.denoisers.load import load_denoiser
from itarflow.evaluation.compare import Comparison, compare
from itarflow.pipeline.call import positive
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.pipeline.prompts import refuse_flow_of_prompts
from itarflow.runtime.devices import usable_device
from itarflow.runtime.files import check_writable
from itarflow.runtime.text import short_names


@dataclass(frozen=True)
class Compare(OneGuidance):
    """Make noisy images with several checkpoints, denoise them in every variant that applies, all side by side.

    Example: itarflow compare runs/tarflow/pipeline runs/itarflow/pipeline --data digits --output compare

    Each checkpoint generates once, from the same seeds and labels. Its noisy images are then denoised: by one step of
    its own (self), by its own ODE (own iterative), by those of the other noise-conditioned checkpoints (iterative), by
    diffusion models, and by decoders. What does not apply is left out.
    """

    checkpoints: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CHECKPOINT")]
    """Folders with pipelines, or Hugging Face Hub ids, of one image size, VAE and number of classes."""
    output: Path = Path("compare")
    """Folder for compare.png, compare.json, and a grid for each checkpoint and denoising variant."""
    diffusion: tuple[str, ...] = ()
    """Diffusion models in diffusers' format that denoise too: folders or Hub ids of a DiT or UNet with scheduler."""
    decoder: tuple[str, ...] = ()
    """VAEs fine-tuned to decode noisy codes: folders or Hub ids. Only for checkpoints that model a VAE's codes."""
    data: str | None = None
    """Real images whose residual noise is reported for comparison: as --data.path in training."""
    class_labels: tuple[str, ...] | None = None
    """Labels, by number or name; -1 = no label. None = every class in turn, or no labels if the models have none."""
    num_images: int = 16
    """How many images each checkpoint makes; labels are repeated in turn."""
    picture_rows: int = 2
    """How many of them compare.png shows."""
    seed: int = 0
    """Image number i depends on the seed, on i and on its label."""
    num_denoise_steps: int | None = None
    """Evaluations in each iterative column. None = the denoising checkpoint's; 10 for a diffusion model."""
    batch_size: int = 16
    """Images that are made, and denoised, at a time; lower it if memory runs out."""
    denoise_batch_size: int | None = None
    """Images that a denoiser sees at a time. None = as many as are made."""
    device: str | None = None
    """Such as cuda, cuda:1, mps or cpu. None = a GPU if there is one."""

    def run(self) -> None:
        """Carry the command out."""
        check_seed(self.seed)
        check_writable(self.output)
        device = usable_device(self.device)
        pipelines = {
            name: ITARFlowPipeline.from_pretrained(path).to(device)
            for name, path in zip(short_names(self.checkpoints), self.checkpoints, strict=True)
        }
        if not pipelines:
            raise ValueError("no checkpoint is named; expected folders such as runs/NAME/pipeline.")
        for pipe in pipelines.values():
            refuse_flow_of_prompts(pipe.flow, "compare")
            pipe.set_progress_bar_config(disable=True)
        diffusion = {}
        for name, path in zip(short_names(self.diffusion), self.diffusion, strict=True):
            slice_size = positive("denoise_batch_size", self.denoise_batch_size)
            denoiser = load_denoiser(path, slice_size=slice_size, device=device)
            if not isinstance(denoiser, DiffusionDenoiser):
                raise ValueError(
                    f"--diffusion {path} is a flow; name it as a CHECKPOINT, and it denoises the others' images too."
                )
            diffusion[name] = denoiser
        decoders = {
            name: load_vae(CodecConfig(vae=path)).to(device)
            for name, path in zip(short_names(self.decoder), self.decoder, strict=True)
        }
        comparison = compare(
            pipelines,
            chosen_labels(next(iter(pipelines.values())), self.class_labels, self.num_images),
            output=self.output,
            diffusion=diffusion,
            decoders=decoders,
            data=self.data,
            seed=self.seed,
            guidance=self.given_guidance(),
            num_denoise_steps=self.num_denoise_steps,
            batch_size=self.batch_size,
            denoise_batch_size=self.denoise_batch_size,
            picture_rows=self.picture_rows,
            console=Console(stderr=True),
        )
        Console().print(_comparison_table(comparison))
        for title, meaning in comparison.metrics.items():
            say(f"{title}: {meaning}.")
        say(f"images and figures in {self.output}/; see {self.output / 'compare.png'}")


def _comparison_table(comparison: Comparison) -> Table:
    """A row for each generator and method, a column for each metric."""
    table = Table(title="Images of each checkpoint in each denoising variant", title_justify="left")
    table.add_column("images of")
    table.add_column("denoised by")
    for title in comparison.metrics:
        table.add_column(escape(title), justify="right")
    before = None
    for result in comparison.results:
        if before not in (None, result.generator):
            table.add_section()
        values = (result.values[title] for title in comparison.metrics)
        figures = ("-" if value is None else f"{value:.4g}" for value in values)
        broken = f" ({result.broken} not finite)" if result.broken else ""
        table.add_row(escape(result.generator), escape(result.method) + broken, *figures)
        before = result.generator
    if comparison.real is not None:
        table.add_section()
        noise = comparison.real["residual noise"]
        others = [""] * (len(comparison.metrics) - 1)
        table.add_row(f"{comparison.real['images']} real images", "", f"{noise:.4g}", *others)
    return table
