"""A diffusion model as a denoiser: the change of schedule, labels, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from ideal_diffusion import PREDICTIONS, SCHEDULES, IdealModel, mapping_error, posterior_mean, sigmas
from tiny_diffusion import DIT, UNET, Recorder
from torch import Tensor

from itarflow import DenoiseScheduler, FlowDenoiser, ITARFlowPipeline, TARFlow, denoise
from itarflow.denoisers import DiffusionDenoiser


def dit(randomise: Callable[..., None], **changes: Any) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(**{**DIT, "num_embeds_ada_norm": 3, "norm_num_groups": 1} | changes).eval()
    randomise(model)
    return model


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- the change of schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "prediction"), list(zip(SCHEDULES, PREDICTIONS, strict=True)))
def test_the_estimate_is_the_posterior_mean_at_every_level(schedule, prediction):
    at_steps = sigmas(DDPMScheduler(1000, beta_schedule=schedule))
    between = torch.lerp(at_steps[:-1].log(), at_steps[1:].log(), noise(999).sigmoid().double()).exp()
    assert mapping_error(schedule, prediction, at_steps, torch.float64) < 1e-5
    assert mapping_error(schedule, prediction, between, torch.float64) < 1e-5
    usual = between[(between > 0.01) & (between < 1)].float()
    assert mapping_error(schedule, prediction, usual, torch.float32) < 1e-5


def test_levels_of_the_table_are_its_steps_and_others_lie_between():
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    table, model = sigmas(scheduler), Recorder()
    steps = torch.tensor([0, 1, 17, 998, 999])
    middle = (table[3] * table[4]).sqrt().reshape(1)
    DiffusionDenoiser(model, scheduler)(noise(6, 2, 4, 4), None, torch.cat([table[steps], middle]))
    torch.testing.assert_close(model.seen[0][1], torch.cat([steps.float(), torch.tensor([3.5])]), rtol=0, atol=1e-4)


def test_steps_are_those_of_linear_interpolation():
    scheduler, model = DDPMScheduler(1000, beta_schedule="linear"), Recorder()
    table = sigmas(scheduler)
    levels = torch.cat([torch.tensor([table[0] * 0.995, table[-1] * 1.005]), torch.lerp(table[:-1], table[1:], 0.3)])
    DiffusionDenoiser(model, scheduler)(noise(len(levels), 2, 1, 1), None, levels)
    expected = np.interp(levels.double().log().numpy(), table.log().numpy(), np.arange(1000))
    assert torch.equal(model.seen[0][1], torch.from_numpy(expected).float())


def test_the_model_sees_images_of_unit_scale():
    model = Recorder()
    noisy = noise(2, 2, 4, 4)
    DiffusionDenoiser(model, DDPMScheduler())(noisy, None, torch.tensor([0.75, 2.4]))
    torch.testing.assert_close(model.seen[0][0], noisy / torch.tensor([1.25, 2.6])[:, None, None, None])


def test_a_level_at_most_a_hundredth_beyond_the_ends_is_the_end():
    model, scheduler = Recorder(), DDPMScheduler(beta_schedule="linear")  # a DiT's
    denoiser = DiffusionDenoiser(model, scheduler)
    low, high = denoiser.noise_range
    assert (low, high) == (pytest.approx(0.0100005, abs=5e-6), pytest.approx(157.4, abs=0.1))
    denoiser(noise(2, 2, 4, 4), None, torch.tensor([low / 1.009, high * 1.009]))
    assert model.seen[0][1].tolist() == [0, 999]
    for level in (low / 1.02, high * 1.02):
        with pytest.raises(ValueError, match=r"noise_level .* outside \[0\.0100\d*, 157\.4\d*\]"):
            denoiser(noise(1, 2, 4, 4), None, level)


def test_a_last_step_without_signal_is_left_out():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.alphas_cumprod[-1] == 0
    model = Recorder()
    denoiser = DiffusionDenoiser(model, scheduler)
    denoiser(noise(1, 2, 4, 4), None, denoiser.noise_range[1])
    assert model.seen[0][1].tolist() == [998]


def test_following_the_ode_leads_from_noise_to_the_data():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    mean, std, t = torch.full((1, 2, 2), 0.3).double(), torch.tensor(0.5).double(), 1.0
    noisy = mean + (0.25 + t**2) ** 0.5 * noise(4, 1, 2, 2).double()
    denoiser = DiffusionDenoiser(IdealModel(scheduler, mean, std), scheduler)
    clean = denoise(denoiser, noisy, None, DenoiseScheduler(t_max=t, t_min=0.01, num_denoise_steps=200, method="heun"))
    torch.testing.assert_close(clean, mean + (noisy - mean) * 0.5 / (0.25 + t**2) ** 0.5, rtol=0, atol=1e-3)
    first = denoise(denoiser, noisy, None, DenoiseScheduler(t_max=t, t_min=0.01, num_denoise_steps=1))
    torch.testing.assert_close(first, posterior_mean(noisy, torch.full((4,), t), mean, std))


# -- models of diffusers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dit_with_learned_variance_cleans(randomise, dtype):
    model = dit(randomise, out_channels=4).to(dtype)
    noisy, labels = noise(3, 2, 4, 4), torch.tensor([0, -1, 2])
    with torch.inference_mode():
        clean = denoise(
            DiffusionDenoiser(model, DDIMScheduler()),
            noisy,
            labels,
            DenoiseScheduler(t_max=0.5, t_min=0.01, num_denoise_steps=3),
        )
    assert clean.shape == noisy.shape
    assert clean.dtype == torch.float32
    assert clean.isfinite().all()
    assert (clean - noisy).abs().max() > 0.05


def test_a_dit_is_asked_as_its_own_pipeline_asks(randomise):
    """At a step of the table, eps is the first half of what the model says of y = x_t / sqrt(1 + t^2)."""
    model, scheduler = dit(randomise, out_channels=4), DDIMScheduler()
    t, noisy = float(sigmas(scheduler)[300]), noise(2, 2, 4, 4)
    y = scheduler.alphas_cumprod[300].sqrt() * noisy
    with torch.no_grad():
        eps = model(y, timestep=torch.tensor([300, 300]), class_labels=torch.tensor([1, 3])).sample[:, :2]
    estimate = DiffusionDenoiser(model, scheduler)(noisy, torch.tensor([1, -1]), t)
    torch.testing.assert_close(estimate, noisy - t * eps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("classes", [None, 4])
def test_a_unet_cleans_with_classes_or_without(randomise, classes):
    model = UNet2DModel(**UNET, num_class_embeds=classes).eval()
    randomise(model)
    denoiser = DiffusionDenoiser(model, DDPMScheduler(), null_label=3 if classes else None)
    clean = denoise(
        denoiser,
        noise(2, 2, 4, 4),
        torch.tensor([1, -1]),
        DenoiseScheduler(t_max=0.5, t_min=0.01, num_denoise_steps=2),
    )
    assert clean.isfinite().all()
    other = denoise(
        denoiser,
        noise(2, 2, 4, 4),
        torch.tensor([0, -1]),
        DenoiseScheduler(t_max=0.5, t_min=0.01, num_denoise_steps=2),
    )
    assert torch.equal(clean[0], other[0]) == (classes is None)
    assert torch.equal(clean[1], other[1])


def test_slices_and_single_images_make_no_difference(randomise):
    model, noisy, labels = dit(randomise), noise(5, 2, 4, 4), torch.tensor([0, 1, 2, -1, 0])
    levels = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    whole = DiffusionDenoiser(model, DDIMScheduler())(noisy, labels, levels)
    sliced = DiffusionDenoiser(model, DDIMScheduler(), slice_size=2)(noisy, labels, levels)
    torch.testing.assert_close(sliced, whole)


def test_the_callers_model_is_left_alone_and_no_label_is_dropped_in_training(randomise):
    model = dit(randomise).train()
    denoiser = DiffusionDenoiser(model, DDIMScheduler())
    noisy, labels = noise(8, 2, 4, 4, seed=1), torch.zeros(8, dtype=torch.int64)
    first = denoiser(noisy.requires_grad_(), labels, 0.3)
    assert not first.requires_grad
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(first, denoiser(noisy, labels, 0.3)) for _ in range(5))
    shared = dict(denoiser.model.named_parameters())
    assert all(shared[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())


# -- labels and channels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "null_label", "labels", "expected"),
    [
        ({"num_embeds_ada_norm": 3}, None, [2, -1, 0], [2, 3, 0]),
        ({"num_embeds_ada_norm": 3}, None, None, [3, 3, 3]),
        ({"num_class_embeds": 4}, 3, [2, -1, 0], [2, 3, 0]),
        ({"num_class_embeds": 4}, None, [3, 1, 0], [3, 1, 0]),
        ({}, None, [1, 2, -1], None),
        ({}, None, None, None),
    ],
)
def test_labels_become_the_models_own(config, null_label, labels, expected):
    model = Recorder(**config)
    denoiser = DiffusionDenoiser(model, DDPMScheduler(), null_label=null_label)
    denoiser(noise(3, 2, 4, 4), None if labels is None else torch.tensor(labels), 0.3)
    given = model.seen[0][2]
    assert (given["class_labels"].tolist() if given else None) == expected


def test_a_learned_variance_is_cut_off():
    denoiser = DiffusionDenoiser(Recorder(channels=4), DDPMScheduler(prediction_type="sample"))
    estimate = denoiser(noise(1, 2, 4, 4), None, 0.3)
    torch.testing.assert_close(estimate, torch.tensor([0.0, 1.0])[None, :, None, None].expand(1, 2, 4, 4))


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "classes", "levels", "words"),
    [
        ((3, 4, 4), 3, [0.3], "images of 3 channels .* diffusion model for 2"),
        ((2, 8, 8), 3, [0.3], "images of 8 x 8 .* diffusion model for 4 x 4"),
        ((2, 4, 4), 10, [0.3], "labels of 10 classes .* diffusion model with 3"),
        ((2, 4, 4), 3, [200.0, 0.1], r"t_max: .*200\.0.* outside \[0\.0100\d*, 157\.\d*\]"),
        ((2, 4, 4), 3, [0.3, 0.2, 0.001], r"t_min: .*0\.001.* outside \[0\.0100\d*, 157\.\d*\]"),
    ],
)
def test_what_the_model_is_not_for_is_refused(shape, classes, levels, words):
    model = Recorder(in_channels=2, sample_size=4, num_embeds_ada_norm=3)
    denoiser = DiffusionDenoiser(model, DDPMScheduler())
    with pytest.raises(ValueError, match=words):
        denoiser.check(shape, classes, levels)
    denoiser.check((2, 4, 4), 3, [0.5, 0.01])
    denoiser.check((2, 4, 4), 0, [0.5])


def test_rectangular_models_and_models_of_any_size(make_flow):
    DiffusionDenoiser(Recorder(sample_size=None), DDPMScheduler()).check((2, 7, 9), 0, [0.3])
    oblong = DiffusionDenoiser(Recorder(sample_size=[4, 8]), DDPMScheduler())
    oblong.check((2, 4, 8), 0, [0.3])
    with pytest.raises(ValueError, match=r"4 x 4 .* for 4 x 8"):
        oblong.check((2, 4, 4), 0, [0.3])


def test_images_without_labels_need_a_null_label():
    denoiser = DiffusionDenoiser(Recorder(num_class_embeds=4), DDPMScheduler())
    with pytest.raises(ValueError, match=r"4 classes .*null_label"):
        denoiser.check((2, 4, 4), 0, [0.3])
    for labels in (None, torch.tensor([0, -1])):
        with pytest.raises(ValueError, match="has no label for them"):
            denoiser(noise(2, 2, 4, 4), labels, 0.3)
    with pytest.raises(ValueError, match=r"labels \[0, 4\] .* 0 \.\. 3"):
        denoiser(noise(2, 2, 4, 4), torch.tensor([0, 4]), 0.3)


@pytest.mark.parametrize(
    ("config", "scheduler", "options", "words"),
    [
        ({}, FlowMatchEulerDiscreteScheduler(), {}, "FlowMatchEulerDiscreteScheduler .*alphas_cumprod"),
        ({}, DPMSolverMultistepScheduler(prediction_type="flow_prediction"), {}, "'flow_prediction'"),
        ({}, DDPMScheduler(), {"slice_size": 0}, "slice_size is 0"),
        ({"num_class_embeds": 4}, DDPMScheduler(), {"null_label": 4}, "null_label is 4.* 3"),
        ({"class_embed_type": "identity"}, DDPMScheduler(), {}, "class_embed_type is 'identity'"),
        ({"time_embedding_type": "fourier"}, DDPMScheduler(), {}, "time_embedding_type is 'fourier'"),
        ({"in_channels": 2, "out_channels": 3}, DDPMScheduler(), {}, "2 channels .*3.* 2 or 4"),
    ],
)
def test_models_and_schedules_of_other_kinds_are_refused(config, scheduler, options, words):
    with pytest.raises(ValueError, match=words):
        DiffusionDenoiser(Recorder(**config), scheduler, **options)


def test_wrong_outputs_and_levels_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 4, 4\) .*\(1, 2, 4, 4\)"):
        DiffusionDenoiser(Recorder(channels=3), DDPMScheduler())(noise(1, 2, 4, 4), None, 0.3)
    with pytest.raises(ValueError, match=r"noise_level .*\(2,\).*\(3,\)"):
        DiffusionDenoiser(Recorder(), DDPMScheduler())(noise(3, 2, 4, 4), None, torch.tensor([0.1, 0.2]))


@pytest.fixture
def pipe(make_flow: Callable[..., TARFlow]) -> ITARFlowPipeline:
    pipe = ITARFlowPipeline(make_flow(in_channels=3), DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_generates_and_a_dit_cleans(pipe, randomise):
    denoiser = DiffusionDenoiser(dit(randomise, in_channels=3), DDIMScheduler())
    by_dit, by_itself = (
        pipe([0, 1], denoiser=d, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for d in (denoiser, None)
    )
    assert (by_dit - by_itself).abs().max() > 1e-3


@pytest.mark.parametrize("labels", [[0, 1], None])
def test_a_pipeline_asks_its_denoiser_before_any_work(pipe, make_flow, monkeypatch, labels):
    monkeypatch.setattr(TARFlow, "inverse", None)  # its call would raise a TypeError
    others = {
        r"\(3, 4, 4\) .* flow for \(3, 8, 8\)": FlowDenoiser(make_flow(in_channels=3, image_size=8)),
        "images of 3 channels .* for 2": DiffusionDenoiser(Recorder(in_channels=2), DDPMScheduler()),
        "t_min: .* outside": DiffusionDenoiser(Recorder(), DDPMScheduler(beta_start=0.05, beta_end=0.06)),
    }
    if labels:
        others |= {
            "3 classes .* denoising flow with 5": FlowDenoiser(make_flow(in_channels=3, num_classes=5)),
            "3 classes .* denoising flow with 0": FlowDenoiser(make_flow(in_channels=3, num_classes=0)),
            "3 classes .* with 1000": DiffusionDenoiser(Recorder(num_embeds_ada_norm=1000), DDPMScheduler()),
        }
    for words, denoiser in others.items():
        with pytest.raises(ValueError, match=words):
            pipe(labels, denoiser=denoiser)
