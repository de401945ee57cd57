"""Measures of failed images: exact where the answer is known, and low where a failure was planted."""

from __future__ import annotations

import pytest
import torch
from natural_images import blurred, blurred_tokens, natural_images, with_background

from itarflow.evaluation.diagnosis.failures import (
    MEASURES,
    background_brightness,
    background_contrast,
    cells,
    default_patch,
    find_onset,
    fine_detail,
    fine_energy,
    quartiles,
    threshold,
)


def flat(*levels: int, size: int = 8) -> torch.Tensor:
    """An image a level."""
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, size, size).contiguous()


def stripes(period: int, size: int = 32) -> torch.Tensor:
    """A cosine across the image, at the places of the cosine transform's."""
    wave = torch.cos(2 * torch.pi / period * (torch.arange(size) + 0.5))
    return (128 + 100 * wave).round().to(torch.uint8).expand(1, 1, size, size).contiguous()


def test_images_of_one_colour_have_their_brightness_and_nothing_else():
    images = flat(0, 7, 255)
    assert background_brightness(images).tolist() == [0, 7, 255]
    assert background_contrast(images).tolist() == [0, 0, 0]
    assert fine_detail(images).min() > 0.8  # that of rounding alone: what has no structure is not blurred


def test_a_colour_is_not_black_because_one_channel_is():
    blue = flat(0)
    blue[:, 2] = 200
    assert background_brightness(blue).item() == 200


def test_contrast_of_the_background_is_the_standard_deviation_in_its_cells():
    images = flat(100, 100, size=16)
    images[0, :, ::2] = 110  # two rows a cell: 100 and 110
    images[1, :, 2:-2, 2:-2] = natural_images(1, 12)[0]  # which is no background
    torch.testing.assert_close(background_contrast(images), torch.tensor([5.0, 0.0]))


def test_the_background_is_what_half_of_the_border_is():
    images = flat(100, 100, size=32)
    images[0, :, :8] = 0  # 8 + 2 of the 28 cells of the border
    images[1, :, :20] = 0  # 8 + 8 of them
    assert background_brightness(images).tolist() == [100, 0]


@pytest.mark.parametrize(("period", "share"), [(2.56, 1.0), (3.2, 1.0), (8, 0.0), (16, 0.0)])
def test_waves_are_fine_if_they_are_shorter_than_four_pixels(period, share):
    assert fine_detail(stripes(period)).item() == pytest.approx(share, abs=0.06)  # windows cut the waves


def test_fine_detail_does_not_depend_on_brightness_or_contrast():
    images = natural_images(8, 32)
    dimmed = (images.float() * 0.4 + 20).round().to(torch.uint8)
    torch.testing.assert_close(fine_detail(dimmed), fine_detail(images), rtol=0.05, atol=1e-3)


def test_fine_energy_is_of_each_cell_alone():
    images = flat(100, size=32)
    images[:, :, 9:15, 17:23] = natural_images(1, 6, seed=3)
    energy = fine_energy(images, 8)[0]
    none = torch.tensor(1 / 12).log2()
    assert energy.shape == (4, 4)
    assert energy[1, 2] > 5
    energy[1, 2] = none
    torch.testing.assert_close(energy, none.expand(4, 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_planted_failures_are_lower_than_all_whole_images(channels):
    images = natural_images(200, 32, channels)
    failures = {
        "black": with_background(images, 4, ripple=3),
        "flat": with_background(images, 130, ripple=1),
        "blurred": blurred(images),
    }
    for part in MEASURES:
        whole, failed = part.measure(images), part.measure(failures[part.name])
        assert whole.shape == (200,)
        assert threshold(whole, 0.02) > failed.quantile(0.95)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "part",
    [
        (slice(16, 32), slice(None)),
        (slice(None), slice(16)),
        (slice(8, 24), slice(8, 24)),
        (slice(16, 32), slice(16, 32)),
    ],
    ids=["lower half", "left half", "middle quarter", "last quarter"],
)
def test_blur_of_a_part_is_lower_than_nearly_all_whole_images(channels, part):
    images = natural_images(400, 32, channels)
    some = images.clone()
    some[..., part[0], part[1]] = blurred(images)[..., part[0], part[1]]
    whole = threshold(fine_detail(images), 0.02)
    assert (fine_detail(some) < whole).float().mean() > 0.9


def test_images_are_measured_one_by_one():
    images = natural_images(3, 16)
    for measure in (*(part.measure for part in MEASURES), lambda images: fine_energy(images, 2)):
        torch.testing.assert_close(measure(images), torch.cat([measure(image[None]) for image in images]))


def test_the_smallest_images_have_all_measures():
    images = natural_images(2, 8, 1)
    assert all(part.measure(images).isfinite().all() for part in MEASURES)
    assert fine_energy(images, 2).shape == (2, 4, 4)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 16, 16),
        torch.zeros(3, 16, 16, dtype=torch.uint8),
        torch.zeros(1, 3, 16, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 7, 7, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(images):
    for part in MEASURES:
        with pytest.raises(ValueError, match=r"expected uint8 \(N, C, S, S\) with S >= 8"):
            part.measure(images)


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (28, 4), (32, 4), (64, 8), (256, 32), (11, 11), (9, 3)])
def test_there_are_at_most_eight_cells_a_side(size, patch):
    assert default_patch(size) == patch


def test_cells_are_in_raster_order():
    image = torch.arange(16).view(1, 1, 4, 4)
    assert cells(image, 2)[0, 0, 0, 1].tolist() == [2, 3, 6, 7]
    with pytest.raises(ValueError, match="patch size 3 does not divide the 4 pixels"):
        cells(image, 3)


def test_at_most_the_share_is_below_the_threshold():
    values = torch.arange(1000.0)
    assert threshold(values, 0.01) == 10
    assert int((values < threshold(values, 0.0199)).sum()) == 19
    assert threshold(torch.tensor([0.0, 0.0, 0.0, 1.0]), 0.5) == 0  # nothing is below
    with pytest.raises(ValueError, match="0 values"):
        threshold(torch.zeros(0), 0.01)


# -- where blur begins ------------------------------------------------------------------------------------------


def median_detail(images: torch.Tensor) -> torch.Tensor:
    """Of 4 x 4 pixels a token, relative to other whole images."""
    usual, energy = (fine_energy(some, 4).flatten(1) for some in (natural_images(1000), images))
    return quartiles(energy)[1] - quartiles(usual)[1]


@pytest.mark.parametrize(
    ("planted", "order", "token"),
    [(range(5, 64), "raster", 5), (range(50, 64), "raster", 50), (range(20), "reverse", 19)],
)
def test_blur_is_found_where_it_was_planted(planted, order, token):
    onset = find_onset(median_detail(blurred_tokens(natural_images(100, seed=1), 4, planted)))
    assert onset is not None
    assert (onset.order, onset.token) == (order, pytest.approx(token, abs=1))
    assert onset.blurred < 0.3
    assert onset.others == pytest.approx(1, abs=0.35)


def test_where_nothing_begins_nothing_is_found():
    whole = natural_images(100, seed=1)
    assert find_onset(median_detail(whole)) is None
    assert find_onset(median_detail(blurred(whole))) is None  # everywhere
    too_much = torch.cat([torch.full((20,), 6.0), torch.full((44,), 1.0)])
    assert find_onset(too_much) is None  # less than elsewhere, and still more than real images have
    assert find_onset(torch.zeros(1)) is None


def test_the_split_takes_most_off_the_sum_of_squares():
    curve = torch.randn(12, generator=torch.Generator().manual_seed(0)) - torch.arange(12) / 3
    left = [
        sum(float((part - part.mean()).square().sum()) for part in (curve[:place], curve[place:]))
        for place in range(1, 12)
    ]
    onset = find_onset(curve)
    assert onset is not None
    assert onset.token == left.index(min(left)) + 1


def test_quartiles():
    curves = torch.arange(5.0)[:, None] * torch.tensor([1.0, 10.0])
    assert quartiles(curves).tolist() == [[1, 10], [2, 20], [3, 30]]
