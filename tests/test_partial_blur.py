"""The planted blur of the experiment: where it is said to be, and found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

from partial_blur import PARTS, Options, blurred, main


def test_only_the_part_is_blurred():
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    lower = blurred(images, PARTS["the lower half"](16), 1.5)
    assert torch.equal(lower[:, :, :8], images[:, :, :8])
    assert lower[:, :, 8:].float().var() < images[:, :, 8:].float().var() / 4


def test_it_finds_what_it_plants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        noise = torch.randint(256, (24, 24, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{number}.png")
    main(Options(str(tmp_path), size=24, images=20, planted=5))
    said = capsys.readouterr().out
    assert "found, of 5 images" in said
    assert said.count("100.0%") >= 6  # both halves, by all three amounts
