"""How a flow is spread over processes: replicated (DDP) or sharded (FSDP2).

Sharding is torch's own `fully_shard`: Accelerate's needs an accelerator, so it can't be tested on CPUs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    parse_flag_from_env,
    patch_environment,
)
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from itarflow.flow.tarflow import TARFlow
from itarflow.flow.transformer import Layer
from itarflow.runtime.devices import on_cpu
from itarflow.runtime.launch import joined
from itarflow.training.recipe import Recipe
from itarflow.training.settings import check_trackers


def sends_bf16(recipe: Recipe) -> bool:
    """Whether shards of the layers' products are gathered in bfloat16.

    Compiled layers are sharded as a whole, norms and all, in float32: a unit inside would cut their code into pieces.
    """
    return recipe.train.mixed_precision == "bf16" and not recipe.train.compile


def launcher_asks_for_sharding() -> bool:
    """Whether the Accelerate config in use has `distributed_type: FSDP`."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def launcher_asks_for_checkpointing() -> bool:
    """Whether the Accelerate config in use has `fsdp_activation_checkpointing: true`."""
    return launcher_asks_for_sharding() and parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")


def distribute(flow: TARFlow, accelerator: Accelerator, sharded: bool, *, bf16: bool = False) -> nn.Module:
    """The flow on the process's device: wrapped in DDP if there are several processes, or sharded over them in place.

    Each transformer layer is a unit of sharding; the embeddings and projections around them are one more.

    Args:
        flow: on any device.
        accelerator: of the training.
        sharded: over the processes, by FSDP2.
        bf16: steps run under autocast to bfloat16: what a layer's products weigh is sent as autocast would cast it.
            Norms, embeddings and projections, and all gradients, are sent in float32.
    """
    if not sharded:
        # No forward pass need send the buffer: it is computed from what all have reduced, so it is the same on all.
        replicas = nn.parallel.DistributedDataParallel
        replicas._set_params_and_buffers_to_ignore_for_model(flow, ["prior_variance"])
        return accelerator.prepare(flow)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if bf16:  # what they return is only added to something else
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # Each unit is moved to the device as it is split: no device ever holds the whole.
    for module in flow.modules():
        if isinstance(module, Layer) and bf16:
            fully_shard([module.attention, module.mlp], mesh=mesh, mp_policy=precision)
        elif isinstance(module, Layer):
            fully_shard(module, mesh=mesh)
    fully_shard(flow, mesh=mesh)
    return flow


def compile_layers(flow: TARFlow) -> None:
    """Compile each transformer layer in place, sharded or not; all of one width share their code."""
    for module in flow.modules():
        if isinstance(module, Layer):
            module.compile()


def clear_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Drop the gradients; those of DDP, which are views of the buckets that it sends, become zero and stay there."""
    optimizer.zero_grad(set_to_none=not isinstance(model, nn.parallel.DistributedDataParallel))


def clip_grad_norm(model: nn.Module, limit: float) -> float:
    """Scale the gradients down to `limit`, inf = never; returns the norm that they had, over all processes."""
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if math.isfinite(limit):
        clip_grads_with_norm_(model.parameters(), limit, norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


@contextmanager
def whole_flow(
    model: nn.Module, recipe: Recipe, ema: EMAModel | None, device: torch.device, wanted: bool = True
) -> Iterator[TARFlow]:
    """A flow that can be evaluated, sampled and saved, with averaged weights if there are any. All processes enter.

    A sharded flow is gathered into a copy; otherwise it is the model itself, with its weights swapped for the time.

    Args:
        model: from `distribute`.
        recipe: of the flow.
        ema: the averages.
        device: where to gather a sharded flow.
        wanted: False for a process that only takes part in gathering: its flow is on the meta device.
    """
    if not isinstance(model, FSDPModule):
        flow = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        with averaged_weights(ema, flow):
            yield flow  # type: ignore[misc]
        return
    names = [name for name, _ in model.named_parameters()]
    shards = model.parameters() if ema is None else ema.shadow_params
    with torch.device("meta"):
        flow = recipe.model.build(recipe.noise_range)
    tensors = {name: buffer.to(device, copy=True) for name, buffer in model.named_buffers()}
    for name, shard in zip(names, shards, strict=True):
        whole = _whole(shard.detach())
        if wanted:
            tensors[name] = whole.to(device)
    if wanted:
        flow.load_state_dict(tensors, assign=True)
    yield flow.eval()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


@contextmanager
def averaged_weights(ema: EMAModel | None, model: nn.Module) -> Iterator[None]:
    """While inside, the model has its averaged weights, if there are any, and the average has the model's."""
    pairs = [] if ema is None else list(zip(model.parameters(), ema.shadow_params, strict=True))
    exchanged = []
    try:
        for parameter, average in pairs:
            _exchange(parameter, average)
            exchanged.append((parameter, average))
        yield
    finally:
        for parameter, average in exchanged:
            _exchange(parameter, average)


@torch.no_grad()
def update_average(ema: EMAModel, model: nn.Module) -> None:
    """`ema.step`, to the last bit, but without its temporary copy of all weights."""
    ema.optimization_step += 1
    ema.cur_decay_value = ema.get_decay(ema.optimization_step)
    averages, weights = ema.shadow_params, list[Tensor](model.parameters())
    for part in _parts([weight.numel() for weight in weights], _VALUES_AT_A_TIME):
        difference = torch._foreach_sub(averages[part], weights[part])
        torch._foreach_sub_(averages[part], difference, alpha=1 - ema.cur_decay_value)


_VALUES_AT_A_TIME = 2**26


def _parts(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Slices of a list whose sizes sum up to `limit` at most, but for single ones that are larger."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if total and total + size > limit:
            yield slice(start, index)
            start, total = index, 0
        total += size
    yield slice(start, len(sizes))


@torch.no_grad()
def _exchange(one: Tensor, other: Tensor) -> None:
    """Exchange the values of two tensors or shards, which stay where they are: DDP, FSDP2 and optimisers know them."""
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def make_accelerator(run_path: Path, *, accumulation: int, trackers: Sequence[str]) -> Accelerator:
    """The Accelerator of a training, which handles devices, processes and trackers, no more.

    Precision is the loop's own autocast, so that evaluation and samples are float32, and sharding is torch's own.

    Args:
        run_path: folder of the run, where trackers that write files do so.
        accumulation: micro-batches of an optimiser step.
        trackers: names, as Accelerate knows them.

    Raises:
        ValueError: the launcher asks for an engine that has its own optimiser and states, or a tracker is missing.
    """
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise ValueError(
                f"the Accelerate config asks for {engine}, which has its own optimiser and states; use "
                "recipes/launch/fsdp2.yaml or --train.shard, which split a model over devices as well."
            )
    check_trackers(trackers)
    joined()
    with patch_environment(accelerate_use_fsdp="false"):
        return Accelerator(
            cpu=on_cpu(),
            mixed_precision="no",
            dynamo_backend="no",
            # A plugin: before a plain number ACCELERATE_GRADIENT_ACCUMULATION_STEPS would win.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            log_with=list(trackers) or None,
            project_dir=run_path,
        )
