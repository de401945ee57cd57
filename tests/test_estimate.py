"""Costs before anything is allocated, against counting by hand and against a real forward and backward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from itarflow.data import DataConfig
from itarflow.estimate import Estimate, estimate, human_bytes, human_number
from itarflow.flow import nll_per_dim
from itarflow.guidance import Guidance
from itarflow.noise import NoiseConfig
from itarflow.presets import ModelConfig
from itarflow.recipe import Recipe, SamplingConfig, TrainConfig


def recipe(train: dict[str, Any] | None = None, **model: Any) -> Recipe:
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 2, "channels": 16, "num_layers": (1, 3), "head_dim": 8}
    config = ModelConfig(**sizes | {"num_classes": 5, "mlp_ratio": 2} | model)
    return Recipe(name="tiny", model=config, data=DataConfig(), train=TrainConfig(**(train or {})))


def cost(train: dict[str, Any] | None = None, **model: Any) -> Estimate:
    return estimate(recipe(train, **model))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_classes": 0},
    {"volume_preserving": True},
    {"shared_layers": 1},
    {"learned_first_token": True},
    {"patch_size": (4, 2)},
]


@pytest.mark.parametrize("model", VARIANTS, ids=str)
def test_parameters_are_those_of_the_real_model(model):
    flow = recipe(**model).model.build()
    assert cost(**model).parameters == sum(parameter.numel() for parameter in flow.parameters())


def test_nothing_is_allocated_whatever_the_size():
    sizes = {"image_size": 256, "patch_size": 8, "channels": 16384, "num_layers": (2, 18), "head_dim": 64}
    assert cost(**sizes, mlp_ratio=4).state_bytes > 200 * 2**30


def linear(inputs: int, outputs: int) -> int:
    """Of one token."""
    return 2 * inputs * outputs


@pytest.mark.parametrize("noise_conditioned", [True, False])
def test_forward_flops_are_those_counted_by_hand(noise_conditioned):
    channels, values, ratio = 16, 12, 2
    tokens = 16 - 1  # nothing follows the last one
    layer = linear(channels, 3 * channels) + linear(channels, channels) + 2 * linear(channels, ratio * channels)
    attention = 2 * 2 * tokens * channels  # of one token: scores, then the weighted sum, over all positions
    ends = linear(values, channels) + linear(channels, 2 * values)
    noise_level = 2 * linear(channels, 4 * channels) if noise_conditioned else 0
    by_hand = sum(tokens * (ends + num_layers * (layer + attention)) + noise_level for num_layers in (1, 3))
    tiny = recipe(noise_conditioned=noise_conditioned)
    assert estimate(tiny).forward_flops == by_hand


def test_training_takes_the_flops_of_three_forward_passes_as_a_real_step_does():
    tiny = recipe(image_size=16, channels=64, head_dim=32)
    flow = tiny.model.build()
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    for parameter in flow.parameters():  # nothing is zero, so that nothing is skipped
        torch.nn.init.normal_(parameter, std=0.02)
    # The counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        nll_per_dim(flow(images, labels, 0.3)).mean().backward()
    assert estimate(tiny).training_flops == pytest.approx(counter.get_total_flops() / 2, rel=0.05)


def test_gradient_checkpointing_takes_a_second_forward_pass():
    plain, checkpointed = cost(), cost({"gradient_checkpointing": True})
    assert plain.training_flops == 3 * plain.forward_flops
    assert checkpointed.training_flops == 4 * plain.forward_flops


@pytest.mark.parametrize(("ema_decay", "copies"), [(None, 4), (0.99, 5)])
def test_state_is_weights_gradients_two_moments_and_the_average_in_float32(ema_decay, copies):
    costs = cost({"ema_decay": ema_decay})
    assert costs.state_bytes == copies * 4 * costs.parameters


@pytest.mark.parametrize("model", [*VARIANTS, {"num_layers": (8, 8)}], ids=str)
def test_checkpointing_keeps_fewer_activations(model):
    costs = cost(**model)
    assert 0 < costs.checkpointed_bytes < costs.activation_bytes


def test_each_layer_adds_the_same_activations():
    one, two, three = (cost(num_layers=(1, depth)).activation_bytes for depth in (1, 2, 3))
    assert three - two == two - one > 0


def test_with_checkpointing_a_layer_keeps_its_input_alone():
    two, three = (cost(num_layers=(1, depth)).checkpointed_bytes for depth in (2, 3))
    tokens, channels = 15, 16
    assert three - two == 4 * tokens * channels


def test_weights_do_not_count_as_activations():
    wide = cost(channels=512, patch_size=4)
    assert wide.activation_bytes < 0.1 * 4 * wide.parameters


def test_checkpointing_recomputes_a_layer_at_a_time():
    one, two = (cost(num_layers=(1, depth)) for depth in (1, 2))
    assert one.checkpointed_bytes > two.activation_bytes - one.activation_bytes


@pytest.mark.parametrize(("patch_size", "tokens"), [(2, 2 * 16), (4, 2 * 4), ((2, 4), 16 + 4)])
def test_sampling_solves_the_tokens_of_all_blocks(patch_size, tokens):
    assert cost(patch_size=patch_size).sampling_tokens == tokens


def test_a_tarflow_for_likelihoods_can_be_estimated():
    tiny = recipe(noise_conditioned=False, num_classes=0)
    assert estimate(replace(tiny, noise=NoiseConfig(distribution="dequantise", weight="one"))).forward_flops > 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1.5 * 2**20, "1.5 MiB"), (2**30, "1 GiB"), (3 * 2**40, "3 TiB")],
)
def test_bytes_read_well(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1K"), (417_200_736, "417M"), (1.5e9, "1.5G"), (1.5e12, "1.5T")]
)
def test_numbers_read_well(count, text):
    assert human_number(count) == text


def test_activations_are_what_autograd_keeps_on_a_real_device():
    model = ModelConfig(image_size=32, patch_size=2, channels=128, num_layers=(1, 2), num_classes=10)
    flow = model.build()
    weights, kept = {id(parameter) for parameter in flow.parameters()}, {}

    def pack(tensor):
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nll_per_dim(flow(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64), torch.ones(1))).sum()
    real = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    costs = estimate(Recipe(name="real", model=model, data=DataConfig()))
    # The meta device also keeps scaled copies of queries and keys, so the estimate is a little high.
    assert real <= costs.activation_bytes < 1.15 * real


def test_the_cache_is_that_of_the_largest_block_and_doubles_where_it_is_guided():
    model = ModelConfig(image_size=8, in_channels=1, patch_size=2, channels=64, num_layers=(1, 3), num_classes=10)
    plain = Recipe(name="plain", model=model, data=DataConfig())
    guided = replace(plain, sampling=SamplingConfig(guidance=Guidance(weight=1.0, blocks=1)))
    assert estimate(plain).cache_bytes == 3 * 2 * 16 * 64 * 4  # layers, keys and values, tokens, channels, bytes
    assert estimate(guided).cache_bytes == 2 * estimate(plain).cache_bytes
