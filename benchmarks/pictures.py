"""The pictures of the README, from a trained digits pipeline.

python benchmarks/pictures.py --pipeline runs/digits/pipeline --output assets
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from itarflow import DenoiseScheduler, FlowDenoiser, ITARFlowPipeline, denoise
from itarflow.codec import to_pil
from itarflow.runtime.pictures import image_grid


@dataclass
class Options:
    """Draw them."""

    pipeline: Path = Path("runs/digits/pipeline")
    """The pipeline."""
    output: Path = Path("assets")
    """Folder for the pictures."""


def main(options: Options) -> None:
    """Write digits.png, ten images of each class in columns, and phases.png, one stage of sampling a row."""
    pipe = ITARFlowPipeline.from_pretrained(options.pipeline)
    options.output.mkdir(parents=True, exist_ok=True)
    images = pipe(class_labels=list(range(10)) * 10, generator=torch.Generator().manual_seed(0)).images
    image_grid(images, columns=10).save(options.output / "digits.png")

    flow, settings, labels = pipe.flow, pipe.scheduler.config, torch.arange(10)
    z = flow.sample_prior(10, torch.Generator().manual_seed(1))
    path = flow.inverse(z, labels, settings.t_max, guidance=pipe.default_guidance, return_trajectory=True)
    clean = denoise(
        FlowDenoiser(flow),
        path[-1],
        labels,
        DenoiseScheduler(t_max=settings.t_max, t_min=settings.t_min, num_denoise_steps=10),
    )
    stages = [to_pil(stage) for stage in (*path, clean)]
    image_grid([image for stage in stages for image in stage], columns=10).save(options.output / "phases.png")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
