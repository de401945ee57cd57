"""What tests of commands that score samples need: a tiny checkpoint, real images, an extractor, and a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_extractor import TinyExtractor

from itarflow import DenoiseScheduler, ITARFlowPipeline, TARFlow
from itarflow.commands import cli

Run = Callable[..., str]


def save_checkpoint(
    folder: Path, *, num_classes: int = 2, noise_conditioned: bool = True, method: str = "euler"
) -> Path:
    """A flow of grey 4 x 4 images with random weights, which knows levels 0.05 to 0.5, or 0.5 alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise_range = (0.05, 0.5) if noise_conditioned else (0.5, 0.5)
        flow = TARFlow(
            4, 1, 2, 64, (1, 1), num_classes=num_classes, noise_conditioned=noise_conditioned, noise_range=noise_range
        )
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    steps = 3 if noise_conditioned else 1
    scheduler = DenoiseScheduler(t_max=0.5, t_min=noise_range[0], num_denoise_steps=steps, method=method)  # type: ignore[arg-type]
    pipe = ITARFlowPipeline(flow.eval(), scheduler, {"weight": 1.0} if num_classes else None)
    pipe.save_pretrained(folder)
    return folder


def write_photos(folder: Path, classes: tuple[str, ...] = ("dark", "light"), count: int = 8) -> Path:
    """Grey 4 x 4 pictures of noise about a level of each class."""
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / "train" / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 96, (4, 4)) + 128 * number // len(classes)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "train" / name / f"{index:02}.png")
    return folder


def terminal(
    extractor: TinyExtractor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> Run:
    """run("sweep", "--raw"): what is printed; 6 samples of folder/pipeline against folder/photos by an extractor."""
    monkeypatch.setattr("itarflow.commands.options.load_extractor", lambda *_: extractor)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(folder)
    save_checkpoint(folder / "pipeline")
    write_photos(folder / "photos")
    common = ("--num-samples", 6, "--batch-size", 4, "--num-workers", 0, "--cache", "kept")

    def run(command: str, *words: object, checkpoint: str = "pipeline", data: str | Path | None = "photos") -> str:
        real = () if data is None else ("--data", data)
        named = () if "--output" in words else ("--output", {"evaluate": "evaluation"}.get(command, command))
        cli.main([str(word) for word in (command, checkpoint, *real, *common, *named, *words, "--device", "cpu")])
        return capsys.readouterr().out

    return run
