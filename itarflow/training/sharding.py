"""How a flow is spread over processes: replicated (DDP) or sharded (FSDP2).

Sharding is torch's own `fully_shard`: Accelerate's needs an accelerator, so it can't be tested on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env, patch_environment
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from itarflow.flow.tarflow import TARFlow
from itarflow.flow.transformer import Layer
from itarflow.runtime.devices import on_cpu
from itarflow.training.recipe import Recipe
from itarflow.training.settings import check_trackers


def launcher_asks_for_sharding() -> bool:
    """Whether the Accelerate config in use has `distributed_type: FSDP`."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def launcher_asks_for_checkpointing() -> bool:
    """Whether the Accelerate config in use has `fsdp_activation_checkpointing: true`."""
    return launcher_asks_for_sharding() and parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")


def distribute(flow: TARFlow, accelerator: Accelerator, sharded: bool) -> nn.Module:
    """The flow on the process's device: wrapped in DDP if there are several processes, or sharded over them in place.

    Each transformer layer is a unit of sharding; the embeddings and projections around them are one more.
    """
    if not sharded:
        return accelerator.prepare(flow)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Each unit is moved to the device as it is split: no device ever holds the whole.
    for module in flow.modules():
        if isinstance(module, Layer):
            fully_shard(module, mesh=mesh)
    fully_shard(flow, mesh=mesh)
    return flow


def compile_layers(flow: TARFlow) -> None:
    """Compile each transformer layer in place, sharded or not; all of one width share their code."""
    for module in flow.modules():
        if isinstance(module, Layer):
            module.compile()


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
    """While inside, the model has its averaged weights, if there are any."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


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
    with patch_environment(accelerate_use_fsdp="false"):
        return Accelerator(
            cpu=on_cpu(),
            mixed_precision="no",
            dynamo_backend="no",
            # A plugin: before a plain number ACCELERATE_GRADIENT_ACCUMULATION_STEPS would win.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
            log_with=list(trackers) or None,
            project_dir=run_path,
        )
