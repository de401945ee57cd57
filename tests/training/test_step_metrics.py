"""What a step tells: sums by noise level, moments of z by block, and where a bad gradient came from."""

import math

import pytest
import torch
from tiny_training import tiny_recipe

from itarflow.flow import TARFlow
from itarflow.runtime.devices import memory_gib, peak_tflops
from itarflow.training.metrics import (
    bucket_edges,
    bucket_means,
    bucket_sums,
    mean_and_spread,
    rounded,
    watch_blocks,
    worst_level,
)


def test_values_are_averaged_by_noise_level():
    edges = bucket_edges(tiny_recipe(t_min=0.1, t_max=0.5))
    levels = torch.tensor([0.1, 0.15, 0.25, 0.45, 0.5])
    sums = bucket_sums(torch.tensor([1.0, 3.0, 5.0, 7.0, 8.0]), levels, edges)
    assert bucket_means(sums, edges) == {"0.1-0.2": 2.0, "0.2-0.3": 5.0, "0.4-0.5": 7.5}


def test_the_sums_of_two_processes_are_those_of_one():
    edges = bucket_edges(tiny_recipe())
    values, levels = torch.randn(64), 0.02 + 0.48 * torch.rand(64)
    parts = bucket_sums(values[:32], levels[:32], edges) + bucket_sums(values[32:], levels[32:], edges)
    torch.testing.assert_close(parts, bucket_sums(values, levels, edges))


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_conditioned": False, "distribution": "constant", "num_denoise_steps": 1},
        {"noise_conditioned": False, "distribution": "dequantise", "weight": "one", "method": "skip"},
    ],
)
def test_a_single_noise_level_has_no_buckets(changes):
    assert bucket_edges(tiny_recipe(**changes)) is None


def test_z_is_watched_after_each_block(make_flow, make_inputs):
    flow: TARFlow = make_flow()
    first, second = make_inputs(flow), make_inputs(flow, seed=2)
    with watch_blocks(flow) as moments:
        z = torch.cat([flow(*first).z, flow(*second).z])
    mean, spread = mean_and_spread(moments)
    assert len(mean) == len(flow.blocks)
    assert mean[-1] == pytest.approx(z.mean().item(), abs=1e-5)
    assert spread[-1] == pytest.approx(z.std(unbiased=False).item(), abs=1e-5)
    before = moments.clone()
    flow(*first)
    assert torch.equal(moments, before)  # only inside


def test_nothing_is_watched_unless_wanted(make_flow, make_inputs):
    flow = make_flow()
    with watch_blocks(flow, wanted=False) as moments:
        flow(*make_inputs(flow))
    assert not moments.any()


@pytest.mark.parametrize(
    ("nll", "expected"), [([1.0, 3.0, 2.0], 0.2), ([1.0, 3.0, math.nan], 0.3), ([-math.inf, 3.0, 2.0], 0.1)]
)
def test_the_worst_image_is_the_one_that_is_not_finite_or_the_least_likely(nll, expected):
    level, _ = worst_level(torch.tensor(nll), torch.tensor([0.1, 0.2, 0.3]))
    assert level == pytest.approx(expected)


def test_figures_are_short():
    assert rounded([1 / 3, 12345.678, -0.0000012345678]) == [0.33333, 12346.0, -1.2346e-06]


def test_the_device_is_known_as_far_as_it_can_be():
    cpu = torch.device("cpu")
    assert peak_tflops(cpu, "bf16") is None
    assert 0.05 < memory_gib(cpu) < 100


@pytest.mark.parametrize(
    ("name", "products", "expected"),
    [
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H100 PCIe", "TF32", 378),
        ("NVIDIA H100 PCIe", "float32", 51),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA RTX A1000", "bf16", None),
    ],
)
def test_peaks_follow_the_name_of_the_gpu(monkeypatch, name, products, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda"), products) == expected
