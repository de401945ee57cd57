import math

import pytest
import torch

from itarflow.flow import NoiseConfig
from itarflow.flow.noise import bits_per_dim, dequantise, draw_noise_level

T_MIN, T_MAX = 0.1, 0.7
COUNT = 20_000


def draw(distribution, count=COUNT, seed=0):
    config = NoiseConfig(t_min=T_MIN, t_max=T_MAX, distribution=distribution)
    return draw_noise_level(config, count, torch.Generator().manual_seed(seed))


CDFS = {
    "uniform": lambda t: (t - T_MIN) / (T_MAX - T_MIN),
    "quadratic": lambda t: (t**2 - T_MIN**2) / (T_MAX**2 - T_MIN**2),
    "lognormal": lambda t: 0.5 * (1 + torch.erf((t.log() + 1.2) / math.sqrt(2))),
}


@pytest.mark.parametrize("distribution", CDFS)
def test_levels_follow_their_distribution(distribution):
    levels = draw(distribution).double().sort().values
    empirical = (torch.arange(COUNT) + 0.5) / COUNT
    distance = (CDFS[distribution](levels) - empirical).abs().max()
    assert distance < 1.63 / math.sqrt(COUNT)  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize("distribution", ["uniform", "quadratic"])
def test_limited_levels_fill_the_range_and_stay_inside(distribution):
    levels = draw(distribution)
    assert T_MIN <= levels.min() < T_MIN + 0.01
    assert T_MAX - 0.01 < levels.max() <= T_MAX


@pytest.mark.parametrize(("distribution", "level"), [("constant", T_MAX), ("dequantise", 0.0)])
def test_a_single_level_needs_no_draw(distribution, level):
    assert torch.equal(draw(distribution, 4), torch.full((4,), level))


@pytest.mark.parametrize("distribution", ["uniform", "quadratic", "lognormal", "constant", "dequantise"])
def test_levels_are_float32_of_the_batch(distribution):
    levels = draw(distribution, 5)
    assert (levels.shape, levels.dtype) == ((5,), torch.float32)


@pytest.mark.parametrize("distribution", CDFS)
def test_levels_depend_on_the_generator_alone(distribution):
    generator = torch.Generator().manual_seed(3)
    config = NoiseConfig(t_min=T_MIN, t_max=T_MAX, distribution=distribution)
    first, second = draw_noise_level(config, 4, generator), draw_noise_level(config, 4, generator)
    torch.manual_seed(99)
    assert torch.equal(first, draw(distribution, 4, seed=3))
    assert not torch.equal(first, second)


def test_dequantised_levels_tile_the_range_from_minus_one_to_one():
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).repeat_interleave(8)
    u = ((torch.arange(8, dtype=torch.float64) + 0.5) / 8).repeat(256)
    tiled = dequantise(levels.view(1, 1, 32, 64), u.view(1, 1, 32, 64)).flatten()
    torch.testing.assert_close(tiled, (torch.arange(2048, dtype=torch.float64) + 0.5) / 1024 - 1)


@pytest.mark.parametrize("u", [0.001, 0.5, 0.999])
def test_dequantised_images_round_down_to_their_grey_levels(u):
    levels = torch.arange(256.0)
    images = (levels / 127.5 - 1).view(1, 1, 16, 16)
    recovered = ((dequantise(images, torch.full_like(images, u)) + 1) * 128).floor()
    assert torch.equal(recovered.flatten(), levels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"t_min": 0.0}, r"t_min is 0\.0"),
        ({"t_min": -0.1}, r"t_min is -0\.1"),
        ({"t_min": 1e-320}, "t_min is 1e-320"),  # 0 in float32
        ({"t_max": 1e308}, r"t_max is 1e\+308"),
        ({"t_max": "0.3"}, "t_max is '0.3'"),
        ({"t_min": 0.5, "t_max": 0.3}, r"t_min=0\.5, t_max=0\.3"),
        ({"t_max": math.inf}, "t_max is inf"),
        ({"t_max": math.nan}, "t_max is nan"),
        ({"t_min": 0.3, "distribution": "uniform"}, r"'uniform' .*0\.3.*distribution='constant'"),
        ({"t_min": 0.3, "distribution": "quadratic"}, "'quadratic' .*t_min < t_max"),
    ],
)
def test_impossible_levels_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        NoiseConfig(**{"t_min": 0.01, "t_max": 0.3} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distribution": "gauss"}, "distribution.*'gauss'.*uniform"),
        ({"weight": "t3"}, "weight.*'t3'.*t2"),
        ({"weight": None}, "weight is None"),
    ],
)
def test_unknown_names_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        NoiseConfig(**changes)


@pytest.mark.parametrize("distribution", ["constant", "dequantise", "lognormal"])
def test_one_level_suits_what_does_not_span_a_range(distribution):
    assert NoiseConfig(t_min=0.3, t_max=0.3, distribution=distribution).t_min == 0.3


def test_bits_per_dim_of_a_uniform_density_are_eight():
    assert bits_per_dim(math.log(2)) == pytest.approx(8)  # density 1/2 over [-1, 1], counted in 256 levels


@pytest.mark.parametrize("distribution", ["uniform", "quadratic", "lognormal", "constant", "dequantise"])
def test_the_levels_of_a_seed_do_not_depend_on_the_default_type(distribution):
    expected = draw(distribution, 8)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(draw(distribution, 8), expected)
    finally:
        torch.set_default_dtype(torch.float32)
