import itertools
import json
import math

import pytest
import torch

from itarflow.denoisers import DenoiseScheduler, FlowDenoiser, denoise
from itarflow.denoisers.ode import noise_levels

METHODS = ["euler", "heun", "multistep", "predictor-corrector", "sde"]
ODE_METHODS = ["euler", "heun", "multistep", "predictor-corrector"]
SPACINGS = ["even", "quadratic"]
STD, T_MAX, T_MIN = 0.5, 1.0, 0.01


def gaussian(noisy, labels, noise_level):
    """The exact denoiser of data that are Gaussian with standard deviation STD."""
    return noisy * STD**2 / (STD**2 + noise_level.view(-1, 1, 1, 1) ** 2)


def path(x, t, t_next):
    """The exact ODE path of such data, from noise level t to t_next."""
    return x * math.sqrt((STD**2 + t_next**2) / (STD**2 + t**2))


class Recorder:
    """A denoiser that remembers its calls."""

    def __init__(self, denoiser=gaussian):
        self.denoiser, self.levels, self.labels = denoiser, [], []

    def __call__(self, noisy, labels, noise_level):
        assert noise_level.shape == (len(noisy),)
        self.levels.append(noise_level[0].item())
        self.labels.append(labels)
        return self.denoiser(noisy, labels, noise_level)


@pytest.fixture
def noisy():
    images = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return images * math.hypot(STD, T_MAX)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# The integrators


@pytest.mark.parametrize("method", ODE_METHODS)
def test_many_steps_follow_the_exact_path(noisy, method):
    result = denoise(
        gaussian, noisy, None, DenoiseScheduler(t_max=T_MAX, t_min=1e-4, num_denoise_steps=400, method=method)
    )
    torch.testing.assert_close(result, path(noisy, T_MAX, 0), rtol=5e-3, atol=0)


@pytest.mark.parametrize("method", ["heun", "multistep", "predictor-corrector"])
@pytest.mark.parametrize("num_steps", [9, 10, 20])
def test_second_order_beats_euler_at_equal_cost(noisy, method, num_steps):
    results = [
        denoise(
            gaussian, noisy, None, DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=num_steps, method=m)
        )
        for m in (method, "euler")
    ]
    error, error_of_euler = ((result - path(noisy, T_MAX, 0)).abs().max() for result in results)
    assert error < error_of_euler


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", range(3, 31))
def test_the_predictor_corrector_beats_euler_at_equal_cost(noisy, spacing, num_steps):
    def error(method):
        result = denoise(
            gaussian,
            noisy,
            None,
            DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=num_steps, method=method, spacing=spacing),
        )
        return (result - gaussian(path(noisy, T_MAX, T_MIN), None, torch.tensor([T_MIN]))).abs().max()

    assert error("predictor-corrector") < error("euler")


def test_the_predictor_corrector_is_eulers_with_two_steps(noisy):
    """There is nothing yet to extend a line through, and nothing left to correct."""
    kwargs = {"t_max": T_MAX, "t_min": T_MIN, "num_denoise_steps": 2}
    torch.testing.assert_close(
        denoise(gaussian, noisy, None, DenoiseScheduler(**kwargs, method="predictor-corrector")),
        denoise(gaussian, noisy, None, DenoiseScheduler(**kwargs)),
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_predictor_corrector_is_exact_for_estimates_linear_in_t(noisy, spacing):
    """From the third level on: the first step, Euler's, is corrected as soon as the second estimate is known."""
    states = []
    denoise(
        lambda noisy, labels, noise_level: torch.ones_like(noisy) + 2 * noise_level.view(-1, 1, 1, 1),
        noisy,
        None,
        DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=6, method="predictor-corrector", spacing=spacing),
        callback=lambda i, t, x, x0: states.append((t, x)),
    )
    for t, x in states[2:]:  # x = c t + 1 - 2 t log t solves dx / dt = (x - 1 - 2 t) / t
        torch.testing.assert_close(x, t * (noisy - 1) / T_MAX + 1 - 2 * t * math.log(t / T_MAX))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", range(1, 13))
def test_the_denoiser_is_called_num_steps_times(noisy, method, spacing, num_steps):
    recorder = Recorder()
    denoise(
        recorder,
        noisy,
        None,
        DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=num_steps, method=method, spacing=spacing),
        generator=seeded(),
    )
    assert len(recorder.levels) == num_steps
    assert recorder.levels[0] == T_MAX
    assert recorder.levels[-1] == (T_MIN if num_steps > 1 else T_MAX)


@pytest.mark.parametrize("method", METHODS)
def test_one_step_is_tweedies(noisy, method):
    result = denoise(
        gaussian,
        noisy,
        None,
        DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=1, method=method),
        generator=seeded(),
    )
    torch.testing.assert_close(result, noisy * STD**2 / (STD**2 + T_MAX**2))


@pytest.mark.parametrize("method", ["euler", "multistep", "predictor-corrector", "sde"])
def test_levels_fall_evenly_from_t_max_to_t_min(noisy, method):
    recorder, seen = Recorder(), []
    denoise(
        recorder,
        noisy,
        None,
        DenoiseScheduler(t_max=0.9, t_min=0.1, num_denoise_steps=5, method=method),
        generator=seeded(),
        callback=lambda i, t, x, x0: seen.append((i, t)),
    )
    assert recorder.levels == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    assert seen == list(enumerate(pytest.approx(level) for level in (0.9, 0.7, 0.5, 0.3, 0.1)))


@pytest.mark.parametrize(
    ("num_steps", "levels"),
    [
        (5, [0.9, 0.5, 0.5, 0.1, 0.1]),  # two steps of two evaluations, one at the end
        (6, [0.9, 0.9 - 0.8 / 3, 0.9 - 0.8 / 3, 0.1 + 0.8 / 3, 0.1 + 0.8 / 3, 0.1]),  # Euler into t_min
    ],
)
def test_heun_visits_fewer_levels_and_most_of_them_twice(noisy, num_steps, levels):
    recorder = Recorder()
    denoise(recorder, noisy, None, DenoiseScheduler(t_max=0.9, t_min=0.1, num_denoise_steps=num_steps, method="heun"))
    assert recorder.levels == pytest.approx(levels)


@pytest.mark.parametrize(
    ("num_steps", "levels"),
    [(1, [0.3, 0.0]), (2, [0.3, 0.01, 0.0]), (3, [0.3, 0.155, 0.01, 0.0])],
)
def test_noise_levels_end_at_t_min_then_zero(num_steps, levels):
    result = noise_levels(0.3, 0.01, num_steps)
    assert result == pytest.approx(levels)
    assert (result[0], result[-2:]) == (0.3, levels[-2:])  # the ends exactly


@pytest.mark.parametrize(("t_max", "t_min"), [(0.3, 0.01), (0.5, 0.05), (1.0, 0.02), (3.0, 0.1)])
@pytest.mark.parametrize("num_steps", [2, 3, 10, 101])
def test_quadratic_levels_are_even_in_the_square_root(t_max, t_min, num_steps):
    levels = noise_levels(t_max, t_min, num_steps, "quadratic")
    assert len(levels) == num_steps + 1
    assert (levels[0], levels[-2:]) == (t_max, [t_min, 0.0])  # the ends exactly
    steps = [math.sqrt(a) - math.sqrt(b) for a, b in itertools.pairwise(levels[:-1])]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert steps[0] > 0


def test_spacing_plays_no_part_in_a_single_step():
    assert noise_levels(0.3, 0.3, 1, "quadratic") == noise_levels(0.3, 0.3, 1) == [0.3, 0.0]


@pytest.mark.parametrize("method", METHODS)
def test_the_callback_sees_each_step_and_its_estimate(noisy, method):
    calls = []
    result = denoise(
        gaussian,
        noisy,
        None,
        DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=7, method=method),
        generator=seeded(),
        callback=lambda *args: calls.append(args),
    )
    steps, levels, states, estimates = zip(*calls, strict=True)
    assert list(steps) == list(range(len(calls)))
    assert all(a > b for a, b in itertools.pairwise(levels))
    torch.testing.assert_close(states[0], noisy)
    torch.testing.assert_close(estimates[-1], result)
    for t, x, x0 in zip(levels, states, estimates, strict=True):
        torch.testing.assert_close(x0, gaussian(x, None, torch.tensor([t], dtype=x.dtype)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0, 1])], ids=["unlabelled", "labelled"])
def test_labels_reach_the_denoiser(noisy, method, labels):
    recorder = Recorder()
    denoise(
        recorder,
        noisy,
        labels,
        DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=4, method=method),
        generator=seeded(),
    )
    assert all(seen is labels for seen in recorder.labels)


@pytest.mark.parametrize("method", METHODS)
def test_clip_limits_the_estimates_and_not_the_path(method):
    noisy, calls = torch.full((1, 1, 2, 2), 8.0), []
    result = denoise(
        lambda noisy, labels, noise_level: 3 * noisy,
        noisy,
        None,
        DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=5, method=method, clip=True),
        generator=seeded(),
        callback=lambda i, t, x, x0: calls.append((x, x0)),
    )
    assert all(x0.abs().max() <= 1 for _, x0 in calls)
    assert calls[1][0].abs().max() > 1
    torch.testing.assert_close(result, torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_path_is_followed_in_at_least_float32(noisy, method, dtype):
    result = denoise(
        gaussian,
        noisy.to(dtype),
        None,
        DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=4, method=method),
        generator=seeded(),
    )
    assert result.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_noisy_images_are_not_mutated(noisy, method):
    noisy = noisy.float()
    original = noisy.clone()
    denoise(
        gaussian,
        noisy,
        None,
        DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=4, method=method),
        generator=seeded(),
    )
    assert torch.equal(noisy, original)


# The stochastic one


def test_sde_reaches_the_variance_of_the_data():
    noisy = torch.randn(1, 1, 256, 256, generator=seeded(1)) * math.hypot(STD, T_MAX)
    clean = denoise(
        gaussian,
        noisy,
        None,
        DenoiseScheduler(t_max=T_MAX, t_min=0.005, num_denoise_steps=200, method="sde"),
        generator=seeded(),
    )
    assert clean.var().item() == pytest.approx(STD**2, rel=0.03)


def test_sde_forgets_most_of_its_start_and_the_ode_none():
    noisy = torch.randn(1, 1, 64, 64, generator=seeded(1)) * math.hypot(STD, T_MAX)
    for method, low, high in (("euler", 0.999, 1.001), ("sde", 0.2, 0.7)):
        clean = denoise(
            gaussian,
            noisy,
            None,
            DenoiseScheduler(t_max=T_MAX, t_min=0.01, num_denoise_steps=100, method=method),
            generator=seeded(),
        )
        assert low < torch.corrcoef(torch.stack([noisy.flatten(), clean.flatten()]))[0, 1] < high


def test_sde_image_depends_on_its_own_generator_alone(noisy):
    kwargs = {"t_max": T_MAX, "t_min": T_MIN, "num_denoise_steps": 5, "method": "sde"}
    together = denoise(gaussian, noisy, None, DenoiseScheduler(**kwargs), generator=[seeded(i) for i in range(3)])
    for i in range(3):
        alone = denoise(gaussian, noisy[i : i + 1], None, DenoiseScheduler(**kwargs), generator=[seeded(i)])
        torch.testing.assert_close(together[i : i + 1], alone)
    other = denoise(gaussian, noisy, None, DenoiseScheduler(**kwargs), generator=[seeded(i + 1) for i in range(3)])
    assert not torch.allclose(together, other, atol=0.01)


def test_the_noise_of_a_seed_depends_on_no_type(noisy):
    schedule = DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=5, method="sde")
    found = [denoise(gaussian, noisy.to(dtype), None, schedule, generator=seeded()) for dtype in (torch.float32, None)]
    torch.testing.assert_close(found[0].double(), found[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ODE_METHODS)
def test_the_ode_draws_nothing(noisy, method):
    generator = seeded()
    before = generator.get_state()
    denoise(
        gaussian,
        noisy,
        None,
        DenoiseScheduler(t_max=T_MAX, t_min=T_MIN, num_denoise_steps=4, method=method),
        generator=generator,
    )
    assert torch.equal(generator.get_state(), before)


# With a flow


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10])
def test_no_method_leaves_the_trained_range(make_flow, method, spacing, num_steps):
    flow = make_flow(fresh=True, noise_range=(0.01, 0.3))
    noisy = 0.3 * torch.randn(2, 2, 4, 4, generator=seeded())
    kwargs = {"t_max": 0.3, "t_min": 0.01, "num_denoise_steps": num_steps, "method": method, "spacing": spacing}
    assert (
        denoise(FlowDenoiser(flow), noisy, torch.tensor([0, 1]), DenoiseScheduler(**kwargs), generator=seeded())
        .isfinite()
        .all()
    )


# Refusals


IMPOSSIBLE = [
    ({"method": "dpm"}, "method is 'dpm'.*euler, heun, multistep, predictor-corrector, sde"),
    ({"spacing": "log"}, "spacing is 'log'.*even, quadratic"),
    ({"spacing": "log", "num_denoise_steps": 1}, "spacing is 'log'"),
    ({"num_denoise_steps": 0}, "num_denoise_steps is 0.*from 1 "),
    ({"num_denoise_steps": 0, "method": "heun"}, "num_denoise_steps is 0.*from 1 "),
    ({"num_denoise_steps": -3}, "num_denoise_steps is -3"),
    ({"t_max": 0.0}, r"t_max is 0\.0.*finite number from 1e-18 "),
    ({"t_max": math.inf}, "t_max is inf"),
    ({"t_max": math.nan}, "t_max is nan"),
    ({"t_min": 0.0}, r"t_min is 0\.0.*from 1e-18 "),
    ({"t_min": 1e-320}, "t_min is 1e-320"),
    ({"t_max": 1e308}, r"t_max is 1e\+308"),
    ({"num_denoise_steps": 2_000_000_000}, "num_denoise_steps is 2000000000.*to 100,000"),
    ({"num_denoise_steps": 2.0}, r"num_denoise_steps is 2\.0"),
    ({"num_denoise_steps": True}, "num_denoise_steps is True"),
    ({"clip": 1}, "clip is 1; expected True or False"),
    ({"method": ["euler"]}, r"method is \['euler'\]"),
    ({"t_min": 0.3}, r"t_min=0\.3, t_max=0\.3"),
    ({"t_min": 0.5, "method": "heun"}, r"t_min=0\.5, t_max=0\.3"),
]


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE, ids=str)
def test_impossible_schedules_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        DenoiseScheduler(**{"t_max": 0.3, "t_min": 0.01} | changes)


def test_a_scheduler_is_stored_beside_the_weights(tmp_path):
    values = {
        "t_max": 0.5,
        "t_min": 0.02,
        "num_denoise_steps": 7,
        "method": "heun",
        "clip": True,
        "spacing": "quadratic",
    }
    DenoiseScheduler(**values).save_pretrained(tmp_path)
    loaded = DenoiseScheduler.from_pretrained(tmp_path).config
    assert {name: loaded[name] for name in values} == values


def test_a_scheduler_stored_before_there_were_spacings_is_even(tmp_path):
    stored = {
        "_class_name": "DenoiseScheduler",
        "t_max": 0.5,
        "t_min": 0.02,
        "num_denoise_steps": 7,
        "method": "euler",
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(stored))
    assert DenoiseScheduler.from_pretrained(tmp_path).config.spacing == "even"


def test_t_min_plays_no_part_in_a_single_step(noisy):
    torch.testing.assert_close(
        denoise(gaussian, noisy, None, DenoiseScheduler(t_max=0.3, t_min=0.3, num_denoise_steps=1)),
        noisy * STD**2 / (STD**2 + 0.3**2),
    )


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_generators_is_refused(noisy, count):
    generators = [seeded(i) for i in range(count)]
    with pytest.raises(ValueError, match=f"{count} generators.*3"):
        denoise(gaussian, noisy, None, DenoiseScheduler(t_max=0.3, t_min=0.01, method="sde"), generator=generators)
