"""Flows of one noise level beside a flow of a range: trained alike, sampled alike, cleaned in one to many steps.

The folder of a study has a run for each flow, samples/FLOW with its samples in each way of cleaning and their figures,
bpd/FLOW with its likelihoods, and what comes out: study.json, distances.png, samples.png. Whatever is there is not
made again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor

from itarflow.codec import PixelCodec, to_pil, to_pixels
from itarflow.data.load import load_data
from itarflow.denoisers.score import FlowDenoiser
from itarflow.evaluation.evaluate import make_samples, scores_of
from itarflow.evaluation.likelihood.bpd import BpdConfig, measure
from itarflow.evaluation.metrics.extractors import Extractor, load_extractor
from itarflow.evaluation.metrics.reference import Reference, reference_of
from itarflow.evaluation.samples.denoising import Column
from itarflow.evaluation.samples.files import open_samples, shard_name, write_shard
from itarflow.evaluation.samples.generate import MANIFEST, Generation, labels_by
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import check_writable, write_json
from itarflow.runtime.pictures import blank_figure, draw_pictures
from itarflow.runtime.text import display_name
from itarflow.training.recipe import Recipe
from itarflow.training.run_folder import RunDir
from itarflow.training.settings import differences, to_json
from itarflow.training.train import train

RAW, SELF, REAL = "raw", "self", "real images"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained, made and measured."""

    recipe: Recipe
    """Of the flow of a range of levels, an iTARFlow; that of a TARFlow differs only in its noise."""
    single_levels: tuple[float, ...]
    """Noise levels of the TARFlows."""
    num_samples: int
    """Images of each flow."""
    reference_split: str = "train"
    """Images that the samples are compared with."""
    extractor: str = "inception-v3-compat"
    """Network whose features are compared."""
    num_denoise_steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Score evaluations of the iTARFlow that clean the images of each flow."""
    likelihood_images: int = 500
    """Held-out images whose likelihood is measured; as many real images are scored as samples."""
    batch_size: int = 50
    """Images that are made at a time."""
    seed: int = 0
    """Of samples and likelihoods; trainings have the recipe's."""

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The trainings, by name: the TARFlows, then the iTARFlow."""
        singles = [self._single(level) for level in self.single_levels]
        return {recipe.name: recipe for recipe in (*singles, self.recipe)}

    def _single(self, level: float) -> Recipe:
        return replace(
            self.recipe,
            name=f"tarflow-{level:g}",
            model=replace(self.recipe.model, noise_conditioned=False),
            noise=replace(self.recipe.noise, t_min=level, t_max=level, distribution="constant"),
            sampling=replace(self.recipe.sampling, num_denoise_steps=1),
        )

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise levels at which likelihoods are compared: those of the TARFlows that the iTARFlow knows too."""
        low, high = self.recipe.noise.t_min, self.recipe.noise.t_max
        return tuple(level for level in self.single_levels if low <= level <= high)


def run_study(
    study: Study, folder: Path, *, device: str, features: Path | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Carry a study out, or go on with it, in one process.

    Args:
        study: what to do.
        folder: of the study; made if needed.
        device: for all but the training, which goes by the launcher.
        features: file with the extractor's weights, if they are not downloaded.
        console: where the main process draws bars; None = nowhere.

    Returns:
        What study.json holds.

    Raises:
        ImportError, OSError, ValueError: something is missing or does not fit; as far as can be known, before work.
        RunError, TrainingError, Interrupted: as `train.train`; the same call goes on.
    """
    state = PartialState()
    if state.num_processes > 1:
        raise ValueError(
            f"a study runs in one process, but {state.num_processes} were started; leave the launcher out. To share a "
            "training, launch the recipe of one flow."
        )
    if study.recipe.data.held_out_split is None:
        raise ValueError("data.held_out_split is None; a study measures on real images that are not trained on.")
    blank_figure(1, 1)  # refuses now, if matplotlib is missing
    check_writable(folder)
    for recipe in study.recipes.values():
        recipe.check(state.num_processes)
    start = time.monotonic()
    extractor = load_extractor(study.extractor, features, device)
    real = folder / "samples" / "real" / RAW
    _write_real(study, real)
    reference = _reference(study, extractor, state, console)
    for name, recipe in study.recipes.items():
        _train(recipe, RunDir(folder / name))
    pipes = {name: _open(folder / name / "pipeline", device) for name in study.recipes}
    generations = {name: _generation(study, pipe, pipes[study.recipe.name]) for name, pipe in pipes.items()}
    for generation in generations.values():
        generation.check()
    ways = {(name, way): folder / "samples" / name / way for name, one in generations.items() for way in one.columns}
    for name, generation in generations.items():
        make_samples(generation, folder / "samples" / name, state, console)
    found, _ = scores_of([real, *ways.values()], reference, extractor, state, device=device, console=console)
    scores: dict[str, dict[str, Any]] = {name: {} for name in generations}
    for (name, way), one in zip(ways, found[1:], strict=True):
        scores[name][way] = one.to_json()
    likelihoods = {name: _likelihoods(study, name, folder, device, console) for name in study.recipes}
    report = _report(study, pipes, scores, found[0].to_json(), likelihoods, device, time.monotonic() - start)
    if state.is_main_process:
        write_json(folder / "study.json", report)
        draw_distances(report, folder / "distances.png")
        _draw_samples(generations, folder)
    return report


# -- the parts --------------------------------------------------------------------------------------------------


def _reference(study: Study, extractor: Extractor, state: PartialState, console: Console | None) -> Reference:
    """Statistics of real images, as large as those that the flows make."""
    model, data = study.recipe.model, replace(study.recipe.data, split=study.reference_split)
    return reference_of(
        data,
        image_size=model.image_size,
        in_channels=model.in_channels,
        extractor=extractor,
        accelerator=state,
        console=console,
    )


def _train(recipe: Recipe, run: RunDir) -> None:
    """Train, or go on with a training; one that has ended leaves a mark, and needs nothing but its pipeline then."""
    mark = run.path / "finished.json"
    if mark.exists() and run.pipeline.exists() and not differences(json.loads(mark.read_text()), recipe):
        return
    train(recipe, run.path, start="resume" if run.recipe.exists() else "fresh")
    write_json(mark, to_json(recipe))


def _open(path: Path, device: str) -> ITARFlowPipeline:
    pipe = ITARFlowPipeline.from_pretrained(path).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _generation(study: Study, pipe: ITARFlowPipeline, iterative: ITARFlowPipeline) -> Generation:
    """Samples of a flow at its t_max: noisy, after one step of its own, and after some of the iTARFlow's."""
    codec, denoiser = PixelCodec(), FlowDenoiser(iterative.flow, study.batch_size)
    columns = {RAW: Column("noisy", codec)}
    if pipe is not iterative:  # whose own single step is one of those below
        own = FlowDenoiser(pipe.flow, study.batch_size)
        columns[SELF] = Column("self", codec, own, pipe.schedule(num_denoise_steps=1))
    low = study.recipe.noise.t_min
    for steps in study.num_denoise_steps:
        schedule = pipe.schedule(t_min=low, num_denoise_steps=steps, denoiser=denoiser)
        columns[f"{steps:02d}"] = Column(f"{steps} steps", codec, denoiser, schedule)
    return Generation(
        pipe=pipe,
        columns=columns,
        labels=labels_by("balanced", study.num_samples, pipe.flow.config.num_classes),
        seed=study.seed,
        file_size=study.batch_size,
    )


def _write_real(study: Study, folder: Path) -> None:
    """Held-out real images beside the samples, as many if there are so many: how near real images come.

    Raises:
        DataError: they can't be read, or there are fewer than their likelihood is to be measured of.
    """
    size = study.recipe.model.image_size
    data = replace(study.recipe.data, held_out_images=0, in_memory=False)  # all of the split
    dataset = load_data(data, image_size=size, in_channels=study.recipe.model.in_channels).held_out
    if len(dataset) < study.likelihood_images:
        raise DataError(
            f"split {data.held_out_split} of {data.path} has {len(dataset)} images, but likelihood_images is "
            f"{study.likelihood_images}; expected at least that many."
        )
    count = min(study.num_samples, len(dataset))
    made = {"images": dataset.fingerprint(), "count": count, "crop": data.crop, "size": size, "cleaning": {RAW: {}}}
    manifest = folder.parent / MANIFEST
    if manifest.exists() and json.loads(manifest.read_text()) == made:
        return
    shutil.rmtree(folder, ignore_errors=True)
    examples = [dataset[index] for index in range(count)]
    unreadable = [example.broken for example in examples if example.broken]
    if unreadable:
        raise DataError(f"{len(unreadable)} held-out images can't be read; the first: {unreadable[0]}")
    images, labels = torch.stack([one.image for one in examples]), torch.tensor([one.label for one in examples])
    write_shard(folder / shard_name(0, count), images, labels, torch.zeros(count, dtype=torch.bool))
    write_json(manifest, made)


def _likelihoods(study: Study, name: str, folder: Path, device: str, console: Console | None) -> list[dict[str, Any]]:
    """nats/dim and bits/dim of held-out images, at the levels that a flow knows."""
    recipe = study.recipes[name]
    config = BpdConfig(
        checkpoint=str(folder / name / "pipeline"),
        data=str(recipe.data.path),
        name=recipe.data.name,
        split=str(recipe.data.held_out_split),
        num_images=study.likelihood_images,
        crop=recipe.data.crop,
        noise="gaussian",
        noise_levels=study.levels if recipe.model.noise_conditioned else (recipe.noise.t_max,),
        seed=study.seed,
        num_workers=0,
        output=folder / "bpd" / name,
        device=device,
    )
    report = measure(config, console=console)
    return [] if report is None else [figures.to_json() for figures in report.figures]


# -- what comes out ---------------------------------------------------------------------------------------------


def _report(
    study: Study,
    pipes: Mapping[str, ITARFlowPipeline],
    scores: Mapping[str, Mapping[str, Any]],
    real: Mapping[str, Any],
    likelihoods: Mapping[str, Any],
    device: str,
    seconds: float,
) -> dict[str, Any]:
    """Plain values, free of the machine's paths."""
    recipe = to_json(study.recipe)
    recipe["data"]["path"] = display_name(str(study.recipe.data.path))
    training = {name: pipe.config.training for name, pipe in pipes.items()}
    facts = ("steps", "total_steps", "seconds", "train_images", "bad_steps", "metrics")
    return {
        "flows": {
            name: {
                "t_max": study.recipes[name].noise.t_max,
                "parameters": sum(parameter.numel() for parameter in pipes[name].flow.parameters()),
                "training": {fact: record[fact] for fact in facts},
                "scores": scores[name],
                "likelihood": likelihoods[name],
            }
            for name, record in training.items()
        },
        REAL: real,
        "settings": {
            "seed": study.seed,
            "num_samples": study.num_samples,
            "reference_split": study.reference_split,
            "num_denoise_steps": list(study.num_denoise_steps),
            "likelihood_images": study.likelihood_images,
            "recipe": recipe,
        },
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": {"training": sum(record["seconds"] for record in training.values()), "this call": seconds},
    }


def distance_of(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The Fréchet distance among some scores, as {"title", "value", ...}; FID if it may be called so."""
    figures = scores["figures"]
    return figures.get("fid") or figures["frechet_distance"]


def draw_distances(report: Mapping[str, Any], path: Path) -> None:
    """Distance over the number of steps, a line for each flow; its own single step hollow, real images dashed."""
    figure = blank_figure(6.4, 4.2)
    axis = figure.subplots()
    title = ""
    for number, (name, flow) in enumerate(report["flows"].items()):
        steps = [way for way in flow["scores"] if way.isdigit()]
        values = [distance_of(flow["scores"][way]) for way in steps]
        title = values[0]["title"]
        axis.plot(list(map(int, steps)), [one["value"] for one in values], "o-", color=f"C{number}", label=name)
        if SELF in flow["scores"]:
            own = distance_of(flow["scores"][SELF])["value"]
            axis.plot(1, own, "o", color=f"C{number}", markersize=10, fillstyle="none")
    axis.axhline(distance_of(report[REAL])["value"], color="grey", linestyle="--", linewidth=1, label=REAL)
    axis.set_ylim(bottom=0)
    axis.set_xscale("log")
    ticks = report["settings"]["num_denoise_steps"]
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()
    axis.set_xlabel("score evaluations of the iTARFlow (ring: one of the flow's own)")
    axis.set_ylabel(f"{title}, {report['settings']['num_samples']:,} samples")
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_samples(generations: Mapping[str, Generation], folder: Path, rows: int = 2) -> None:
    """The same first samples of each flow, in each way of cleaning."""
    pictures = {}
    for name, generation in generations.items():
        for way, column in generation.columns.items():
            images: Tensor = open_samples(folder / "samples" / name / way).read(0, rows)
            pictures[name, column.title] = to_pil(to_pixels(images))
    titles = list(dict.fromkeys(column.title for one in generations.values() for column in one.columns.values()))
    draw_pictures(pictures, titles, folder / "samples.png")
