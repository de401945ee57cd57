"""A recipe that trains in no time, and what its runs leave."""

import dataclasses
import json
from contextlib import ExitStack

from safetensors.torch import load_file

from itarflow.data import DataConfig
from itarflow.flow import NoiseConfig
from itarflow.inverse import Guidance
from itarflow.presets import ModelConfig
from itarflow.training import Recipe, SamplingConfig, TrainConfig
from itarflow.training.run_folder import RunDir, claim


def tiny_recipe(**changes):
    """A few digits with a model that trains in no time; `changes` are fields of its sections, such as epochs=1.

    As most of that time is the decoding of images, 342 of them are seen ten times, in 27 steps of 128.
    """
    recipe = Recipe(
        name="tiny",
        model=ModelConfig(
            image_size=8, in_channels=1, num_classes=10, patch_size=4, channels=16, num_layers=(1, 1), head_dim=16
        ),
        data=DataConfig(
            path="digits", split="train[:380]", horizontal_flip=True, in_memory=True, held_out_images=100
        ),
        noise=NoiseConfig(t_min=0.02, t_max=0.5),
        train=TrainConfig(
            epochs=10, batch_size=128, learning_rate=1e-2, warmup_epochs=2.5, ema_decay=0.9, log_every=1,
            evaluate_every_epochs=5, sample_every_epochs=5, save_every=7, trackers=(),
        ),
        sampling=SamplingConfig(guidance=Guidance(weight=1.0), num_denoise_steps=2, num_images=10, batch_size=10),
    )  # fmt: skip
    sections = {"model": {}, "data": {}, "noise": {}, "train": {}, "sampling": {}}
    for name, value in changes.items():
        section = next(s for s in sections if name in {f.name for f in dataclasses.fields(getattr(recipe, s))})
        sections[section][name] = value
    return dataclasses.replace(
        recipe, **{s: dataclasses.replace(getattr(recipe, s), **values) for s, values in sections.items()}
    )


def claimed_run(path, recipe, start):
    """A run's folder as a training finds it that was killed just after it had claimed it."""
    with ExitStack() as locks:
        claim(RunDir(path), recipe, start, False, locks)
    return RunDir(path)


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def shared_weights(run_dir):
    return load_file(run_dir / "pipeline" / "flow" / "diffusion_pytorch_model.safetensors")
