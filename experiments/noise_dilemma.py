"""The noise dilemma, measured: TARFlows of one noise level beside an iTARFlow of a range, on CIFAR-10.

A TARFlow adds noise of one level in training and removes it by one step: with little noise its images lack global
structure, with much they are blurred. An iTARFlow knows a range of levels and removes noise in several steps, its own
or a TARFlow's. Four flows are trained alike (TARFlow at 0.05, 0.1 and 0.3, iTARFlow on [0.01, 0.3]); each generates
from the same noise and labels, and its images are denoised by one step of its own and by 1, 2, 5, 10 and 20 of the
iTARFlow's. The same command goes on after an interruption:

    python experiments/noise_dilemma.py --scale cpu          # about an hour on two cores
    python experiments/noise_dilemma.py --scale gpu          # a larger model, for one GPU
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import PartialState
from diffusers.utils.logging import disable_progress_bar
from rich.console import Console

from itarflow.codec import PixelCodec, to_pil, to_pixels
from itarflow.commands.console import reporting
from itarflow.data import DataConfig, load_data
from itarflow.denoisers import FlowDenoiser
from itarflow.evaluation.likelihood.bpd import BpdConfig, measure_bpd
from itarflow.evaluation.metrics.extractors import load_extractor
from itarflow.evaluation.metrics.reference import reference_of
from itarflow.evaluation.samples.denoising import Denoising, variants_of
from itarflow.evaluation.samples.files import open_samples, shard_name, write_shard
from itarflow.evaluation.samples.generate import Generation, labels_by
from itarflow.evaluation.samples.manifest import MANIFEST, origin_digest
from itarflow.evaluation.scoring import save_samples, scores_of
from itarflow.flow import NoiseConfig
from itarflow.inverse import Guidance
from itarflow.pipeline import ITARFlowPipeline
from itarflow.presets import ModelConfig
from itarflow.runtime.devices import usable_device
from itarflow.runtime.errors import DataError
from itarflow.runtime.files import write_json
from itarflow.runtime.pictures import blank_figure, draw_comparison
from itarflow.runtime.text import display_name
from itarflow.training import Recipe, SamplingConfig, TrainConfig
from itarflow.training.run_folder import RunDir
from itarflow.training.settings import differences, to_json
from itarflow.training.train import train


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained, made and measured; `recipe` is the iTARFlow's, `levels` are the TARFlows'."""

    recipe: Recipe
    num_samples: int
    levels: tuple[float, ...] = (0.05, 0.1, 0.3)
    reference_split: str = "train"
    extractor: str = "inception-v3-compat"
    num_denoise_steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    likelihood_images: int = 500
    batch_size: int = 50
    seed: int = 0

    @property
    def recipes(self) -> dict[str, Recipe]:
        """By name: those of the TARFlows, which differ from the iTARFlow's in their noise alone, and that one."""
        recipe, found = self.recipe, {}
        for level in self.levels:
            found[f"tarflow-{level:g}"] = replace(
                recipe,
                name=f"tarflow-{level:g}",
                model=replace(recipe.model, noise_conditioned=False),
                noise=replace(recipe.noise, t_min=level, t_max=level, distribution="constant"),
                sampling=replace(recipe.sampling, num_denoise_steps=1),
            )
        return {**found, recipe.name: recipe}


def recipe(patch_size: int, channels: int, last_layers: int, num_images: int, **settings: Any) -> Recipe:
    """A small iTARFlow of CIFAR-10."""
    layers = (1, 1, 1, last_layers)
    model = ModelConfig(image_size=32, num_classes=10, patch_size=patch_size, channels=channels, num_layers=layers)
    return Recipe(
        name="itarflow",
        model=model,
        data=DataConfig(path="uoft-cs/cifar10", held_out_split="test"),
        noise=NoiseConfig(t_min=0.01, t_max=0.3),
        train=TrainConfig(max_grad_norm=1.0, mixed_precision="bf16", **settings),
        sampling=SamplingConfig(guidance=Guidance(weight=1.0, blocks=1), num_images=num_images),
    )


cpu = recipe(4, 192, 4, 40, epochs=1.5, batch_size=64, learning_rate=1e-3, min_learning_rate=1e-5, warmup_epochs=0.1,
             ema_decay=0.99, evaluate_every_epochs=1, sample_every_epochs=1, save_every=200)  # fmt: skip
# Weights of four such models, in bfloat16, are 64 MB.
gpu = recipe(2, 256, 6, 100, epochs=30, batch_size=256, learning_rate=7e-4, min_learning_rate=1e-6, warmup_epochs=1,
             ema_decay=0.999, evaluate_every_epochs=10, sample_every_epochs=10, save_every=500)  # fmt: skip
scales = {
    # Distances by a small network that needs no download; they are no FID.
    "cpu": Study(recipe=cpu, num_samples=1000, reference_split="train[:5000]", extractor="efficientnet-lite0"),
    "gpu": Study(recipe=gpu, num_samples=10_000, likelihood_images=2000, batch_size=500),
}


def run(study: Study, folder: Path, device: str, features: Path | None = None) -> dict[str, Any]:
    """Carry a study out in one process, or go on with it; returns what study.json holds."""
    start, state, console, recipes = time.monotonic(), PartialState(), Console(stderr=True), study.recipes
    if state.num_processes > 1:
        raise ValueError(f"the study runs in one process, not in {state.num_processes}; leave the launcher out.")
    if study.num_samples < 2:
        raise ValueError(f"--num-samples is {study.num_samples}; expected 2 or more.")
    blank_figure(1, 1)  # refuses now, if matplotlib is missing
    extractor = load_extractor(study.extractor, features, device)
    model, data = study.recipe.model, study.recipe.data
    shape = {"image_size": model.image_size, "in_channels": model.in_channels}
    real = real_samples(study, folder / "samples" / "real", shape)
    of = replace(data, split=study.reference_split)
    reference = reference_of(of, **shape, extractor=extractor, accelerator=state, console=console)

    pipes = {}
    for name, wanted in recipes.items():
        path, mark = RunDir(folder / name), folder / name / "finished.json"
        if not mark.exists() or differences(json.loads(mark.read_text()), wanted):
            train(wanted, path.path, start="resume" if path.recipe.exists() else "fresh")
            write_json(mark, to_json(wanted))
        pipes[name] = ITARFlowPipeline.from_pretrained(path.pipeline).to(device)
        pipes[name].set_progress_bar_config(disable=True)

    made = {folder / "samples" / name: generation(study, pipe, pipes["itarflow"]) for name, pipe in pipes.items()}
    for one in made.values():
        one.check()
    save_samples(made, state, console)
    samples = {(path.name, way): path / way for path, one in made.items() for way in one.variants}
    found, _ = scores_of([real, *samples.values()], reference, extractor, state, device=device, console=console)
    scores = dict(zip(samples, (one.to_json() for one in found[1:]), strict=True))

    plain = to_json(study.recipe)
    plain["data"]["path"] = display_name(str(data.path))
    settings = ("seed", "num_samples", "reference_split", "num_denoise_steps", "likelihood_images")
    facts = ("steps", "total_steps", "seconds", "train_images", "bad_steps", "metrics")
    training = {name: {fact: pipe.config.training[fact] for fact in facts} for name, pipe in pipes.items()}
    report = {
        "flows": {
            name: {
                "t_max": recipes[name].noise.t_max,
                "parameters": pipe.flow.num_parameters(),
                "training": training[name],
                "scores": {way: one for (flow, way), one in scores.items() if flow == name},
                "likelihood": likelihoods(study, recipes[name], folder, device, console),
            }
            for name, pipe in pipes.items()
        },
        "real images": found[0].to_json(),
        "settings": {name: getattr(study, name) for name in settings} | {"recipe": plain},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    seconds = {"training": sum(one["seconds"] for one in training.values()), "this call": time.monotonic() - start}
    report["seconds"] = seconds
    write_json(folder / "study.json", report)
    draw_distances(report, folder / "distances.png")
    pictures, titles = {}, {variant.title: None for one in made.values() for variant in one.variants.values()}
    for path, one in made.items():
        for way, variant in one.variants.items():
            pictures[path.name, variant.title] = to_pil(to_pixels(open_samples(path / way).read(0, 2)))
    draw_comparison(pictures, list(titles), folder / "samples.png")
    return report


def real_samples(study: Study, folder: Path, shape: dict[str, int]) -> Path:
    """Held-out real images as if they were samples, as many if there are so many: how near real images come."""
    data = replace(study.recipe.data, held_out_images=0, in_memory=False)  # all of the split
    images = load_data(data, **shape).held_out
    if len(images) < study.likelihood_images:
        raise DataError(
            f"split {data.held_out_split} of {data.path} has {len(images)} images, but likelihood_images is "
            f"{study.likelihood_images}; expected at least that many."
        )
    count = min(study.num_samples, len(images))
    made = {"images": images.fingerprint(), "num_samples": count, "crop": data.crop, "size": shape["image_size"]}
    made["cleaning"] = {"raw": {}}
    manifest = folder / MANIFEST
    if not manifest.exists() or json.loads(manifest.read_text()) != made:
        shutil.rmtree(folder, ignore_errors=True)
        examples = [images[index] for index in range(count)]
        pixels, labels = torch.stack([one.image for one in examples]), torch.tensor([one.label for one in examples])
        broken = torch.tensor([bool(one.broken) for one in examples])
        write_shard(folder / "raw" / shard_name(0, count), pixels, labels, broken, origin_digest(made, "raw"))
        write_json(manifest, made)
    return folder / "raw"


def generation(study: Study, pipe: ITARFlowPipeline, iterative: ITARFlowPipeline) -> Generation:
    """Samples of a flow at its t_max: noisy, after one step of its own, and after some of the iTARFlow's."""
    denoiser = FlowDenoiser(iterative.flow, study.batch_size)
    # The iTARFlow's own single step is one of those below.
    variants = variants_of(pipe, pipe.schedule(), ("raw",) if pipe is iterative else ("raw", "self"))
    for steps in study.num_denoise_steps:
        schedule = pipe.schedule(t_min=study.recipe.noise.t_min, num_denoise_steps=steps, denoiser=denoiser)
        variants[f"{steps:02d}"] = Denoising(f"{steps} steps", PixelCodec(), denoiser, schedule)
    labels = labels_by("balanced", study.num_samples, pipe.flow.config.num_classes)
    return Generation(pipe=pipe, variants=variants, labels=labels, seed=study.seed, batch_size=study.batch_size)


def likelihoods(study: Study, recipe: Recipe, folder: Path, device: str, console: Console) -> list[dict[str, Any]]:
    """nats/dim and bits/dim of held-out images, at the noise levels of the TARFlows that the flow knows."""
    data, noise = recipe.data, recipe.noise
    config = BpdConfig(
        checkpoint=str(folder / recipe.name / "pipeline"),
        data=str(data.path),
        name=data.name,
        split=str(data.held_out_split),
        num_images=study.likelihood_images,
        crop=data.crop,
        noise="gaussian",
        noise_levels=tuple(level for level in study.levels if noise.t_min <= level <= noise.t_max),
        seed=study.seed,
        num_workers=0,
        output=folder / "bpd" / recipe.name,
        device=device,
    )
    return [figures.to_json() for figures in measure_bpd(config, console=console).figures]


def distance_of(scores: dict[str, Any]) -> dict[str, Any]:
    """The Fréchet distance among some scores, as {"title", "value", ...}; FID if it may be called so."""
    return scores["figures"].get("fid") or scores["figures"]["frechet_distance"]


def draw_distances(report: dict[str, Any], path: Path) -> None:
    """Distance over the number of steps, a line for each flow; its own single step hollow, real images dashed."""
    figure = blank_figure(6.4, 4.2)
    axis, ticks, real = figure.subplots(), report["settings"]["num_denoise_steps"], distance_of(report["real images"])
    for number, (name, flow) in enumerate(report["flows"].items()):
        values = {way: distance_of(scores)["value"] for way, scores in flow["scores"].items()}
        axis.plot(ticks, [values[f"{steps:02d}"] for steps in ticks], "o-", color=f"C{number}", label=name)
        if "self" in values:
            axis.plot(1, values["self"], "o", color=f"C{number}", markersize=10, fillstyle="none")
    axis.axhline(real["value"], color="grey", linestyle="--", linewidth=1, label="real images")
    axis.set_ylim(bottom=0)
    axis.set_xscale("log")
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()
    axis.set_xlabel("score evaluations of the iTARFlow (ring: one of the flow's own)")
    axis.set_ylabel(f"{real['title']}, {report['settings']['num_samples']:,} samples")
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def print_table(report: dict[str, Any]) -> None:
    """A row for each flow, a column for each way of denoising, and its likelihood."""
    real, ways = distance_of(report["real images"]), ["raw", "self"]
    ways += [f"{steps:02d}" for steps in report["settings"]["num_denoise_steps"]]
    print(
        f"{real['title']} of {report['settings']['num_samples']:,} samples; as many real images: {real['value']:.4g}"
    )
    print(f"{'flow':12}", *(f"{way.lstrip('0'):>7}" for way in ways), "  nats/dim")
    for name, flow in report["flows"].items():
        values = [f"{distance_of(flow['scores'][way])['value']:7.4g}" if way in flow["scores"] else f"{'-':>7}"
                  for way in ways]  # fmt: skip
        nats = ", ".join(f"{one['nats/dim']['mean']:.3f} at {one['noise_level']:g}" for one in flow["likelihood"])
        print(f"{name:12}", *values, " ", nats)


def main(
    scale: str = "cpu",
    data: str | None = None,
    output: Path | None = None,
    extractor: str | None = None,
    features: Path | None = None,
    num_samples: int | None = None,
    device: str | None = None,
) -> None:
    """Carry the study out.

    Args:
        scale: the study's size: cpu or gpu.
        data: where the images are, as --data.path of a recipe. None = CIFAR-10 on the Hub.
        output: folder of the study; the same command goes on in it. None = runs/study_noise_dilemma-SCALE.
        extractor: network whose features are compared: inception-v3-compat (its distance is FID), or
            efficientnet-lite0, which needs no download. None = as the scale says.
        features: file with the extractor's weights, for machines that can't download them.
        num_samples: images of each flow. None = as the scale says.
        device: for samples and figures; the training goes by the launcher. None = a GPU if there is one.
    """
    if scale not in scales:
        raise ValueError(f"--scale is {scale!r}; expected one of {', '.join(scales)}.")
    study = scales[scale]
    path = data or study.recipe.data.path
    study = replace(
        study,
        recipe=replace(study.recipe, data=replace(study.recipe.data, path=path)),
        num_samples=study.num_samples if num_samples is None else num_samples,
        extractor=extractor or study.extractor,
    )
    folder = output or Path("runs") / f"study_noise_dilemma-{scale}"
    print_table(run(study, folder, usable_device(device), features))
    print(f"see {folder / 'study.json'}, {folder / 'distances.png'} and {folder / 'samples.png'}")


if __name__ == "__main__":
    disable_progress_bar()  # diffusers' own, for the loading of files
    with reporting(Console(), "Try --scale cpu, or a smaller batch_size in this file."):
        tyro.cli(main, description=__doc__)
