import math

import pytest
import torch
from tiny_flows import condition_of

from itarflow.inverse import Guidance, guide

RULES = ["log_scale", "scale", "gaussian"]


def affine(seed, *shape):
    shift, log_scale = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return shift, 0.5 * log_scale


def guide_by_hand(rule, conditional, guiding, weight):
    (m, a), (m_u, a_u) = conditional, guiding
    if rule == "log_scale":
        return (1 + weight) * m - weight * m_u, ((1 + weight) * a - weight * a_u).exp()
    if rule == "scale":
        return (1 + weight) * m - weight * m_u, (1 + weight) * a.exp() - weight * a_u.exp()
    variance, variance_u = (2 * a).exp(), torch.maximum(2 * a, 2 * a_u).exp()
    precision = (1 + weight) / variance - weight / variance_u
    return ((1 + weight) * m / variance - weight * m_u / variance_u) / precision, precision**-0.5


@pytest.mark.parametrize("weight", [0.5, 2.0, 7.0])
def test_gaussian_rule_is_the_normalised_product_of_densities(weight):
    m, s, m_u, s_u = torch.tensor([0.4, 0.6, -0.3, 0.9], dtype=torch.float64).view(4, 1, 1, 1)
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    log_density = -(1 + weight) * (x - m) ** 2 / (2 * s**2) + weight * (x - m_u) ** 2 / (2 * s_u**2)
    density = log_density.softmax(-1)
    mean = (density * x).sum(-1, keepdim=True)
    std = (density * (x - mean) ** 2).sum(-1, keepdim=True).sqrt()
    guidance = Guidance(weight=weight, rule="gaussian")
    result = guide((m, s.log()), (m_u, s_u.log()), torch.full((1, 1), weight), guidance)
    torch.testing.assert_close(result, (mean, std))


@pytest.mark.parametrize("weight", [0.5, 50.0])
def test_gaussian_rule_stays_a_density_where_the_product_is_none(weight):
    one = torch.ones(1, 1, 1)
    wide, narrow = (one, 0.7 * one), (0 * one, -2 * one)
    shift, scale = guide(wide, narrow, torch.full((1, 1), weight), Guidance(weight=weight, rule="gaussian"))
    torch.testing.assert_close((shift, scale), ((1 + weight) * one, math.exp(0.7) * one))


def test_scale_rule_may_turn_the_scale_negative():
    one = torch.ones(1, 1, 1)
    _, scale = guide((0 * one, 0 * one), (0 * one, one), torch.full((1, 1), 2.0), Guidance(weight=2, rule="scale"))
    torch.testing.assert_close(scale, (3 - 2 * math.e) * one)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_moved_without_weight_or_difference(rule):
    conditional = affine(0, 2, 5, 3)
    for weight, guiding in ((0.0, affine(1, 2, 5, 3)), (4.0, affine(0, 2, 5, 3))):
        weights = torch.full((5, 1), weight, dtype=torch.float64)
        shift, scale = guide(conditional, guiding, weights, Guidance(rule=rule))
        torch.testing.assert_close((shift, scale), (conditional[0], conditional[1].exp()))


@pytest.mark.parametrize(
    ("rule", "guided"), [("log_scale", "shift"), ("scale", "scale"), ("gaussian", "shift"), ("gaussian", "scale")]
)
def test_shift_and_scale_are_guided_separately(rule, guided):
    conditional, guiding = affine(0, 2, 5, 3), affine(1, 2, 5, 3)
    weights = torch.full((5, 1), 1.5, dtype=torch.float64)
    both = dict(zip(("shift", "scale"), guide(conditional, guiding, weights, Guidance(rule=rule)), strict=True))
    neither = {"shift": conditional[0], "scale": conditional[1].exp()}
    only = Guidance(rule=rule, shift=guided == "shift", scale=guided == "scale")
    shift, scale = guide(conditional, guiding, weights, only)
    expected = neither | {guided: both[guided]}
    torch.testing.assert_close((shift, scale), (expected["shift"], expected["scale"]))


def test_constant_schedule_gives_every_token_the_weight():
    weights = Guidance(weight=3.0, schedule="constant").weights(torch.arange(5), 5, torch.float32)
    torch.testing.assert_close(weights, torch.full((5, 1), 3.0))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_weights_of_windows_are_those_of_the_whole(schedule):
    guidance = Guidance(weight=2.1, schedule=schedule)
    windows = [guidance.weights(part, 7, torch.float32) for part in torch.arange(7).split([1, 3, 3])]
    assert torch.equal(torch.cat(windows), guidance.weights(torch.arange(7), 7, torch.float32))


@pytest.mark.parametrize(("schedule", "weight"), [("constant", 2.0), ("linear", 0.0)])
def test_a_single_token_has_a_finite_weight(schedule, weight):
    assert Guidance(weight=2.0, schedule=schedule).weights(torch.arange(1), 1, torch.float32).tolist() == [[weight]]


@pytest.mark.parametrize(
    ("blocks", "guided"),
    [
        (None, [0, 1, 2]),
        (0, []),
        (1, [0]),
        (2, [0, 1]),
        (9, [0, 1, 2]),
        ((1,), [1]),
        ([2, 0], [0, 2]),
        ((), []),
    ],
    ids=str,
)
def test_blocks_are_counted_from_the_noise_side(blocks, guided):
    guidance = Guidance(weight=1.0, blocks=blocks)
    assert [block for block in range(3) if guidance.guides(block)] == guided


@pytest.mark.parametrize("off", [{}, {"temperature": 2.0}, {"weight": 1.0, "shift": False, "scale": False}], ids=str)
def test_guidance_that_would_change_nothing_guides_no_block(off):
    assert not Guidance(**off).guides(0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": -0.5}, r"weight is -0\.5"),
        ({"weight": math.inf}, "weight is inf"),
        ({"weight": math.nan}, "weight is nan"),
        ({"rule": "cfg"}, "rule is 'cfg'.*log_scale, scale, gaussian"),
        ({"schedule": "cosine"}, "schedule is 'cosine'.*constant, linear"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"blocks": -1}, "blocks is -1"),
        ({"blocks": (0, -2)}, r"blocks is \(0, -2\)"),
        ({"blocks": math.nan}, "blocks is nan"),
        ({"blocks": ""}, "blocks is ''"),
        ({"blocks": True}, "blocks is True"),
        ({"blocks": (0, 1.0)}, r"blocks is \(0, 1\.0\)"),
        ({"weight": 10**30}, "weight is 1000+; expected a finite number >= 0 "),
        ({"weight": "2"}, "weight is '2'"),
        ({"temperature": 1e308}, r"temperature is 1e\+308"),
        ({"shift": None}, "shift is None; expected True or False"),
    ],
)
def test_impossible_guidance_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Guidance(**changes)


def sample_by_hand(flow, z, labels, noise_level, guidance):
    """The guided inverse in two separate passes over the growing sequence: no cache, no shared batch, no solver."""
    x = z
    for number, block in enumerate(reversed(flow.blocks)):
        z = x.flip(1) if block.reverse else x
        x = z[:, :0]
        passes = (
            condition_of(flow, block, labels, noise_level),
            condition_of(flow, block, None, noise_level, guidance.temperature),
        )
        for n in range(block.num_tokens):
            conditional, guiding = (
                block.first_affine(c) if n == 0 else [a[:, -1:] for a in block.affine_at(x, c)] for c in passes
            )
            weight = guidance.weight * (n / (block.num_tokens - 1) if guidance.schedule == "linear" else 1)
            guided = guidance.blocks is None or number < guidance.blocks
            shift, scale = guide_by_hand(guidance.rule, conditional, guiding, weight if guided else 0.0)
            x = torch.cat([x, z[:, n : n + 1] * scale + shift], dim=1)
        x = x.flip(1) if block.reverse else x
    return x


@pytest.fixture
def labelled(make_flow):
    return make_flow(num_layers=(1, 2, 1), learned_first_token=True).double()


@pytest.fixture
def inputs(labelled, make_inputs):
    images, labels, noise_level = make_inputs(labelled)
    return labelled(images, labels, noise_level).z.detach(), labels, noise_level


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "log_scale", "schedule": "linear"},
        {"rule": "log_scale", "schedule": "constant", "temperature": 0.5, "blocks": 2},
        {"rule": "scale", "schedule": "constant"},
        {"rule": "gaussian", "schedule": "linear", "blocks": 1},
        {"rule": "gaussian", "schedule": "constant", "temperature": 0.5},
    ],
    ids=str,
)
def test_guided_sampling_in_one_batch_equals_two_passes_by_hand(labelled, inputs, settings):
    guidance = Guidance(weight=1.5, **settings)
    tokens = sample_by_hand(labelled, *inputs, guidance)
    expected = tokens.view(3, 2, 2, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 2, 4, 4)
    torch.testing.assert_close(labelled.inverse(*inputs, guidance=guidance), expected)
    assert not torch.allclose(expected, labelled.inverse(*inputs), atol=0.01)


def test_default_guidance_is_none(labelled, inputs):
    assert torch.equal(labelled.inverse(*inputs, guidance=Guidance()), labelled.inverse(*inputs))


def test_guidance_by_labels_changes_nothing_without_labels(labelled, inputs):
    z, _, noise_level = inputs
    guided = labelled.inverse(z, None, noise_level, guidance=Guidance(weight=2.0))
    torch.testing.assert_close(guided, labelled.inverse(z, None, noise_level))


def test_an_unlabelled_image_in_a_guided_batch_is_left_alone(labelled, inputs):
    z, _, noise_level = inputs
    labels = torch.tensor([0, labelled.null_label, 2])
    guided = labelled.inverse(z, labels, noise_level, guidance=Guidance(weight=2.0))
    plain = labelled.inverse(z, labels, noise_level)
    torch.testing.assert_close(guided[1], plain[1])
    assert not torch.allclose(guided[::2], plain[::2], atol=0.01)


@pytest.mark.parametrize("rule", RULES)
def test_a_model_without_labels_is_guided_by_temperature_alone(make_flow, make_inputs, rule):
    flow = make_flow(num_classes=0).double()
    images, _, noise_level = make_inputs(flow)
    z = flow(images, None, noise_level).z.detach()
    guidances = [Guidance(weight=2.0, rule=rule, temperature=temperature) for temperature in (1.0, 0.5)]
    plain, tempered = (flow.inverse(z, None, noise_level, guidance=guidance) for guidance in guidances)
    torch.testing.assert_close(plain, images)
    assert not torch.allclose(tempered, images, atol=1e-3)


def test_a_volume_preserving_flow_keeps_its_scale_when_guided(make_flow, make_inputs):
    flow = make_flow(volume_preserving=True, num_layers=(1,)).double()
    images, labels, noise_level = make_inputs(flow)
    z = flow(images, labels, noise_level).z.detach()
    samples = [flow.inverse(z, labels, noise_level, guidance=Guidance(weight=2.0, rule=rule)) for rule in RULES]
    torch.testing.assert_close(samples, [samples[0]] * 3)
