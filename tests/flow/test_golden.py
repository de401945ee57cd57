"""Our code against what the official code gave for the same weights and inputs; see tests/golden/README.md."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import golden_cases
import pytest
import torch
from golden_cases import KNOWN_QUIRKS, OF_TRAINING, RTOL, Case, Comparison, compare, golden_calls, load_cases

from itarflow.denoisers import FlowDenoiser
from itarflow.flow.density import LOG_2PI
from itarflow.inverse import Guidance

CALLS = golden_calls()
# Relative to a tensor's largest value. The official float32 results are themselves up to 1e-6 off float64.
LARGEST_DEVIATION = 2e-5


@pytest.fixture(scope="module")
def comparisons() -> dict[tuple[str, str], list[Comparison]]:
    """All comparisons made so far, by case and call, so that each call runs once."""
    return {}


def compared(
    comparisons: dict[tuple[str, str], list[Comparison]], case: Case, call: dict[str, Any]
) -> list[Comparison]:
    key = case.name, call["id"]
    if key not in comparisons:
        comparisons[key] = list(compare(case, call))
    return comparisons[key]


def case_named(name: str) -> Case:
    return next(case for case in load_cases() if case.name == name)


def assert_agrees(pair: Comparison) -> None:
    torch.testing.assert_close(
        pair.ours,
        pair.expected,
        rtol=RTOL,
        atol=pair.tolerance,
        msg=lambda text: f"{pair.case} {pair.call}.{pair.tensor}: {text}",
    )


@pytest.mark.parametrize("name", sorted({case.name for case, _ in CALLS}))
def test_every_call_of_a_case_gives_what_the_official_code_gave(comparisons, name):
    for case, call in CALLS:
        for pair in compared(comparisons, case, call) if case.name == name else ():
            assert_agrees(pair)


def test_no_kind_of_tensor_deviates_by_more_than_rounding(comparisons, record_property):
    largest: dict[str, float] = defaultdict(float)
    for case, call in CALLS:
        for pair in compared(comparisons, case, call):
            largest[pair.kind] = max(largest[pair.kind], pair.relative)
    for kind, deviation in sorted(largest.items()):
        record_property(kind, f"{deviation:.2e}")
    too_large = {kind: deviation for kind, deviation in largest.items() if not deviation <= LARGEST_DEVIATION}
    assert not too_large
    assert {"z", "logdets", "grad.x", "grad.param", "x", "seq", "trace.x0", "score", "log_prob", "bpd"} <= set(largest)


def test_every_recorded_tensor_is_compared_or_left_out_by_name(comparisons):
    outputs = [(case.name, name) for case in load_cases() for name in case.tensors if not name.startswith("in.")]
    seen = {
        (pair.case, f"{pair.call}.{pair.tensor}") for case, call in CALLS for pair in compared(comparisons, case, call)
    }
    of_training = {(case, name) for case, name in outputs if OF_TRAINING.fullmatch(name)}
    assert {case for case, _ in of_training} == {"lr_schedule", "lr_schedule_tarflow", "noise_schedules"}
    assert set(outputs) == seen | KNOWN_QUIRKS | of_training
    assert len(outputs) == len(seen) + len(KNOWN_QUIRKS) + len(of_training)


def test_null_label_means_the_mean_class_in_sampling_too():
    case = case_named("itarflow_sample_quirk_yneg")
    flow, official = case.flow(), case.tensors["official.x"]
    noise, labels, level = case.tensors["in.noise"], case.tensors["in.y"], case.tensors["in.t"][:, 0]
    assert labels[0] == flow.null_label
    ours = flow.inverse(noise, labels, level)
    torch.testing.assert_close(ours[0], flow.inverse(noise, None, level)[0], rtol=RTOL, atol=1e-5)
    # The samples with a label agree with the official ones, the unlabelled one is not the last class.
    torch.testing.assert_close(ours[1:], official[1:], rtol=RTOL, atol=golden_cases.ATOL)
    assert (ours[0] - official[0]).abs().max() > 0.01
    torch.testing.assert_close(flow(ours, labels, level).z, noise, rtol=RTOL, atol=1e-4)


@pytest.mark.parametrize("what", ["a", "b"])
def test_guiding_scale_or_shift_alone_differs_from_guiding_both(what):
    case = case_named("itarflow_sample_guide_what")
    call = next(call for call in case.calls if call["id"] == what)
    inputs = case.inputs(call)
    guidance = golden_cases.guidance_of(case, call)
    assert (guidance.scale, guidance.shift) == (what == "a", what == "b")
    ours = case.flow().inverse(inputs["x"], inputs["y"], inputs["t"][:, 0], guidance=guidance)
    # The official code ignores `what`, so its results for "a", "b" and "ab" are the same.
    assert torch.equal(case.tensors[f"{what}.x"], case.tensors["ab.x"])
    assert (ours - case.tensors["ab.x"]).abs().max() > 0.01


def test_product_of_gaussians_does_not_mix_samples():
    case = case_named("itarflow_sample_starflow")
    tensors = case.tensors
    guidance = Guidance(weight=2.0, rule="gaussian", schedule="linear", blocks=1)
    alone = torch.cat(
        [
            case.flow().inverse(noise[None], label[None], level, guidance=guidance)
            for noise, label, level in zip(tensors["in.noise"], tensors["in.y"], tensors["in.t"], strict=True)
        ]
    )
    torch.testing.assert_close(alone, tensors["annealed.x"], rtol=RTOL, atol=golden_cases.ATOL)
    assert (alone - tensors["official_batched_bug_annealed.x"]).abs().max() > 0.01


def test_score_is_the_gradient_of_the_official_density():
    """The golden score comes from the official loss; here by finite differences of our density, in float64."""
    case = case_named("itarflow_denoise_tweedie")
    x, labels, level = (case.tensors[name] for name in ("in.x", "in.y", "in.t"))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = FlowDenoiser(case.flow()).flow.double()
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (flow.log_prob(x + sign * step * direction, labels, level[:, 0]) for sign in (1, -1))
    slope = (case.tensors["score.score"] * direction).sum(dim=(1, 2, 3))
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-4, atol=1e-2)


def test_volume_preserving_density_uses_the_learned_variance():
    """The official density ignores it, so there is no golden value: add it to the official unit one by hand."""
    case = case_named("itarflow_vp")
    flow, tensors = case.flow(), case.tensors
    with torch.no_grad():
        ours = flow.log_prob(tensors["in.x"], tensors["in.y"], tensors["in.t"][:, 0])
    z, variance = tensors["train.z"], flow.prior_variance
    expected = -0.5 * (z.square() / variance + variance.log() + LOG_2PI).sum(dim=(1, 2))
    torch.testing.assert_close(ours, expected, rtol=RTOL, atol=1e-3)
    unit = -0.5 * z.square().sum(dim=(1, 2)) - 0.5 * z[0].numel() * math.log(2 * math.pi)
    assert (ours - unit).abs().max() > 1
