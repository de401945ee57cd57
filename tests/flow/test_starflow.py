"""What STARFlow's blocks have beside TARFlow's: rotary positions, a prefix of condition vectors, another head."""

import itertools
import math

import pytest
import torch
from tiny_flows import STARFLOW_TEXT, VARIANTS, randomise
from torch.autograd.functional import jacobian

from itarflow.denoisers import DenoiseScheduler, FlowDenoiser, denoise
from itarflow.flow import TARFlow, nll_per_dim
from itarflow.flow.embedding import RotaryPositions
from itarflow.inverse import Guidance, Jacobi, sequential

LABELS = VARIANTS["starflow"]
GUIDANCE = Guidance(weight=1.5, rule="gaussian", schedule="constant")
close = torch.testing.assert_close


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(
    params=[
        {},
        {"context_blocks": 1, "noise_conditioned": True},
        {"image_size": (2, 6), "patch_size": 2},
        {"start_token": False, "soft_clip": 0.0, "final_norm": False},
        {"rotary_side": 0, "softplus_scale": False, "num_layers": (1, 1, 1), "patch_size": (2, 1, 2)},
        {"shared_layers": 1, "start_token": False, "learned_first_token": True, "volume_preserving": True},
    ],
    ids=lambda changes: "-".join(changes) or "all",
)
def text_flow(request, make_flow):
    return make_flow(**STARFLOW_TEXT | request.param).double()


def given(flow):
    """Images, no labels, noise level and context of three samples."""
    level = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64) if flow.config.noise_conditioned else None
    return randn(3, *flow.image_shape), None, level, randn(3, 3, 5, seed=1)


def test_the_log_determinant_is_that_of_the_jacobian(text_flow):
    images, _, level, context = given(text_flow)
    output = text_flow(images, None, level, context)
    matrices = jacobian(lambda x: text_flow(x, None, level, context).z.sum(dim=0), images).flatten(3).flatten(0, 1)
    close(output.log_det, torch.linalg.slogdet(matrices.transpose(0, 1)).logabsdet)
    assert (text_flow(images, None, level, context + 1).z - output.z).abs().amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize(
    "solver", [sequential, Jacobi(window=3, tolerance=0), Jacobi(tolerance=0)], ids=["sequential", "windows", "whole"]
)
def test_the_inverse_gives_the_images_back(text_flow, solver):
    images, _, level, context = given(text_flow)
    z = text_flow(images, None, level, context).z.detach()
    close(text_flow.inverse(z, None, level, context=context, solver=solver), images)


def test_iterations_find_what_token_by_token_finds_with_guidance(text_flow):
    _, _, level, context = given(text_flow)
    z, null = randn(3, *text_flow.z_shape), randn(1, 3, 5, seed=2)
    options = {"context": context, "null_context": null, "guidance": GUIDANCE, "temperature": 0.8}
    guided = text_flow.inverse(z, None, level, **options)
    close(text_flow.inverse(z, None, level, **options, solver=Jacobi(window=3, tolerance=0)), guided)
    for change in ({"guidance": None}, {"null_context": context.flip(0)}, {"temperature": 1.0}):
        assert not torch.allclose(text_flow.inverse(z, None, level, **options | change), guided, atol=1e-3)


def test_blocks_without_the_context_are_not_guided_by_it(make_flow):
    """Both passes would be the same."""
    flow = make_flow(**STARFLOW_TEXT | {"context_blocks": 1})
    _, _, level, context = given(flow)
    z, null = flow.sample_prior(3, torch.Generator().manual_seed(0)), torch.zeros(1, 3, 5)
    everywhere, first = (
        flow.inverse(z, None, level, context=context.float(), null_context=null, guidance=guidance)
        for guidance in (GUIDANCE, Guidance(weight=1.5, rule="gaussian", schedule="constant", blocks=1))
    )
    assert torch.equal(everywhere, first)
    with pytest.raises(ValueError, match=r"null_context is missing.*\(1, 3, 5\)"):
        flow.inverse(z, None, level, context=context.float(), guidance=GUIDANCE)


def test_a_label_is_a_prefix_of_one_vector(make_flow, make_inputs):
    flow = make_flow(**LABELS)
    images, labels, level = make_inputs(flow)
    one_hot = torch.eye(4)[[0, 3, 2]][:, None]  # the second image has no label
    assert labels.tolist() == [0, -1, 2]
    by_label, by_vector = flow(images, labels, level), flow(images, None, level, one_hot)
    assert torch.equal(by_label.z, by_vector.z)
    none = torch.eye(4)[[3, 3, 3]][:, None]
    assert torch.equal(flow(images, None, level).z, flow(images, None, level, none).z)
    z = by_label.z.detach()
    by_label = flow.inverse(z, labels, level, guidance=GUIDANCE)
    assert torch.equal(by_label, flow.inverse(z, None, level, context=one_hot, guidance=GUIDANCE))
    assert torch.equal(by_label, flow.inverse(z, labels, level, null_context=none[:1], guidance=GUIDANCE))


def test_the_score_is_the_gradient_and_denoising_takes_the_context(text_flow):
    images, _, level, context = given(text_flow)
    level = torch.full((3,), 0.3, dtype=torch.float64) if level is None else level
    denoiser = FlowDenoiser(text_flow, slice_size=2)
    x = images.clone().requires_grad_()
    expected = torch.autograd.grad(text_flow.log_prob(x, None, level, context).sum(), x)[0]
    close(denoiser.score(images, None, level, context), expected)
    one_step = DenoiseScheduler(t_max=0.3, t_min=0.1, num_denoise_steps=1)
    found = denoise(denoiser, images, None, one_step, context=context)
    close(found, images + 0.09 * denoiser.score(images, None, 0.3, context))


def test_a_fresh_flow_is_the_identity_whatever_its_scale(make_flow):
    flow = make_flow(fresh=True, **STARFLOW_TEXT | {"patch_size": 2})
    images, _, level, context = given(flow)
    output = flow(images.float(), None, level, context.float())
    close(output.log_det, torch.zeros(3), atol=1e-5, rtol=0)
    close(nll_per_dim(output), 0.5 * images.float().square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("soft_clip", [0.0, 4.0])
def test_a_scale_far_below_one_stays_finite(make_flow, soft_clip):
    flow = make_flow(**STARFLOW_TEXT | {"soft_clip": soft_clip, "num_layers": (1,), "patch_size": 2})
    width = flow.blocks[0].proj_out.out_features // 2
    flow.blocks[0].proj_out.bias.data[:width] = -200.0
    images, _, level, context = given(flow)
    log_det = flow(images.float(), None, level, context.float()).log_det
    log_det.sum().backward()
    assert log_det.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())
    if not soft_clip:
        close(log_det, torch.full((3,), 4 * 8 * 199.5), rtol=0.05, atol=0)


def test_rotary_angles():
    """Row, column and place by their own frequencies; positions by area, so that other shapes spread as squares do."""
    angles = RotaryPositions((4, 9), 6, 5, True, 64).angles(torch.device("cpu"))
    assert angles.shape == (5 + 36, 32)
    for place, k in itertools.product(range(5), range(8)):
        close(angles[place, 24 + k].item(), place / 5 * 6 * 10000 ** (-k / 8), rtol=1e-5, atol=1e-6)
    for row, column, k in itertools.product(range(4), range(9), range(12)):
        frequency, found = 10000 ** (-k / 12), angles[5 + 9 * row + column]
        close(found[k].item(), row * frequency, rtol=1e-5, atol=1e-6)
        close(found[12 + k].item(), column * frequency, rtol=1e-5, atol=1e-6)
    assert (angles[:5, :24] == 0).all()
    assert (angles[5:, 24:] == 0).all()
    without = RotaryPositions((4, 4), 8, 0, False, 64).angles(torch.device("cpu"))
    close(without[5], torch.cat([2 * 10000 ** (-torch.arange(16) / 16)] * 2))  # row 1, column 1, of twice the side


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context_dim": 0}, "context_dim is 0 and context_tokens 3; expected both, or 0 and 0"),
        ({"num_classes": 3}, "context_tokens is 3 and context_dim 5 for num_classes=3; expected 1 and 4"),
        ({"context_blocks": 0}, "context_blocks is 0; expected a whole number from 1 to 2"),
        ({"head_dim": 8}, "head_dim is 8; expected a multiple of 16, for rotary positions"),
        ({"learned_first_token": True}, "learned_first_token and start_token both transform the first token"),
        ({"soft_clip": -1.0}, "soft_clip is -1.0; expected a finite number >= 0"),
        ({"soft_clip": math.nan}, "soft_clip is nan; expected a finite number >= 0"),
        ({"image_size": (4, 4, 4)}, r"image_size is \(4, 4, 4\); expected one number, or \(height, width\)"),
        ({"image_size": (4, 5)}, r"patch_size 2 does not divide image_size \(4, 5\); choose one of \[1\]"),
        ({"rotary_side": -1}, "rotary_side is -1"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(make_flow, changes, words):
    with pytest.raises(ValueError, match=words):
        make_flow(**STARFLOW_TEXT | changes)


def test_contexts_that_do_not_fit_are_refused(make_flow):
    text, labelled, plain = (make_flow(**variant) for variant in (STARFLOW_TEXT, LABELS, {}))
    images, _, _, context = given(text)
    images, context, level = images.float(), context.float(), torch.full((3,), 0.2)
    for flow, arguments, words in (
        (text, (images,), "context is missing: this flow is conditioned on 3 vectors"),
        (text, (images, None, None, context[:2]), r"context has shape \(2, 3, 5\).*expected \(3, 3, 5\) floats"),
        (text, (images, None, None, context.long()), "type torch.int64"),
        (text, (images, torch.tensor([0, 1, 2]), None, context), "this flow has no classes"),
        (labelled, (images, torch.tensor([0, 1, 2]), level, torch.eye(4)[:3, None]), "labels and context were given"),
        (plain, (images, None, level, context), "context was given, but this flow has no condition vectors"),
    ):
        with pytest.raises(ValueError, match=words):
            flow(*arguments)
    for null, words in (
        (torch.zeros(7), r"null_context was given, but this flow has no"),
        (torch.zeros(1, 1, 3, 5), r"null_context has shape \(1, 1, 3, 5\)"),
        (torch.zeros(2, 3, 5), r"null_context has shape \(2, 3, 5\).*expected \(3, 3, 5\)"),
    ):
        flow, arguments = (plain, {}) if null.ndim == 1 else (text, {"context": context})
        z = torch.zeros(3, *flow.z_shape)
        for guidance in (None, GUIDANCE):
            with pytest.raises(ValueError, match=words):
                flow.inverse(z, None, 0.2, **arguments, null_context=null, guidance=guidance)
    assert torch.equal(text(images, None, None, context.tolist()).z, text(images, None, None, context).z)


def test_a_temperature_is_above_zero(make_flow):
    flow = make_flow(num_classes=0)
    for wrong in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"temperature is .*; expected a finite number >= 1e-06"):
            flow.inverse(flow.sample_prior(1, None), None, 0.2, temperature=wrong)


def test_an_unlabelled_flow_of_labels_is_not_guided(make_flow, monkeypatch):
    flow = make_flow(**LABELS)
    rows = []
    inverse = type(flow.blocks[0]).inverse
    monkeypatch.setattr(
        type(flow.blocks[0]), "inverse", lambda *given: rows.append(given[3] is not None) or inverse(*given)
    )
    flow.inverse(flow.sample_prior(2, torch.Generator().manual_seed(0)), None, 0.2, guidance=GUIDANCE)
    flow.inverse(flow.sample_prior(1, torch.Generator().manual_seed(0)), torch.tensor([1]), 0.2, guidance=GUIDANCE)
    assert rows == [False, False, True, False]


def test_saved_and_opened_again_it_is_the_same(make_flow, tmp_path):
    flow = make_flow(**STARFLOW_TEXT | {"image_size": (2, 6), "patch_size": 2})
    randomise(flow)
    images, _, level, context = given(flow)
    flow.save_pretrained(tmp_path)
    opened = TARFlow.from_pretrained(tmp_path)
    arguments = images.float(), None, level, context.float()
    assert torch.equal(opened(*arguments).z, flow(*arguments).z)
    assert opened.image_shape == (2, 2, 6)


@pytest.mark.parametrize("how", ["checkpointing", "compiled", "bfloat16"])
def test_gradients_are_the_same_however_layers_run(make_flow, how):
    flow = make_flow(**STARFLOW_TEXT)
    images, _, level, context = given(flow)
    images, context = images.float(), context.float()

    def gradient(dtype=torch.float32):
        flow.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = nll_per_dim(flow(images, None, level, context)).mean()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in flow.named_parameters()}

    expected = gradient()
    assert [name for name, found in expected.items() if not found.any()] == []
    if how == "bfloat16":
        for name, found in gradient(torch.bfloat16).items():
            assert (found - expected[name]).norm() <= 0.1 * expected[name].norm() + 1e-6, name
        return
    if how == "checkpointing":
        flow.enable_gradient_checkpointing()
    else:
        for layer in (layer for block in flow.blocks for layer in block.transformer.layers):
            layer.compile(backend="aot_eager")
    close(gradient(), expected)
