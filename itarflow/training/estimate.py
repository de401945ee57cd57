"""Estimates of a training, without allocating anything: parameters, FLOPs an image, and memory of each device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from itarflow.flow.block import AutoregressiveBlock
from itarflow.flow.density import nll_per_dim
from itarflow.flow.tarflow import TARFlow
from itarflow.flow.transformer import Layer
from itarflow.runtime.text import human_bytes
from itarflow.training.recipe import Recipe
from itarflow.training.sharding import sends_bf16

USABLE = 0.9
"""Part of a device's memory that tensors may fill; the rest goes to the driver, the kernels and fragmentation."""


@dataclass(frozen=True)
class Activations:
    """The memory of a forward and backward pass besides weights and gradients."""

    moments: tuple[tuple[int, int], ...]
    """The moments of the pass that can be its peak: bytes of each image of the micro-batch, and bytes that do not
    depend on it, such as the 2-byte copies of the weights under bf16."""

    @property
    def per_image(self) -> int:
        """Bytes that each further image of a large micro-batch needs."""
        return max(per_image for per_image, _ in self.moments)

    def at_peak(self, micro_batch: int) -> int:
        """Bytes for so many images at a time."""
        return max(micro_batch * per_image + fixed for per_image, fixed in self.moments)

    def largest_micro_batch(self, memory: int) -> int:
        """Images at a time that fit into so many bytes; 0 = not even one."""
        if self.at_peak(1) > memory:
            return 0
        return min((memory - fixed) // per_image for per_image, fixed in self.moments if per_image)


@dataclass(frozen=True)
class Estimate:
    """Costs of a recipe."""

    parameters: int
    forward_flops: int
    """Of one image through the flow, multiplications and additions counted apart."""
    training_flops: int
    """Of one image: forward and backward, and the second forward of gradient checkpointing."""
    sampling_tokens: int
    """Sequential token steps of one inverse, over all blocks."""
    cache_bytes: int
    """Largest key-value cache of sampling, for one image in float32, both passes if the block is guided."""


@dataclass(frozen=True)
class DeviceMemory:
    """The persistent memory of one device of a training, in bytes; all of it is float32."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    average: int
    """The moving average of the weights, if there is one."""
    exchange: int
    """Several devices that split the model (FSDP2): gathered weights and gradients, those of two layers and of the
    modules around the layers. DDP sends its gradients from where they are."""
    draws: int
    """The random numbers of a step: each process draws those of the global batch, and uses its own."""

    @property
    def state(self) -> int:
        """All of it: the bytes that a device needs before the first image."""
        return self.weights + self.gradients + self.optimizer + self.average + self.exchange + self.draws

    def at_peak(self, activations: Activations, micro_batch: int) -> int:
        """Bytes at the peak of a training step with so many images a device at a time."""
        return self.state + activations.at_peak(micro_batch)

    def largest_micro_batch(self, activations: Activations, memory: int) -> int:
        """Images a device at a time that fit into `USABLE` of its memory in bytes; 0 = not even one."""
        return activations.largest_micro_batch(int(USABLE * memory) - self.state)


def estimate(recipe: Recipe) -> Estimate:
    """Count on the meta device, where tensors have shapes but no memory; takes seconds at any size."""
    with torch.device("meta"):
        flow = recipe.model.build(recipe.noise_range)
    with FlopCounterMode(display=False) as counter:
        flow(*_example(recipe, flow, 1))
    forward = counter.get_total_flops()
    return Estimate(
        parameters=sum(parameter.numel() for parameter in flow.parameters()),
        forward_flops=forward,
        training_flops=(4 if recipe.train.gradient_checkpointing else 3) * forward,
        sampling_tokens=flow.num_solved_tokens,
        cache_bytes=_cache_bytes(recipe, flow),
    )


def device_memory(recipe: Recipe, devices: int = 1, *, sharded: bool = False) -> DeviceMemory:
    """The memory of the device that holds the most.

    Args:
        recipe: its train.shard is ignored.
        devices: how many there are.
        sharded: False = each holds everything (DDP); True = they split it (FSDP2).
    """
    with torch.device("meta"):
        flow = recipe.model.build(recipe.noise_range)
    whole = _bytes(flow)
    if sharded:
        # Parameters are split by rows, and some device has the longest part of each.
        rows = ((math.ceil(len(p) / devices), p.numel() // len(p)) for p in flow.parameters())
        share = 4 * sum(count * values for count, values in rows)
        layers = [sum(map(_bytes, _unit(recipe, module))) for module in flow.modules() if isinstance(module, Layer)]
        # One layer computes and the next is prefetched, each with its gradients; the rest stays gathered. In bfloat16
        # the weights of both take half of that, as do the gradients of one: those of the other are sent as float32.
        of_layers = 2.5 if sends_bf16(recipe) else 4
        exchange = int(of_layers * max(layers)) + 2 * (whole - sum(layers)) if devices > 1 else 0
    else:
        share, exchange = whole, 0
    average = 0 if recipe.train.ema_decay is None else share
    noise = 4 * recipe.train.batch_size * math.prod(flow.image_shape)
    draws = 2 * noise if recipe.codec.vae is not None and recipe.codec.sample_posterior else noise
    return DeviceMemory(
        weights=share, gradients=share, optimizer=2 * share, average=average, exchange=exchange, draws=draws
    )


def _unit(recipe: Recipe, layer: Layer) -> tuple[nn.Module, ...]:
    """What of a layer is gathered at a time, see `sharding.distribute`."""
    return (layer.attention, layer.mlp) if sends_bf16(recipe) else (layer,)


def activations(recipe: Recipe, *, checkpointing: bool, sharded: bool = False) -> Activations:
    """The memory of images in the recipe's precision, traced through a forward and backward pass on the meta device.

    Args:
        recipe: its train.gradient_checkpointing is ignored.
        checkpointing: whether activations are computed again in the backward pass.
        sharded: whether several devices split the model: weights that come in bfloat16 need no copies.
    """
    with torch.device("meta"):
        flow = recipe.model.build(recipe.noise_range)
    if sharded and sends_bf16(recipe):
        for layer in [module for module in flow.modules() if isinstance(module, Layer)]:
            for part in _unit(recipe, layer):
                part.to(torch.bfloat16)
    for parameter in flow.parameters():
        parameter.grad = torch.empty_like(parameter)  # as left by the micro-batch before
    precision = _Precision(torch.bfloat16 if recipe.train.mixed_precision == "bf16" else torch.float32)
    if checkpointing:
        flow.enable_gradient_checkpointing(_checkpoint_within(precision))
    example = _example(recipe, flow, _BATCH)
    images, _, _, context = example
    given = [*flow.parameters(), *(cast(Tensor, p.grad) for p in flow.parameters()), *flow.buffers(), images]
    given += [] if context is None else [context]
    with _Living(given) as living:
        with precision:
            loss = nll_per_dim(flow(*example)).mean()
        torch.autograd.backward([loss])
    of_context = 0 if context is None else context.nbytes // _BATCH
    return Activations(tuple((of_images // _BATCH + of_context, of_others) for of_images, of_others in living.moments))


def accumulation_for(batch_size: int, devices: int, micro_batch: int) -> int | None:
    """The smallest train.accumulation by which no device has more than micro_batch >= 1 images at a time.

    None = the devices can't share the global batch evenly.
    """
    share, rest = divmod(batch_size, devices)
    if rest or not share:
        return None
    return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= micro_batch)


def check_memory(recipe: Recipe, memory: int, devices: int, *, here: int = 1, sharded: bool = False) -> None:
    """Refuse a training whose steps clearly can't fit, before the system is out of memory and ends some program.

    Args:
        recipe: resolved.
        memory: bytes that the processes of a device or machine may take.
        devices: processes of the training.
        here: those among them that share this memory.
        sharded: whether they split the model.

    Raises:
        ValueError: naming both amounts, and what would fit.
    """
    share = max(1, recipe.train.batch_size // devices)
    micro_batch = max(1, share // recipe.train.accumulation)
    if here * _generous_bytes(recipe, micro_batch) < memory // 2:
        return  # far from it: that is not worth the seconds of an estimate
    device = device_memory(recipe, devices, sharded=sharded)
    split = sharded and devices > 1
    passes = activations(recipe, checkpointing=recipe.train.gradient_checkpointing, sharded=split)
    needed = here * device.at_peak(passes, micro_batch)
    if needed <= memory:
        return
    fits = passes.largest_micro_batch(memory // here - device.state)
    accumulation = accumulation_for(recipe.train.batch_size, devices, fits) if fits else None
    advice = [f"--train.accumulation {accumulation}"] if accumulation else []
    advice += [] if recipe.train.gradient_checkpointing else ["--train.gradient-checkpointing"]
    advice += [] if recipe.train.mixed_precision == "bf16" else ["--train.mixed-precision bf16"]
    advice += ["a smaller model, or --train.shard on several devices"]
    of_all = f" in {here} processes" if here > 1 else ""
    raise ValueError(
        f"a training step needs about {human_bytes(needed)}{of_all} for {micro_batch:,} images at a time, but there "
        f"are {human_bytes(memory)}. Try {', '.join(advice)}; --dry-run shows the "
        "estimates, and --no-check-memory trains all the same."
    )


def _generous_bytes(recipe: Recipe, micro_batch: int) -> int:
    """More than a step needs, without tracing it: some hundred floats for each channel of each token and layer."""
    with torch.device("meta"):
        flow = recipe.model.build(recipe.noise_range)
    blocks = [block for block in flow.blocks if isinstance(block, AutoregressiveBlock)]
    layers = recipe.model.num_layers
    of_image = sum(
        (block.num_tokens + recipe.model.context_tokens) * block.transformer.channels * (number + 1)
        for block, number in zip(blocks, layers, strict=True)
    )
    given = len(blocks) * math.prod(flow.image_shape) + math.prod(recipe.model.context_shape)
    floats = (60 + 10 * recipe.model.mlp_ratio) * (of_image + given)
    return 8 * _bytes(flow) + 4 * micro_batch * floats


def _bytes(module: nn.Module) -> int:
    return sum(4 * parameter.numel() for parameter in module.parameters())


def _cache_bytes(recipe: Recipe, flow: TARFlow) -> int:
    guides = recipe.sampling.guidance.guides
    blocks = enumerate(reversed(cast(Sequence[AutoregressiveBlock], flow.blocks)))
    return max(4 * math.prod(block.cache_shape(2 if guides(index) else 1)) for index, block in blocks)


def _example(recipe: Recipe, flow: TARFlow, size: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Images, labels, noise levels and context, as the flow takes them."""
    model = recipe.model
    with torch.device("meta"):
        labels = torch.zeros(size, dtype=torch.int64) if model.num_classes else None
        context = torch.zeros(size, *model.context_shape) if model.takes_captions else None
        return torch.zeros(size, *flow.image_shape), labels, torch.ones(size), context


# -- tracing a forward and backward pass without memory -------------------------------------------------------------

_BATCH = 8191
"""A prime number of images: it divides the sizes of tensors that belong to images, and no others."""


def _checkpoint_within(precision: _Precision) -> Callable[..., Any]:
    """Gradient checkpointing whose second forward pass has the precision of the first, as autocast's has."""

    def layer_within(layer: nn.Module, *inputs: Any) -> Tensor:
        with precision:
            return layer(*inputs)

    return lambda layer, *inputs: checkpoint(layer_within, layer, *inputs, use_reentrant=False)


class _Precision(TorchFunctionMode):
    """Emulates on the meta device, which has neither, autocast and fused attention.

    The rule of autocast for this network: linear layers and attention take and give `dtype`; all else, the norms and
    the sum of the layers among it, stays what its inputs are. The copies of weights live until the outermost exit.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype, self._depth = dtype, 0
        self._copies: dict[Tensor, Tensor] = {}

    def __enter__(self) -> _Precision:
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._copies.clear()
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return func(*(self._cast(tensor) for tensor in args))
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._cast(tensor) for tensor in args)
            # It keeps what the kernels of GPUs keep: queries, keys, values, the result, and a number a row.
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)[0]
        return func(*args, **(kwargs or {}))

    def _cast(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == self._dtype:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.to(self._dtype)
        if tensor not in self._copies:
            self._copies[tensor] = tensor.to(self._dtype)
        return self._copies[tensor]


class _Living(TorchDispatchMode):
    """Inside `with`: how many bytes of new tensors live at a time.

    Args:
        given: tensors that existed before, and do not count.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.moments: list[tuple[int, int]] = []
        """Bytes that belong to images, and others, at the moments that no other one exceeds in both."""
        self._images = self._others = 0
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in given}

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return results

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self._count(size)
        now = self._images, self._others
        if not any(_covers(moment, now) for moment in self.moments):
            self.moments = [moment for moment in self.moments if not _covers(now, moment)] + [now]

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self._count(-size)

    def _count(self, size: int) -> None:
        if size % _BATCH:
            self._others += size
        else:
            self._images += size


def _covers(moment: tuple[int, int], other: tuple[int, int]) -> bool:
    return moment[0] >= other[0] and moment[1] >= other[1]
