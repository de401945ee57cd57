"""The interval of where blur begins holds what was planted, and chance is no beginning."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from natural_images import blurred_tokens, natural_images
from torch import Tensor

from itarflow.evaluation.diagnosis.failures import fine_energy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import blur_onset
from blur_onset import Normal, normal_detail, onset_with_interval

PATCH = 4


def energy(images: Tensor) -> Tensor:
    return fine_energy(images, PATCH).flatten(1)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def normal() -> Normal:
    return normal_detail(energy(natural_images(1000)))


@pytest.mark.parametrize(("planted", "order", "token"), [(range(24, 64), "raster", 24), (range(20), "reverse", 19)])
def test_the_interval_holds_where_blur_was_planted(planted, order, token, normal):
    images = blurred_tokens(natural_images(30, seed=1), PATCH, planted)
    onset, low, high = onset_with_interval(energy(images), normal, seeded())
    assert onset.order == order
    assert abs(onset.token - token) <= 1
    assert low - 1 <= token <= high + 1
    assert onset.blurred < 0.3


def test_chance_in_the_real_images_is_no_onset_however_many_samples_there_are(monkeypatch):
    monkeypatch.setattr(blur_onset, "STEP", 0.0)  # which leaves the strength to decide
    generator, found = seeded(), []
    for _ in range(100):
        normal = normal_detail(torch.randn(100, 16, generator=generator))
        found.append(onset_with_interval(torch.randn(1000, 16, generator=generator), normal, generator))
    assert 1 <= sum(onset is not None for onset in found) <= 13  # by the 1000 samples alone it would be most of them


def test_the_interval_widens_with_what_is_not_known_of_real_images():
    energies = torch.randn(400, 16, generator=seeded())
    energies[:, 8:] -= 1.5
    few, many = (
        onset_with_interval(energies, Normal(torch.zeros(16), torch.ones(16), 0.5, count), seeded())
        for count in (10, 10**9)
    )
    assert few[0].token == many[0].token == 8
    assert few[2] - few[1] > many[2] - many[1]
