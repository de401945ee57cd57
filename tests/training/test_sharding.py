"""How a flow is spread over processes: what a group of one process can show of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from itarflow.data import DataConfig
from itarflow.flow import nll_per_dim
from itarflow.presets import ModelConfig
from itarflow.training import Recipe, TrainConfig, sharding
from itarflow.training.estimate import activations, device_memory
from itarflow.training.sharding import averaged_weights, clear_gradients, distribute, update_average


@pytest.mark.parametrize("limit", [1, 8, 10**9])
def test_averages_are_those_of_diffusers_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(sharding, "_VALUES_AT_A_TIME", limit)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ours, theirs = (EMAModel(model.parameters(), 0.99, foreach=True) for _ in range(2))
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        update_average(ours, model)
        theirs.step(model.parameters())
    assert same(ours.shadow_params, theirs.shadow_params)
    assert ours.optimization_step == theirs.optimization_step


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_average(model: nn.Module) -> EMAModel:
    ema = EMAModel(model.parameters(), 0.9, foreach=True)
    with torch.no_grad():
        for average in ema.shadow_params:
            average.mul_(2).add_(1)
    return ema


def values(tensors: Any) -> list[torch.Tensor]:
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(one.equal(other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("sharded", [False, True])
def test_averaged_weights_are_lent_in_place_and_given_back_even_after_an_error(group: None, sharded: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    ema = with_average(model)
    weights, averages = values(model.parameters()), values(ema.shadow_params)
    places = [id(tensor) for tensor in (*model.parameters(), *ema.shadow_params)]
    with suppress(KeyError), averaged_weights(ema, model):
        assert same(values(model.parameters()), averages)
        assert same(values(ema.shadow_params), weights)
        raise KeyError
    assert same(values(model.parameters()), weights)
    assert same(values(ema.shadow_params), averages)
    assert places == [id(tensor) for tensor in (*model.parameters(), *ema.shadow_params)]


def test_an_exchange_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema = with_average(model)
    weights, averages = values(model.parameters()), values(ema.shadow_params)
    clone, calls = torch.Tensor.clone, []

    def failing(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return clone(tensor, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", failing)
        with pytest.raises(torch.OutOfMemoryError), averaged_weights(ema, model):
            pass
    assert same(values(model.parameters()), weights)
    assert same(values(ema.shadow_params), averages)


def test_recordings_of_a_flow_notice_that_its_weights_are_others_for_a_while() -> None:
    model = nn.Linear(2, 2)
    versions = [model.weight._version]
    with averaged_weights(with_average(model), model):
        versions.append(model.weight._version)
    versions.append(model.weight._version)
    assert versions == sorted(set(versions))


def test_sharded_products_are_sent_in_bfloat16_and_give_what_autocast_gives(
    group: None, make_flow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = make_flow(num_classes=0)
    alone = copy.deepcopy(flow)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    model = distribute(flow, accelerator, sharded=True, bf16=True)
    images, seen = torch.randn(4, *flow.image_shape, generator=torch.Generator().manual_seed(0)), []
    layer = flow.blocks[0].transformer.layers[0]
    layer.mlp[0].register_forward_hook(lambda m, x, _: seen.append((m.weight.dtype, x[0].dtype)))
    layer.register_forward_hook(lambda m, x, y: seen.append((m.mlp_norm.weight.dtype, x[0].dtype, y.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [nll_per_dim(module(images, None, 0.3)).mean() for module in (model, alone)]
    assert seen == [(torch.bfloat16, torch.float32), (torch.float32,) * 3]
    assert losses[0].equal(losses[1])
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32, name
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


def test_a_forward_pass_sends_no_buffers(group: None, make_flow: Callable[..., Any]) -> None:
    flow = make_flow(volume_preserving=True)
    model = distribute(flow, SimpleNamespace(prepare=DistributedDataParallel), sharded=False)  # type: ignore[arg-type]
    assert dict(flow.named_buffers())
    assert not model.modules_buffers


def test_gradients_stay_in_the_buckets_that_are_sent(group: None, make_flow: Callable[..., Any]) -> None:
    flow = make_flow(num_classes=0)
    alone = copy.deepcopy(flow)
    model = DistributedDataParallel(flow, gradient_as_bucket_view=True)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (model, alone)]
    generator, places = torch.Generator().manual_seed(0), []
    for _ in range(3):
        for micro in range(2):
            images = torch.randn(4, *flow.image_shape, generator=generator)
            model.require_backward_grad_sync = micro == 1  # as within no_sync
            nll_per_dim(model(images, None, 0.3)).mean().backward()
            nll_per_dim(alone(images, None, 0.3)).mean().backward()
        places.append([parameter.grad.data_ptr() for parameter in flow.parameters()])
        for module, optimizer in zip((model, alone), optimizers, strict=True):
            optimizer.step()
            clear_gradients(module, optimizer)
    assert places[1] == places[2]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in flow.parameters())
    assert all(parameter.grad is None for parameter in alone.parameters())
    for ours, theirs in zip(flow.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("mixed_precision", "size", "parts"), [("no", 8, 2), ("bf16", 16, 1)])
def test_replicas_need_the_memory_that_is_estimated(group: None, mixed_precision: Any, size: int, parts: int) -> None:
    model = ModelConfig(image_size=16, patch_size=2, channels=128, num_layers=(1, 3), num_classes=0, head_dim=32)
    train = TrainConfig(mixed_precision=mixed_precision, ema_decay=0.9, batch_size=size * parts)
    recipe = Recipe(name="real", model=model, data=DataConfig(), train=train)
    flow = DistributedDataParallel(model.build(), gradient_as_bucket_view=True)
    optimizer, ema = torch.optim.AdamW(flow.parameters(), fused=True), EMAModel(flow.parameters(), 0.9)

    def step() -> None:
        noise = torch.randn(size * parts, 3, 16, 16)
        for part in range(parts):
            flow.require_backward_grad_sync = part == parts - 1
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
                loss = nll_per_dim(flow(noise[part * size :][:size], None, torch.ones(size))).mean()
            loss.backward()
        optimizer.step()
        clear_gradients(flow, optimizer)
        update_average(ema, flow)

    for _ in range(3):  # in which buckets are laid anew
        step()
    kept = device_memory(recipe, 2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    lives = kept.weights + kept.gradients + kept.optimizer + kept.average
    needed = kept.at_peak(activations(recipe, checkpointing=False), size)
    assert needed == pytest.approx(lives + max(accumulate(changes)), rel=0.05)
