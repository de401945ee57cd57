"""Folders that earlier versions have written: one of 0.1, from before the package had wings."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils

import itarflow
from itarflow import ITARFlowPipeline

FOLDER = Path(__file__).parents[1] / "golden" / "pipeline_0_1"
PIXELS = [0.0399, 0.4067, 0.8289, 0.0000, 1.0000, 0.3525]
"""The first of the dog that version 0.1 made of it, with seed 0."""


def first_pixels(pipe: ITARFlowPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels=["dog"], generator=generator, output_type="pt").images.flatten()[:6]


def test_our_loader_reads_them():
    torch.testing.assert_close(
        first_pixels(ITARFlowPipeline.from_pretrained(FOLDER)), torch.tensor(PIXELS), rtol=0, atol=1e-4
    )


def test_the_generic_loader_of_diffusers_runs_their_shims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "itarflow.denoise" in (FOLDER / "scheduler" / "scheduling_denoise.py").read_text()
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    torch.testing.assert_close(first_pixels(pipe), torch.tensor(PIXELS), rtol=0, atol=1e-4)
    assert callable(itarflow.denoise)


def test_their_cards_are_brought_up_to_date_unless_somebody_edited_them(tmp_path: Path):
    shutil.copytree(FOLDER, tmp_path / "old")
    card = tmp_path / "old" / "README.md"
    generated = card.read_text()
    pipe = ITARFlowPipeline.from_pretrained(tmp_path / "old")
    for edited in (
        generated.replace("## What it is\n", "## What it is\n\nMine, of cats.\n"),
        generated.replace("pipeline_tag", "license: mit\npipeline_tag"),
        generated + "\nCall me.\n",
    ):
        card.write_text(edited)
        assert not pipe.record(tmp_path / "old", "evaluations", lambda _: {"8 samples": "FID 3.5"})
        assert card.read_text() == edited
    card.write_text(generated)
    assert pipe.record(tmp_path / "old", "evaluations", lambda _: {"8 samples": "FID 3.5"})
    assert "| 8 samples | 3.5 |" in card.read_text()


@pytest.mark.slow
def test_the_function_denoise_stays_one_after_their_module_is_imported():
    script = (
        "import itarflow, torch\nfrom itarflow.denoise import DenoiseScheduler\n"
        "once = DenoiseScheduler(0.5, 0.1, num_denoise_steps=1)\n"
        "x = itarflow.denoise(lambda x, y, t: x / 2, torch.ones(1, 1, 2, 2), None, once)\n"
        "assert x.unique().item() == 0.5"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
