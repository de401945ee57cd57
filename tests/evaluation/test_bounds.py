"""Likelihoods: flows whose density is known, bounds that tighten, noise that nothing but its seed decides."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from itarflow import TARFlow
from itarflow.codec import Posterior, to_pixels
from itarflow.evaluation.likelihood.bounds import Likelihoods, Noise, likelihoods, log_cover, mean_of, noises_of

MakeFlow = Callable[..., TARFlow]
UNIFORM = Noise("uniform", None)


def normal_flow(make_flow: MakeFlow, scale: float = 1.0, size: int = 2) -> TARFlow:
    """The identity times `scale`: each pixel is normal with standard deviation 1 / scale, for itself."""
    plain = {"num_classes": 0, "noise_conditioned": False, "patch_size": 1, "in_channels": 1}
    single = size == 1  # a flow of one token has to learn it
    return make_flow(fresh=True, image_size=size, input_scale=scale, learned_first_token=single, **plain)


def grey(values: list[int], size: int = 2) -> Posterior:
    """Images of one grey level each, of 0 .. 255."""
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, size, size)
    return Posterior(to_pixels(images), None)


def uniform_bits(values: list[int], scale: float) -> np.ndarray:
    """-log2 of the normal mass between k / 128 - 1 and (k + 1) / 128 - 1."""
    edges = np.array(values)[:, None] + [0, 1]
    below = norm.cdf((edges / 128 - 1) * scale)
    return -np.log2(below[:, 1] - below[:, 0])


def gaussian_bits(values: list[int], scale: float, level: float) -> np.ndarray:
    """-log2 of the integral of p(y) q(y | x) / sum of q(y | x') over one pixel, by a fine grid."""
    y = np.linspace(-1 - 12 * level, 1 + 12 * level, 20_001)
    levels = np.arange(256) / 127.5 - 1
    cover = sum(norm.pdf(y, centre, level) for centre in levels)
    p = norm.pdf(y, 0, 1 / scale) / cover
    return np.array([-np.log2(np.trapezoid(p * norm.pdf(y, levels[value], level), y)) for value in values])


@pytest.mark.slow
@pytest.mark.parametrize("noise", [UNIFORM, Noise("gaussian", 0.02)], ids=lambda noise: noise.title)
def test_many_draws_give_the_bits_of_a_known_density_and_few_give_more(make_flow, noise):
    scale, values = 60.0, [124, 126, 127, 129, 131] * 12  # a grey level is half a standard deviation wide
    flow, images = normal_flow(make_flow, scale), grey(values)
    exact = uniform_bits(values, scale) if noise.kind == "uniform" else gaussian_bits(values, scale, noise.level)
    bits = {draws: likelihoods(flow, images, None, [noise], draws=draws).bits[:, 0].numpy() for draws in (1, 4, 32)}
    means = [float(found.mean() - exact.mean()) for found in bits.values()]
    assert means[0] > means[1] > means[2] > -0.002
    assert means[2] < 0.1 * means[0]
    assert means[0] > 0.01


def test_a_density_that_is_constant_in_each_cell_gives_exact_bits_with_one_draw(make_flow, monkeypatch):
    flow, generator = normal_flow(make_flow), torch.Generator().manual_seed(0)
    mass = torch.rand(256, generator=generator).double()
    mass /= mass.sum()

    def steps(self: TARFlow, images: Tensor, *condition: Tensor | float | None) -> Tensor:
        return (mass[((images + 1) * 128).long()] * 128).log().sum(dim=(1, 2, 3))

    monkeypatch.setattr(TARFlow, "log_prob", steps)
    values = [0, 1, 77, 254, 255]
    found = likelihoods(flow, grey(values), None, [UNIFORM], seed=3)
    torch.testing.assert_close(found.bits[:, 0], -mass[values].log2())
    torch.testing.assert_close(found.bits_one_draw, found.bits)
    torch.testing.assert_close(found.nll[:, 0], -(mass[values] * 128).log())


@pytest.mark.slow
@pytest.mark.parametrize("noise", [UNIFORM, Noise("gaussian", 0.01)], ids=lambda noise: noise.title)
def test_probabilities_of_all_images_sum_to_the_mass_of_the_flow(make_flow, noise):
    scale = 4.0
    found = likelihoods(normal_flow(make_flow, scale, size=1), grey(list(range(256)), size=1), None, [noise], draws=50)
    # Uniform cells end at -1 and 1; every value belongs to some image with Gaussian noise.
    expected = norm.cdf(scale) - norm.cdf(-scale) if noise.kind == "uniform" else 1.0
    assert float((2**-found.bits).sum()) == pytest.approx(expected, abs=0.005)


def test_nats_of_noisy_images_have_their_closed_form(make_flow):
    levels = [0.1, 0.3]
    flow, values = normal_flow(make_flow), [0, 128, 255]
    found = likelihoods(flow, grey(values * 200), None, [Noise("gaussian", level) for level in levels], draws=2)
    x = np.array(values) / 127.5 - 1
    expected = [[0.5 * math.log(2 * math.pi) + 0.5 * (value**2 + level**2) for level in levels] for value in x]
    np.testing.assert_allclose(found.nll.unflatten(0, (200, 3)).mean(dim=0), expected, atol=0.02)


def test_the_entropy_of_noise_is_the_least_nll(make_flow):
    scale, level = 50.0, 1 / 50  # the flow that knows the only image there is: black at 0 plus noise
    flow = normal_flow(make_flow, scale, size=4)
    images = Posterior(torch.zeros(50, 1, 4, 4), None)
    noise = Noise("gaussian", level)
    assert float(likelihoods(flow, images, None, [noise], draws=50).nll.mean()) == pytest.approx(
        noise.entropy, abs=0.02
    )
    assert UNIFORM.entropy == -math.log(128)


def test_cover_is_the_sum_of_the_noise_of_all_levels():
    noisy = torch.tensor([[[[-1.05, 0.0], [0.5, 1.0]]]], dtype=torch.float64)
    levels = np.arange(256) / 127.5 - 1
    for level in (0.003, 0.2):
        expected = sum(np.log(sum(norm.pdf(value, levels, level))) for value in noisy.flatten().tolist())
        assert float(log_cover(noisy, Noise("gaussian", level))) == pytest.approx(expected)
    assert float(log_cover(noisy, UNIFORM)) == pytest.approx(4 * math.log(128))


@pytest.fixture
def images() -> Posterior:
    values = torch.randint(256, (5, 2, 4, 4), generator=torch.Generator().manual_seed(5)).byte()
    return Posterior(to_pixels(values), None)


def same(one: Likelihoods, other: Likelihoods) -> None:
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_an_images_noise_depends_on_seed_number_and_draw_alone(make_flow, images):
    flow, labels = make_flow(), torch.tensor([0, 1, 2, -1, 0])
    noises = (Noise("uniform", 0.1), Noise("gaussian", 0.1), Noise("gaussian", 0.4))
    whole = likelihoods(flow, images, labels, noises, draws=2, seed=1)
    parts = [
        likelihoods(flow, Posterior(images.mean[part], None), labels[part], noises, draws=2, seed=1, numbers=part)
        for part in ([4, 0], [1, 2, 3])
    ]
    joined = [torch.cat(columns)[[1, 2, 3, 4, 0]] for columns in zip(*parts, strict=True)]
    same(whole, Likelihoods(*joined))
    same(
        likelihoods(flow, images, labels, noises[1:2], draws=2, seed=1), Likelihoods(*(part[:, 1:2] for part in whole))
    )
    other = likelihoods(flow, images, labels, noises, draws=2, seed=2)
    assert (whole.nll - other.nll).abs().min() > 0
    first = likelihoods(flow, images, labels, noises, draws=1, seed=1)
    assert (whole.nll - first.nll).abs().min() > 0
    assert (whole.bits < whole.bits_one_draw).all()


def test_labels_and_levels_reach_the_flow(make_flow, images):
    flow, labels = make_flow(), torch.tensor([0, 1, 2, 2, 0])
    noise = Noise("gaussian", 0.3)
    labelled, unlabelled = (likelihoods(flow, images, given, [noise]) for given in (labels, None))
    assert (labelled.nll - unlabelled.nll).abs().min() > 1e-6
    null = likelihoods(flow, images, torch.full((5,), -1), [noise])
    same(null, unlabelled)


def test_codes_are_drawn_from_their_posterior_and_have_no_bits(make_flow, images):
    flow, noise = make_flow(), Noise("gaussian", 0.3)
    posterior = Posterior(images.mean, torch.full_like(images.mean, -1.0))
    found = likelihoods(flow, posterior, None, [noise], bits=False)
    assert found.bits is None
    assert found.bits_one_draw is None
    point = likelihoods(flow, images, None, [noise], bits=False)
    assert (found.nll - point.nll).abs().min() > 1e-4


def test_means_and_standard_errors():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    assert mean_of(values) == (4.0, pytest.approx(math.sqrt(38 / 3) / 2), 0)
    assert mean_of(values[:1]) == (1.0, None, 0)
    assert mean_of(torch.tensor([1.0, math.nan, math.inf])) == (None, None, 2)


@pytest.mark.parametrize(
    ("flow", "options", "titles"),
    [
        ({"noise_range": (0.02, 0.5)}, {}, ["uniform t=0.02", "gaussian t=0.02", "gaussian t=0.18", "gaussian t=0.34",
                                            "gaussian t=0.5"]),
        ({"noise_range": (0.02, 0.5)}, {"levels": (0.3, 0.1)}, ["uniform t=0.1", "gaussian t=0.3", "gaussian t=0.1"]),
        ({"noise_range": (0.02, 0.5)}, {"kind": "uniform"}, ["uniform t=0.02"]),
        ({"noise_range": (0.02, 0.5)}, {"kind": "gaussian", "count": 1}, ["gaussian t=0.02"]),
        ({"noise_range": (0.02, 0.5)}, {"codes": True, "count": 2}, ["gaussian t=0.02", "gaussian t=0.5"]),
        ({"noise_range": (0.05, 0.05), "noise_conditioned": False}, {}, ["uniform", "gaussian t=0.05"]),
        ({"noise_conditioned": False}, {}, ["uniform"]),
        ({"noise_conditioned": False}, {"levels": (0.1,)}, ["uniform", "gaussian t=0.1"]),
        ({}, {"noise_range": (0.1, 0.4), "count": 2, "kind": "gaussian"}, ["gaussian t=0.1", "gaussian t=0.4"]),
    ],
)  # fmt: skip
def test_noises_that_suit_a_flow(make_flow, flow, options, titles):
    assert [noise.title for noise in noises_of(make_flow(**flow), **options)] == titles


@pytest.mark.parametrize(
    ("flow", "options", "message"),
    [
        ({"noise_range": (0.02, 0.5)}, {"levels": (0.6,)}, r"0\.6.*outside \[0\.02, 0\.5\]"),
        ({}, {"levels": (0.0,)}, "noise level 0.0 "),
        ({}, {"levels": (0.1, 0.1)}, "name one twice"),
        ({}, {"kind": "uniform"}, "not recorded; name those"),
        ({"noise_conditioned": False}, {"kind": "gaussian"}, "not recorded; name those"),
        ({"noise_range": (0.02, 0.5)}, {"count": 0}, "number of noise levels is 0"),
        ({"noise_range": (0.02, 0.5)}, {"kind": "uniform", "codes": True}, "gaussian noise"),
    ],
)
def test_noises_that_do_not_are_refused(make_flow, flow, options, message):
    with pytest.raises(ValueError, match=message):
        noises_of(make_flow(**flow), **options)


def test_coarse_flows_and_no_draws_are_refused(make_flow, images):
    with pytest.raises(ValueError, match="bfloat16, too coarse"):
        likelihoods(make_flow().bfloat16(), images, None, [Noise("gaussian", 0.1)])
    with pytest.raises(ValueError, match="draws is 0"):
        likelihoods(make_flow(), images, None, [Noise("gaussian", 0.1)], draws=0)
