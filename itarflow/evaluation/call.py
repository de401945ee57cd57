"""An evaluation as a function, in one process; `itarflow evaluate` is the same for many, with files and a report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from itarflow.data.load import DataConfig
from itarflow.denoisers.ode import Method, Spacing
from itarflow.denoisers.score import Denoiser
from itarflow.evaluation.conversion import Protocol
from itarflow.evaluation.metrics.extractors import INCEPTION, Extractor, load_extractor
from itarflow.evaluation.metrics.scores import Scores
from itarflow.evaluation.real_images import crop_for, reference_for
from itarflow.evaluation.samples.denoising import VariantName, variants_of
from itarflow.evaluation.samples.generate import Generation, LabelRule, labels_by
from itarflow.evaluation.samples.prompts import SamplePrompts
from itarflow.evaluation.scoring import save_samples, scores_of
from itarflow.inverse.guidance import Guidance
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.launch import joined


def evaluate(
    pipe: ITARFlowPipeline,
    data: str | Path | DataConfig,
    *,
    num_samples: int = 50_000,
    guidance: Guidance | None = None,
    t_max: float | None = None,
    num_denoise_steps: int | None = None,
    method: Method | None = None,
    spacing: Spacing | None = None,
    denoiser: Denoiser | None = None,
    ways: Sequence[VariantName] | None = None,
    labels: LabelRule = "balanced",
    prompts: Sequence[str] = (),
    seed: int = 0,
    extractor: str | Extractor = INCEPTION,
    protocol: Protocol = "rounded",
    batch_size: int = 64,
    output: Path | None = None,
    cache: Path | None = None,
    console: Console | None = None,
) -> dict[str, Scores]:
    """Make samples of a pipeline, and compare them with real images: FID and others.

    Figures are those of `itarflow evaluate` with the same settings.

    Args:
        pipe: on its device.
        data: real images: anything that `DataConfig.path` takes, whose split "train" is used, cropped as in the
            checkpoint's training; or a `DataConfig`.
        num_samples: how many; 50,000 in papers. With fewer, FID is higher.
        guidance: None = the checkpoint's; without labels its weight plays no part.
        t_max: noise level of the flow's samples; None = the checkpoint's.
        num_denoise_steps: score evaluations of the iterative variant; None = the checkpoint's.
        method: solver of denoising; None = the checkpoint's.
        spacing: of the noise levels; None = the checkpoint's.
        denoiser: of the iterative variant; None = the flow itself.
        ways: denoising variants; None = all that the checkpoint has.
        labels: balanced, random, or none.
        prompts: of a checkpoint that takes prompts: the samples take them in turn.
        seed: of the noise and of random labels.
        extractor: whose features are compared, or its name; only Inception's distances are FID.
        protocol: how pixels become 8-bit, see `conversion.PROTOCOLS`.
        batch_size: images that are made at a time.
        output: folder for samples and scores, which a later call with the same settings goes on with; None = nothing
            is kept.
        cache: folder for statistics of real images; None = `reference.statistics_folder()`.
        console: where to show progress; None = nowhere.

    Returns:
        The scores by variant: raw, self, iterative. `found["iterative"].figures["fid"].value` is a number.

    Raises:
        ValueError: settings out of range, or a crop other than that of the checkpoint's training; raised before
            anything is made.
        DataError: the images have another number of classes than the checkpoint.
        RunError: the data can't be used, or the folder holds other things.

    Example:
        >>> from itarflow.evaluation import evaluate
        >>> found = evaluate(pipe, "uoft-cs/cifar10", num_samples=5000)  # doctest: +SKIP
        >>> found["iterative"].figures["fid"].value  # doctest: +SKIP
        12.3
    """
    state = joined()
    schedule = pipe.schedule(t_max, None, num_denoise_steps, method, spacing, denoiser=denoiser)
    guided = pipe.takes_prompts or (labels != "none" and pipe.flow.config.num_classes > 0)
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}; expected 2 or more, since there is no covariance of one.")
    generation = Generation(
        pipe=pipe,
        variants=variants_of(pipe, schedule, ways, denoiser=denoiser),
        labels=labels_by(labels, num_samples, pipe.flow.config.num_classes, seed),
        seed=seed,
        guidance=guidance or (pipe.default_guidance if guided else None),
        t_max=schedule.config.t_max,
        batch_size=batch_size,
        protocol=protocol,
        prompts=SamplePrompts(prompts),
    )
    generation.check()
    images = (
        data if isinstance(data, DataConfig) else DataConfig(path=str(data), crop=crop_for(pipe), held_out_images=0)
    )
    crop_for(pipe, images.crop)  # refused now, not after a download
    network = load_extractor(extractor, device=pipe.device) if isinstance(extractor, str) else extractor
    reference = reference_for(
        pipe, images, extractor=network, accelerator=state, cache=cache, console=console, protocol=protocol
    )
    with ExitStack() as kept:
        folder = output or Path(kept.enter_context(TemporaryDirectory(prefix="itarflow-")), "evaluation")
        save_samples({folder: generation}, state, console)
        folders = [folder / name for name in generation.variants]
        scores, _ = scores_of(folders, reference, network, state, device=pipe.device, console=console)
    return dict(zip(generation.variants, scores, strict=True))
