"""Where blur begins: planted from a token on, it is found there; where there is none, nothing is found."""

from __future__ import annotations

import pytest
import torch
from natural_images import blurred_tokens, natural_images
from torch import Tensor

from itarflow.evaluation.diagnosis.failures import fine_energy
from itarflow.evaluation.diagnosis.onset import Normal, find_onset, level_change, normal_detail

PATCH = 4


def energy(images: Tensor) -> Tensor:
    return fine_energy(images, PATCH).flatten(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def normal() -> Normal:
    return normal_detail(energy(natural_images(1000)))


def test_the_two_level_fit_takes_most_off_the_sum_of_squares():
    curves = torch.randn(5, 12, generator=seeded())
    first, strength = level_change(curves)
    for curve, split, found in zip(curves, first.tolist(), strength.tolist(), strict=True):
        total = (curve - curve.mean()).square().sum()
        left = [
            sum(float((part - part.mean()).square().sum()) for part in (curve[:place], curve[place:]))
            for place in range(1, 12)
        ]
        assert split == left.index(min(left)) + 1
        assert found**2 == pytest.approx(float(total) - min(left), rel=1e-4)
        assert (found > 0) == bool(curve[:split].mean() > curve[split:].mean())


def test_one_token_has_no_change():
    assert [value.tolist() for value in level_change(torch.ones(2, 1))] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("token", [5, 24, 50])
def test_blur_is_found_where_it_was_planted(normal, token):
    planted = blurred_tokens(natural_images(30, seed=1), PATCH, range(token, 64))
    onset = find_onset(energy(planted), normal, seeded())
    assert onset is not None
    assert onset.order == "raster"
    assert abs(onset.token - token) <= 1
    assert onset.low - 1 <= token <= onset.high + 1
    assert onset.blurred < 0.3
    assert onset.others == pytest.approx(1, abs=0.35)


def test_blur_of_blocks_that_walk_backwards_is_found_too(normal):
    planted = blurred_tokens(natural_images(30, seed=1), PATCH, range(20))
    onset = find_onset(energy(planted), normal, seeded())
    assert onset is not None
    assert onset.order == "reverse"
    assert abs(onset.token - 19) <= 1
    assert onset.blurred < 0.3


def test_real_images_have_no_onset_but_for_the_false_alarms_allowed(normal):
    found = [find_onset(energy(natural_images(20, seed=seed)), normal, seeded()) for seed in range(100, 160)]
    assert sum(onset is not None for onset in found) <= 7  # 3 are expected; more than 7 in 2 of 100 cases


def test_chance_in_the_real_images_is_no_onset_however_many_samples_there_are(monkeypatch):
    monkeypatch.setattr("itarflow.evaluation.diagnosis.onset.STEP", 0.0)  # which leaves the strength to decide
    generator, found = seeded(), []
    for _ in range(100):
        normal = normal_detail(torch.randn(100, 16, generator=generator))
        found.append(find_onset(torch.randn(1000, 16, generator=generator), normal, generator))
    assert 1 <= sum(onset is not None for onset in found) <= 13  # by the 1000 samples alone it would be most of them


def test_the_interval_widens_with_what_is_not_known_of_real_images():
    energies = torch.randn(400, 16, generator=seeded())
    energies[:, 8:] -= 1.5
    few, many = (Normal(torch.zeros(16), torch.ones(16), 0.5, count) for count in (10, 10**9))
    widths = []
    for normal in (few, many):
        onset = find_onset(energies, normal, seeded())
        assert onset is not None
        assert onset.token == 8
        widths.append(onset.high - onset.low)
    assert widths[0] > widths[1]


def test_blur_everywhere_begins_nowhere(normal):
    planted = energy(blurred_tokens(natural_images(30, seed=1), PATCH, range(64)))
    assert planted.mean() < normal.mean.mean() - 2
    assert find_onset(planted, normal, seeded()) is None


def test_detail_that_is_only_less_than_elsewhere_is_not_blurred(normal):
    images = natural_images(30, seed=1)
    too_much = energy(images)
    too_much[:, :20] += 6
    too_much[:, 20:] += 1
    assert find_onset(too_much, normal, seeded()) is None


def test_normal_detail_needs_a_spread():
    with pytest.raises(ValueError, match="1 image has no spread"):
        normal_detail(torch.zeros(1, 4))
