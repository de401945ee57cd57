import itertools
import json
import math

import pytest
import torch

from itarflow.denoise import DenoiseScheduler, denoise, noise_levels
from itarflow.score import FlowDenoiser

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


@pytest.mark.parametrize(
    (
        "method",
        "order",
        "t_min",
    ),  # the predictor-corrector's error at 0.01 is so small that its order shows only later
    [("euler", 1, T_MIN), ("heun", 2, T_MIN), ("multistep", 2, T_MIN), ("predictor-corrector", 2, 0.3)],
)
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_order_of_convergence(noisy, method, order, t_min, odd, spacing):
    exact = gaussian(path(noisy, T_MAX, t_min), None, torch.tensor([t_min]))  # the last step is Tweedie's

    def error(num_steps):
        result = denoise(
            gaussian, noisy, t_max=T_MAX, t_min=t_min, num_steps=num_steps, method=method, spacing=spacing
        )
        return (result - exact).abs().max().item()

    measured = math.log2(error(80 + odd) / error(160 + odd))
    assert measured == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", ODE_METHODS)
def test_many_steps_follow_the_exact_path(noisy, method):
    result = denoise(gaussian, noisy, t_max=T_MAX, t_min=1e-4, num_steps=400, method=method)
    torch.testing.assert_close(result, path(noisy, T_MAX, 0), rtol=5e-3, atol=0)


@pytest.mark.parametrize("method", ["heun", "multistep", "predictor-corrector"])
@pytest.mark.parametrize("num_steps", [9, 10, 20])
def test_second_order_beats_euler_at_equal_cost(noisy, method, num_steps):
    results = [
        denoise(gaussian, noisy, t_max=T_MAX, t_min=T_MIN, num_steps=num_steps, method=m) for m in (method, "euler")
    ]
    error, error_of_euler = ((result - path(noisy, T_MAX, 0)).abs().max() for result in results)
    assert error < error_of_euler


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", range(3, 31))
def test_the_predictor_corrector_beats_euler_at_equal_cost(noisy, spacing, num_steps):
    def error(method):
        result = denoise(
            gaussian, noisy, t_max=T_MAX, t_min=T_MIN, num_steps=num_steps, method=method, spacing=spacing
        )
        return (result - gaussian(path(noisy, T_MAX, T_MIN), None, torch.tensor([T_MIN]))).abs().max()

    assert error("predictor-corrector") < error("euler")


def test_the_predictor_corrector_is_eulers_with_two_steps(noisy):
    """There is nothing yet to extend a line through, and nothing left to correct."""
    kwargs = {"t_max": T_MAX, "t_min": T_MIN, "num_steps": 2}
    torch.testing.assert_close(
        denoise(gaussian, noisy, **kwargs, method="predictor-corrector"), denoise(gaussian, noisy, **kwargs)
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_predictor_corrector_is_exact_for_estimates_linear_in_t(noisy, spacing):
    """From the third level on: the first step, Euler's, is corrected as soon as the second estimate is known."""
    states = []
    denoise(
        lambda noisy, labels, noise_level: torch.ones_like(noisy) + 2 * noise_level.view(-1, 1, 1, 1),
        noisy,
        t_max=T_MAX,
        t_min=T_MIN,
        num_steps=6,
        method="predictor-corrector",
        spacing=spacing,
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
        t_max=T_MAX,
        t_min=T_MIN,
        num_steps=num_steps,
        method=method,
        spacing=spacing,
        generator=seeded(),
    )
    assert len(recorder.levels) == num_steps
    assert recorder.levels[0] == T_MAX
    assert recorder.levels[-1] == (T_MIN if num_steps > 1 else T_MAX)


@pytest.mark.parametrize("method", METHODS)
def test_one_step_is_tweedies(noisy, method):
    result = denoise(gaussian, noisy, t_max=T_MAX, t_min=T_MIN, num_steps=1, method=method, generator=seeded())
    torch.testing.assert_close(result, noisy * STD**2 / (STD**2 + T_MAX**2))


@pytest.mark.parametrize("method", ["euler", "multistep", "predictor-corrector", "sde"])
def test_levels_fall_evenly_from_t_max_to_t_min(noisy, method):
    recorder, seen = Recorder(), []
    denoise(
        recorder,
        noisy,
        t_max=0.9,
        t_min=0.1,
        num_steps=5,
        method=method,
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
    denoise(recorder, noisy, t_max=0.9, t_min=0.1, num_steps=num_steps, method="heun")
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
        t_max=T_MAX,
        t_min=T_MIN,
        num_steps=7,
        method=method,
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
    denoise(recorder, noisy, labels, t_max=T_MAX, t_min=T_MIN, num_steps=4, method=method, generator=seeded())
    assert all(seen is labels for seen in recorder.labels)


@pytest.mark.parametrize("method", METHODS)
def test_clip_limits_the_estimates_and_not_the_path(method):
    noisy, calls = torch.full((1, 1, 2, 2), 8.0), []
    result = denoise(
        lambda noisy, labels, noise_level: 3 * noisy,
        noisy,
        t_max=T_MAX,
        t_min=T_MIN,
        num_steps=5,
        method=method,
        clip=True,
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
        gaussian, noisy.to(dtype), t_max=T_MAX, t_min=T_MIN, num_steps=4, method=method, generator=seeded()
    )
    assert result.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_noisy_images_are_not_mutated(noisy, method):
    noisy = noisy.float()
    original = noisy.clone()
    denoise(gaussian, noisy, t_max=T_MAX, t_min=T_MIN, num_steps=4, method=method, generator=seeded())
    assert torch.equal(noisy, original)


# The stochastic one


def test_sde_reaches_the_variance_of_the_data():
    noisy = torch.randn(1, 1, 256, 256, generator=seeded(1)) * math.hypot(STD, T_MAX)
    clean = denoise(gaussian, noisy, t_max=T_MAX, t_min=0.005, num_steps=200, method="sde", generator=seeded())
    assert clean.var().item() == pytest.approx(STD**2, rel=0.03)


def test_sde_forgets_most_of_its_start_and_the_ode_none():
    noisy = torch.randn(1, 1, 64, 64, generator=seeded(1)) * math.hypot(STD, T_MAX)
    for method, low, high in (("euler", 0.999, 1.001), ("sde", 0.2, 0.7)):
        clean = denoise(gaussian, noisy, t_max=T_MAX, t_min=0.01, num_steps=100, method=method, generator=seeded())
        assert low < torch.corrcoef(torch.stack([noisy.flatten(), clean.flatten()]))[0, 1] < high


def test_sde_replaces_noise_in_the_share_that_keeps_its_level():
    noisy = torch.randn(1, 1, 256, 256, generator=seeded(1))
    states = []
    denoise(
        lambda noisy, labels, noise_level: torch.zeros_like(noisy),
        noisy,
        t_max=1.0,
        t_min=0.5,
        num_steps=2,
        method="sde",
        generator=seeded(2),
        callback=lambda i, t, x, x0: states.append(x),
    )
    kept = 0.5**2 * noisy  # (t_next / t) of the noise in size, of which again (t_next / t) is old
    fresh = states[1] - kept
    assert states[1].std().item() == pytest.approx(0.5, rel=0.01)
    assert fresh.std().item() == pytest.approx(math.sqrt(0.5**2 - 0.5**4), rel=0.01)


def test_sde_image_depends_on_its_own_generator_alone(noisy):
    kwargs = {"t_max": T_MAX, "t_min": T_MIN, "num_steps": 5, "method": "sde"}
    together = denoise(gaussian, noisy, generator=[seeded(i) for i in range(3)], **kwargs)
    for i in range(3):
        alone = denoise(gaussian, noisy[i : i + 1], generator=[seeded(i)], **kwargs)
        torch.testing.assert_close(together[i : i + 1], alone)
    other = denoise(gaussian, noisy, generator=[seeded(i + 1) for i in range(3)], **kwargs)
    assert not torch.allclose(together, other, atol=0.01)


@pytest.mark.parametrize("method", ODE_METHODS)
def test_the_ode_draws_nothing(noisy, method):
    generator = seeded()
    before = generator.get_state()
    denoise(gaussian, noisy, t_max=T_MAX, t_min=T_MIN, num_steps=4, method=method, generator=generator)
    assert torch.equal(generator.get_state(), before)


# The score of a flow


def test_score_and_tweedie_of_gaussian_data_are_exact(make_flow):
    """The identity flow, scaled by 1 / sqrt(s^2 + t^2), is the density of Gaussian data under noise t."""
    std, t = 0.5, 0.3
    flow = make_flow(fresh=True, input_scale=1 / math.hypot(std, t)).double()
    noisy = torch.randn(3, 2, 4, 4, generator=seeded(), dtype=torch.float64)
    denoiser = FlowDenoiser(flow)
    torch.testing.assert_close(denoiser.score(noisy, None, t), -noisy / (std**2 + t**2))
    torch.testing.assert_close(denoiser(noisy, None, t), noisy * std**2 / (std**2 + t**2), atol=1e-6, rtol=1e-6)


def test_score_is_the_finite_difference_of_log_prob(flow, make_inputs):
    flow.double()
    images, labels, noise_level = make_inputs(flow)
    score = FlowDenoiser(flow).score(images, labels, 0.3 if noise_level is None else noise_level)
    step, dims = 1e-5, images[0].numel()
    steps = step * torch.eye(dims, dtype=images.dtype).view(dims, *flow.image_shape)
    for i in range(len(images)):
        rest = [None if v is None else v[i : i + 1].expand(dims) for v in (labels, noise_level)]
        difference = flow.log_prob(images[i] + steps, *rest) - flow.log_prob(images[i] - steps, *rest)
        torch.testing.assert_close(score[i].flatten(), difference.detach() / (2 * step), atol=1e-6, rtol=1e-6)


def test_denoiser_is_tweedies_formula_with_each_images_level(make_flow, make_inputs):
    flow = make_flow()
    images, labels, noise_level = make_inputs(flow)
    denoiser = FlowDenoiser(flow)
    expected = images + noise_level.view(3, 1, 1, 1) ** 2 * denoiser.score(images, labels, noise_level)
    torch.testing.assert_close(denoiser(images, labels, noise_level), expected)


@pytest.mark.parametrize("noise_level", [torch.full((5,), 0.2), torch.tensor(0.2)], ids=["batch", "scalar"])
def test_one_noise_level_stands_for_all(make_flow, make_inputs, noise_level):
    flow = make_flow()
    images, labels, _ = make_inputs(flow, 5)
    denoiser = FlowDenoiser(flow)
    torch.testing.assert_close(denoiser(images, labels, noise_level), denoiser(images, labels, 0.2))


@pytest.mark.parametrize("slice_size", [1, 2, 5, 9])
def test_slices_change_no_score(make_flow, make_inputs, slice_size):
    flow = make_flow()
    images, labels, noise_level = make_inputs(flow, 5)
    batches = []
    sliced = FlowDenoiser(flow, slice_size)
    sliced.flow.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    expected = FlowDenoiser(flow).score(images, labels, noise_level)
    torch.testing.assert_close(sliced.score(images, labels, noise_level), expected)
    assert (max(batches), sum(batches)) == (min(slice_size, 5), 5)


def test_score_without_labels_is_that_of_null_labels(make_flow, make_inputs):
    flow = make_flow()
    images, _, noise_level = make_inputs(flow)
    denoiser = FlowDenoiser(flow, slice_size=2)
    null = torch.full((3,), flow.null_label)
    assert torch.equal(denoiser.score(images, None, noise_level), denoiser.score(images, null, noise_level))
    assert not torch.equal(denoiser.score(images, null, noise_level), denoiser.score(images, null + 1, noise_level))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_callers_flow_is_only_read(flow, make_inputs, checkpointing):
    images, labels, noise_level = make_inputs(flow)
    frozen = next(flow.parameters())
    frozen.requires_grad_(False)
    flow.train()
    if checkpointing:
        flow.enable_gradient_checkpointing()
    originals = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    inputs = [v if v is None else v.clone() for v in (images, labels, noise_level)]
    FlowDenoiser(flow)(images, labels, 0.3 if noise_level is None else noise_level)
    assert flow.training
    assert all(p.grad is None for p in flow.parameters())
    assert all(p.requires_grad == (p is not frozen) for p in flow.parameters())
    assert all(torch.equal(tensor, originals[name]) for name, tensor in flow.state_dict().items())
    for now, before in zip((images, labels, noise_level), inputs, strict=True):
        assert now is None or torch.equal(now, before)
    assert not images.requires_grad


def test_the_denoiser_shares_the_weights_and_differentiates_none(flow):
    view = FlowDenoiser(flow).flow
    theirs = {name: tensor.data_ptr() for name, tensor in (*flow.named_parameters(), *flow.named_buffers())}
    assert {n: tensor.data_ptr() for n, tensor in (*view.named_parameters(), *view.named_buffers())} == theirs
    modules = (view, *(shared for block in view.blocks for shared in block.backbone))
    assert not any(p.requires_grad for module in modules for p in module.parameters())


def test_weights_updated_in_place_are_seen(flow, make_inputs):
    images, labels, noise_level = make_inputs(flow)
    level = 0.3 if noise_level is None else noise_level
    denoiser = FlowDenoiser(flow)
    before = denoiser.score(images, labels, level)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.1)
    after = denoiser.score(images, labels, level)
    assert torch.equal(after, FlowDenoiser(flow).score(images, labels, level))
    assert not torch.allclose(after, before)


CONTEXTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("built_inside", [False, True])
def test_scores_are_the_same_in_every_gradient_mode(flow, make_inputs, context, built_inside):
    images, labels, noise_level = make_inputs(flow)
    level = 0.3 if noise_level is None else noise_level
    denoiser = FlowDenoiser(flow)
    expected = denoiser.score(images, labels, level)
    with context():
        if built_inside:
            denoiser = FlowDenoiser(flow)
        score = denoiser.score(*make_inputs(flow)[:2], level)  # inputs born in this mode
        clean = denoise(denoiser, images * 1, labels, t_max=0.3, t_min=0.1, num_steps=2)
    assert torch.equal(score, expected)
    assert not score.requires_grad
    assert not clean.requires_grad
    torch.testing.assert_close(denoiser.score(images, labels, level), expected)


def test_scores_of_half_precision_weights_are_float32(make_flow, make_inputs):
    flow = make_flow()
    images, labels, noise_level = make_inputs(flow)
    expected = FlowDenoiser(flow).score(images, labels, noise_level)
    score = FlowDenoiser(flow.to(torch.bfloat16)).score(images, labels, noise_level)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, expected, atol=0.1, rtol=0.02)


def test_half_precision_images_are_scored_in_float32(make_flow, make_inputs):
    flow = make_flow()
    images, labels, noise_level = make_inputs(flow)
    images = images.to(torch.bfloat16)
    score = FlowDenoiser(flow).score(images, labels, noise_level)
    assert score.dtype == torch.float32
    assert torch.equal(score, FlowDenoiser(flow).score(images.float(), labels, noise_level))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10])
def test_no_method_leaves_the_trained_range(make_flow, method, spacing, num_steps):
    flow = make_flow(fresh=True, noise_range=(0.01, 0.3))
    noisy = 0.3 * torch.randn(2, 2, 4, 4, generator=seeded())
    kwargs = {"t_max": 0.3, "t_min": 0.01, "num_steps": num_steps, "method": method, "spacing": spacing}
    assert denoise(FlowDenoiser(flow), noisy, torch.tensor([0, 1]), generator=seeded(), **kwargs).isfinite().all()


# Refusals


IMPOSSIBLE = [
    ({"method": "dpm"}, "method is 'dpm'.*euler, heun, multistep, predictor-corrector, sde"),
    ({"spacing": "log"}, "spacing is 'log'.*even, quadratic"),
    ({"spacing": "log", "num_denoise_steps": 1}, "spacing is 'log'"),
    ({"num_denoise_steps": 0}, "num_denoise_steps is 0.*>= 1"),
    ({"num_denoise_steps": 0, "method": "heun"}, "num_denoise_steps is 0.*>= 1"),
    ({"num_denoise_steps": -3}, "num_denoise_steps is -3"),
    ({"t_max": 0.0}, r"t_max is 0\.0.*> 0"),
    ({"t_max": math.inf}, "t_max is inf"),
    ({"t_max": math.nan}, "t_max is nan"),
    ({"t_min": 0.0}, r"t_min=0\.0.*expected 0 < t_min < t_max"),
    ({"t_min": 0.3}, r"t_min=0\.3, t_max=0\.3"),
    ({"t_min": 0.5, "method": "heun"}, r"t_min=0\.5, t_max=0\.3"),
]


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE, ids=str)
def test_impossible_paths_are_refused_before_the_first_step(noisy, changes, words):
    recorder = Recorder()
    kwargs = {"t_max": 0.3, "t_min": 0.01, "num_denoise_steps": 10} | changes
    with pytest.raises(ValueError, match=words):
        denoise(recorder, noisy, num_steps=kwargs.pop("num_denoise_steps"), **kwargs)
    assert recorder.levels == []


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE, ids=str)
def test_a_scheduler_refuses_what_denoise_would(changes, words):
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
        denoise(gaussian, noisy, t_max=0.3, t_min=0.3, num_steps=1), noisy * STD**2 / (STD**2 + 0.3**2)
    )


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_generators_is_refused(noisy, count):
    generators = [seeded(i) for i in range(count)]
    with pytest.raises(ValueError, match=f"{count} generators.*3"):
        denoise(gaussian, noisy, t_max=0.3, t_min=0.01, method="sde", generator=generators)


@pytest.mark.parametrize("slice_size", [0, -1])
def test_an_impossible_slice_is_refused(make_flow, slice_size):
    with pytest.raises(ValueError, match=f"slice_size is {slice_size}.*>= 1"):
        FlowDenoiser(make_flow(), slice_size)


@pytest.mark.parametrize(
    ("labels", "noise_level", "words"),
    [
        (torch.tensor([0, 3, 1]), 0.2, r"labels \[3\] are out of range"),
        (torch.tensor([0, 1]), 0.2, "labels have shape"),
        (torch.tensor([0, 1, 2, 0]), 0.2, "labels have shape"),
        (None, 0.5, r"outside \[0\.1, 0\.3\]"),
        (None, 0.0, r"outside \[0\.1, 0\.3\]"),
        (None, torch.full((2,), 0.2), r"noise_level has shape \(2,\)"),
    ],
    ids=str,
)
def test_the_score_refuses_what_log_prob_refuses(make_flow, make_inputs, labels, noise_level, words):
    flow = make_flow(noise_range=(0.1, 0.3))
    images = make_inputs(flow).images
    with pytest.raises(ValueError, match=words):
        FlowDenoiser(flow).score(images, labels, noise_level)


def test_the_score_refuses_images_of_another_shape(make_flow):
    with pytest.raises(ValueError, match="images have shape"):
        FlowDenoiser(make_flow()).score(torch.zeros(2, 2, 4, 5), None, 0.2)
