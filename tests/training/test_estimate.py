"""Costs before anything is allocated, against counting by hand and against a real forward and backward pass."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from itarflow.data import DataConfig
from itarflow.flow import NoiseConfig, nll_per_dim
from itarflow.inverse import Guidance
from itarflow.presets import ModelConfig
from itarflow.runtime.text import human_bytes, human_number
from itarflow.training import Recipe, SamplingConfig, TrainConfig
from itarflow.training.estimate import (
    USABLE,
    Activations,
    DeviceMemory,
    Estimate,
    accumulation_for,
    activations,
    device_memory,
    estimate,
)
from itarflow.training.objective import draw


def recipe(train: dict[str, Any] | None = None, **model: Any) -> Recipe:
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 2, "channels": 16, "num_layers": (1, 3), "head_dim": 8}
    config = ModelConfig(**sizes | {"num_classes": 5, "mlp_ratio": 2} | model)
    return Recipe(name="tiny", model=config, data=DataConfig(), train=TrainConfig(**(train or {})))


def cost(train: dict[str, Any] | None = None, **model: Any) -> Estimate:
    return estimate(recipe(train, **model))


def needed(train: dict[str, Any] | None = None, *, checkpointing: bool = False, **model: Any) -> Activations:
    return activations(recipe(train, **model), checkpointing=checkpointing)


STARFLOW: dict[str, Any] = {
    "rotary_side": 4, "start_token": True, "final_norm": True, "soft_clip": 4.0, "softplus_scale": True,
    "first_block_reversed": True, "channels": 32, "head_dim": 16,
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_classes": 0},
    {"volume_preserving": True},
    {"shared_layers": 1},
    {"learned_first_token": True},
    {"patch_size": (4, 2)},
    STARFLOW | {"context_dim": 6, "context_tokens": 1},
    STARFLOW | {"num_classes": 0, "context_dim": 12, "context_tokens": 3},
]


@pytest.mark.parametrize("model", VARIANTS, ids=str)
def test_parameters_are_those_of_the_real_model(model):
    flow = recipe(**model).model.build()
    assert cost(**model).parameters == sum(parameter.numel() for parameter in flow.parameters())


def test_nothing_is_allocated_whatever_the_size():
    sizes = {"image_size": 256, "patch_size": 8, "channels": 16384, "num_layers": (2, 18), "head_dim": 64}
    assert device_memory(recipe(**sizes, mlp_ratio=4)).state > 200 * 2**30


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


def test_training_takes_the_flops_of_three_forward_passes_as_a_real_step_does(monkeypatch):
    monkeypatch.setattr("itarflow.runtime.kernels.cpu.ONEDNN", False)  # whose products the counter does not know
    tiny = recipe(image_size=16, channels=64, head_dim=32)
    # In float64, whose products are PyTorch's own: the counter does not know oneDNN's, nor the CPU's fused attention.
    flow = tiny.model.build().double()
    images, labels = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1])
    for parameter in flow.parameters():  # nothing is zero, so that nothing is skipped
        torch.nn.init.normal_(parameter, std=0.02)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        nll_per_dim(flow(images, labels, 0.3)).mean().backward()
    assert estimate(tiny).training_flops == pytest.approx(counter.get_total_flops() / 2, rel=0.05)


def test_gradient_checkpointing_takes_a_second_forward_pass():
    plain, checkpointed = cost(), cost({"gradient_checkpointing": True})
    assert plain.training_flops == 3 * plain.forward_flops
    assert checkpointed.training_flops == 4 * plain.forward_flops


# -- what lies on a device whatever the batch -------------------------------------------------------------------


@pytest.mark.parametrize("ema_decay", [None, 0.99])
def test_one_device_holds_weights_gradients_two_moments_and_the_average_in_float32(ema_decay):
    tiny = recipe({"ema_decay": ema_decay})
    whole = 4 * estimate(tiny).parameters
    device = device_memory(tiny)
    assert (device.weights, device.gradients, device.optimizer, device.exchange) == (whole, whole, 2 * whole, 0)
    assert device.average == (whole if ema_decay else 0)
    assert device.state == (5 if ema_decay else 4) * whole + device.draws
    assert device_memory(tiny, sharded=True) == device


def test_replicas_hold_what_one_device_does():
    assert device_memory(recipe(), 8) == device_memory(recipe())


def test_each_device_draws_the_numbers_of_the_global_batch():
    tiny = recipe({"batch_size": 24})
    drawn = [value for value in draw(tiny, 0, torch.device("cpu")) if value is not None and value.ndim == 4]
    assert device_memory(tiny, 8).draws == sum(value.nbytes for value in drawn)
    latent = replace(tiny, codec=replace(tiny.codec, vae="some"))
    assert device_memory(latent).draws == 2 * device_memory(tiny).draws


def test_shards_are_an_even_part_of_everything():
    even = recipe(num_classes=8)  # each tensor has rows that 2 divides
    one, two = device_memory(even), device_memory(even, 2, sharded=True)
    assert (2 * two.weights, 2 * two.gradients, 2 * two.optimizer) == (one.weights, one.gradients, one.optimizer)


@pytest.mark.parametrize("devices", [3, 7, 1000])
def test_the_shard_of_a_tensor_is_at_least_a_row(devices):
    flow = recipe().model.build()
    longest = sum(p[: -(-len(p) // devices)].numel() for p in flow.parameters())
    assert device_memory(recipe(), devices, sharded=True).weights == 4 * longest


def test_two_layers_and_what_is_around_the_layers_are_whole_at_a_time():
    flow = recipe().model.build()
    layer = sum(p.numel() for p in flow.blocks[0].transformer.layers[0].parameters())
    around = sum(p.numel() for p in flow.parameters()) - 4 * layer
    assert device_memory(recipe(), 2, sharded=True).exchange == 4 * 2 * (2 * layer + around)
    norms = 4 * flow.config.channels
    # Weights of two layers, the gradients of one, and those of another on their way, in bytes of each.
    of_products = (2 * 2 + 2 + 4) * (layer - norms)
    bf16 = recipe({"mixed_precision": "bf16"})
    assert device_memory(bf16, 2, sharded=True).exchange == of_products + 4 * 2 * (around + 4 * norms)
    compiled = recipe({"mixed_precision": "bf16", "compile": True})
    assert device_memory(compiled, 2, sharded=True) == device_memory(recipe(), 2, sharded=True)


def test_gathered_bf16_weights_need_no_copies():
    sizes = {"channels": 64, "head_dim": 32, "num_layers": (2, 4), "image_size": 16}
    wanted = recipe({"mixed_precision": "bf16"}, **sizes)
    whole, split = (activations(wanted, checkpointing=False, sharded=sharded) for sharded in (False, True))
    assert split.per_image == whole.per_image
    products = 6 * 64 * (64 * (3 + 1 + 2 + 2) + 3 + 1 + 2 + 1)
    fixed = [max(others for _, others in found.moments) for found in (whole, split)]
    assert fixed[0] - fixed[1] == pytest.approx(2 * products, rel=0.1)


def test_more_devices_never_need_more_each():
    shares = [device_memory(recipe(), devices, sharded=True).state for devices in (2, 3, 4, 8, 100)]
    assert shares == sorted(shares, reverse=True)


# -- what images need -------------------------------------------------------------------------------------------

PRECISIONS = ("no", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixed_precision", "model"),
    [("no", {"num_layers": (8, 8)}), ("no", {"shared_layers": 1}), ("bf16", {}), ("bf16", {"patch_size": (4, 2)})],
)
def test_checkpointing_needs_less(model, mixed_precision):
    train = {"mixed_precision": mixed_precision}
    plain, checkpointed = (needed(train, checkpointing=wanted, **model) for wanted in (False, True))
    assert 0 < checkpointed.per_image < plain.per_image
    for size in (1, 2, 50):
        assert checkpointed.at_peak(size) < plain.at_peak(size)


def test_each_layer_adds_the_same_activations():
    one, two, three = (needed(num_layers=(1, depth)).per_image for depth in (1, 2, 3))
    assert three - two == two - one > 0


def test_with_checkpointing_a_layer_keeps_its_input_alone():
    two, three = (needed(num_layers=(1, depth), checkpointing=True).per_image for depth in (2, 3))
    tokens, channels = 15, 16
    assert three - two == 4 * tokens * channels


@pytest.mark.parametrize("mixed_precision", PRECISIONS)
def test_a_layer_keeps_what_its_operations_need_again(mixed_precision):
    tokens, channels, ratio, heads = 15, 16, 2, 2
    one, two = (needed({"mixed_precision": mixed_precision}, num_layers=(1, n)).per_image for n in (1, 2))
    # Inputs of the two norms, with mean and spread of each token, and the logarithm of the attention's sums.
    full = 2 * channels + 2 * 2 + heads
    # Inputs of qkv, proj, both linear layers of the MLP, and of GELU; queries, keys, values. The attention's result
    # is the input of proj, but in another order.
    linear = (1 + 3 + 1 + 1 + 1 + ratio + ratio) * channels
    size = 2 if mixed_precision == "bf16" else 4
    assert two - one == pytest.approx(tokens * (4 * full + size * linear), rel=0.15)


@pytest.mark.slow
def test_bf16_copies_the_weights_and_halves_most_activations():
    sizes = {"channels": 64, "head_dim": 32, "num_layers": (2, 4), "image_size": 16}
    full, half = needed(**sizes), needed({"mixed_precision": "bf16"}, **sizes)
    assert 0.5 < half.per_image / full.per_image < 0.7
    fixed = max(others for _, others in half.moments)
    assert 0.8 * 2 * cost(**sizes).parameters < fixed < 1.1 * 2 * cost(**sizes).parameters


def test_weights_do_not_count_as_activations():
    sizes = {"channels": 512, "patch_size": 4}
    weights = 4 * cost(**sizes).parameters
    assert needed(**sizes).at_peak(1) < 0.5 * weights
    assert needed(**sizes).per_image < 0.1 * weights


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mixed_precision", PRECISIONS)
def test_activations_are_what_lives_in_a_real_step(mixed_precision, checkpointing):
    model = ModelConfig(image_size=16, patch_size=2, channels=64, num_layers=(1, 3), num_classes=10, head_dim=32)
    real = Recipe(name="real", model=model, data=DataConfig(), train=TrainConfig(mixed_precision=mixed_precision))
    estimated = activations(real, checkpointing=checkpointing)
    flow = model.build()
    for parameter in flow.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if checkpointing:
        flow.enable_gradient_checkpointing()
    for size in (1, 8):
        images, labels = torch.zeros(size, 3, 16, 16), torch.zeros(size, dtype=torch.int64)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
                loss = nll_per_dim(flow(images, labels, torch.ones(size))).mean()
            loss.backward()
        changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert estimated.at_peak(size) == pytest.approx(max(accumulate(changes)), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", PRECISIONS)
def test_captions_take_the_memory_of_their_vectors_and_of_a_longer_sequence(mixed_precision):
    model = STARFLOW | {"channels": 64, "num_classes": 0, "context_dim": 128, "context_tokens": 24}
    real = recipe({"mixed_precision": mixed_precision}, image_size=16, **model)
    estimated, flow = activations(real, checkpointing=False), real.model.build()
    for parameter in flow.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for size in (1, 8):
        images, context = torch.zeros(size, 3, 16, 16), torch.zeros(size, 24, 128)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
                loss = nll_per_dim(flow(images, None, torch.ones(size), context=context)).mean()
            loss.backward()
        changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert estimated.at_peak(size) == pytest.approx(max(accumulate(changes)) + context.nbytes, rel=0.15)
    without = activations(recipe({"mixed_precision": mixed_precision}, image_size=16,
                                 **model | {"context_dim": 0, "context_tokens": 0}), checkpointing=False)  # fmt: skip
    assert estimated.per_image > without.per_image + context[0].nbytes


# -- what fits --------------------------------------------------------------------------------------------------

MOMENTS = Activations(((10, 1000), (30, 100)))


def test_the_peak_is_at_the_moment_that_needs_most():
    assert [MOMENTS.at_peak(size) for size in (1, 45, 46, 100)] == [1010, 1450, 1480, 3100]


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    for memory in (0, 1009, 1010, 1019, 1020, 1449, 1450, 1480, 5000, -7):
        size = MOMENTS.largest_micro_batch(memory)
        assert size >= 0
        assert size == 0 or MOMENTS.at_peak(size) <= memory
        assert MOMENTS.at_peak(size + 1) > memory


@pytest.mark.parametrize(
    ("train", "sharded"), [({}, False), ({"mixed_precision": "bf16", "ema_decay": 0.9}, True)], ids=str
)
def test_what_fits_a_device_leaves_a_part_of_its_memory_free(train, sharded):
    tiny = recipe(train)
    device = device_memory(tiny, 4, sharded=sharded)
    for checkpointing in (False, True):
        of_images = activations(tiny, checkpointing=checkpointing)
        for memory in (2**10, 2**20, 2**25, 2**30):
            size = device.largest_micro_batch(of_images, memory)
            assert size == 0 or device.at_peak(of_images, size) <= USABLE * memory
            assert device.at_peak(of_images, size + 1) > USABLE * memory - 1
        assert size > 0


def test_more_memory_fits_more_images():
    device, of_images = device_memory(recipe()), needed()
    sizes = [device.largest_micro_batch(of_images, mib * 2**20) for mib in (0, 1, 2, 8, 64)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0 < sizes[-1]


def test_a_device_has_no_room_without_memory():
    nothing = DeviceMemory(weights=0, gradients=0, optimizer=0, average=0, exchange=0, draws=0)
    assert nothing.largest_micro_batch(Activations(((8, 0),)), 0) == 0


def test_the_accumulation_is_the_smallest_that_fits_and_divides():
    for batch_size, devices, micro_batch in ((512, 8, 64), (512, 8, 63), (512, 8, 1), (512, 1, 1000), (96, 2, 20),
                                             (7, 1, 6), (512, 3, 64), (4, 8, 1)):  # fmt: skip
        fits = [a for a in range(1, batch_size + 1)
                if batch_size % (a * devices) == 0 and batch_size // (a * devices) <= micro_batch]  # fmt: skip
        assert accumulation_for(batch_size, devices, micro_batch) == min(fits, default=None)
    assert accumulation_for(96, 2, 20) == 3
    assert accumulation_for(512, 3, 64) is None


# -- sampling, and how figures read -----------------------------------------------------------------------------


@pytest.mark.parametrize(("patch_size", "tokens"), [(2, 2 * 16), (4, 2 * 4), ((2, 4), 16 + 4)])
def test_sampling_solves_the_tokens_of_all_blocks(patch_size, tokens):
    assert cost(patch_size=patch_size).sampling_tokens == tokens


def test_a_tarflow_for_likelihoods_can_be_estimated():
    tiny = recipe(noise_conditioned=False, num_classes=0)
    assert estimate(replace(tiny, noise=NoiseConfig(distribution="dequantise", weight="one"))).forward_flops > 0


def test_bytes_and_numbers_read_well():
    counts = (0, 1023, 1024, 1.5 * 2**20, 1023 * 2**20, 2**30, 3 * 2**40)
    assert [human_bytes(count) for count in counts] == [
        "0 B", "1023 B", "1 KiB", "1.5 MiB", "1023 MiB", "1 GiB", "3 TiB",
    ]  # fmt: skip
    counts = (0, 999, 1000, 417_200_736, 1.5e9, 1.5e12)
    assert [human_number(count) for count in counts] == ["0", "999", "1K", "417M", "1.5G", "1.5T"]


def test_the_cache_is_that_of_the_largest_block_and_doubles_where_it_is_guided():
    model = ModelConfig(image_size=8, in_channels=1, patch_size=2, channels=64, num_layers=(1, 3), num_classes=10)
    plain = Recipe(name="plain", model=model, data=DataConfig())
    guided = replace(plain, sampling=SamplingConfig(guidance=Guidance(weight=1.0, blocks=1)))
    assert estimate(plain).cache_bytes == 3 * 2 * 16 * 64 * 4  # layers, keys and values, tokens, channels, bytes
    assert estimate(guided).cache_bytes == 2 * estimate(plain).cache_bytes
