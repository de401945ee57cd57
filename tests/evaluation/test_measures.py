"""Figures of cleaned images, against noise and densities that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from itarflow import DenoiseScheduler, ITARFlowPipeline
from itarflow.evaluation.compare import METRICS, nats_per_dim, residual_noise
from itarflow.evaluation.samples.denoising import Cleaned, parts


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grey_levels", [3.0, 10.0, 30.0])
def test_the_noise_of_a_smooth_image_is_found(grey_levels):
    ramp = torch.linspace(-0.5, 0.5, 64)[None, :] + torch.linspace(-0.1, 0.1, 64)[:, None]
    noisy = ramp + grey_levels / 127.5 * noise(4, 3, 64, 64)
    torch.testing.assert_close(residual_noise(noisy), torch.full((4,), grey_levels), rtol=0.05, atol=0)
    assert residual_noise(ramp.expand(1, 1, 64, 64)).item() < 1  # what rounding to 8 bits leaves: 0.29


def test_images_are_measured_one_by_one():
    images = noise(3, 3, 8, 8) * torch.tensor([0.01, 0.1, 0.2])[:, None, None, None]
    whole = residual_noise(images)
    assert whole.shape == (3,)
    torch.testing.assert_close(whole, torch.cat([residual_noise(image[None]) for image in images]))
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 8\); expected at least 3 x 3"):
        residual_noise(torch.zeros(1, 1, 2, 8))


@pytest.mark.parametrize(("noise_range", "level"), [((0.1, 0.9), 0.1), (None, 0.05)])
def test_nats_per_dim_is_the_negative_log_density_at_the_smallest_level(make_flow, noise_range, level):
    flow = make_flow(noise_range=noise_range)
    pipe = ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.05))
    codes, labels = noise(5, 2, 4, 4), torch.tensor([0, 1, 2, -1, 0])
    metric = nats_per_dim("pets", pipe, batch_size=2)
    with torch.no_grad():
        expected = -flow.log_prob(codes, labels, level).mean() / 32
        assert metric.measure(Cleaned(codes, labels, codes, 0.0)) == pytest.approx(float(expected), rel=1e-5)
        unlabelled = metric.measure(Cleaned(codes, None, codes, 0.0))
        assert unlabelled == pytest.approx(float(-flow.log_prob(codes, None, level).mean() / 32), rel=1e-5)
    assert f"t = {level:g}" in metric.meaning
    assert metric.measure(Cleaned(None, labels, codes, 0.0)) is None


def test_metrics_have_names_of_their_own():
    assert len({metric.title for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize(("count", "size", "lengths"), [(5, 2, [2, 2, 1]), (4, 4, [4]), (1, 9, [1])])
def test_parts_are_all_there_is(count, size, lengths):
    assert [len(range(count)[part]) for part in parts(count, size)] == lengths
