"""The least costs, against PyTorch's counter of FLOPs and against the tensors that products really read and write."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from itarflow.denoisers import FlowDenoiser
from itarflow.flow import TARFlow, nll_per_dim
from itarflow.inverse import Guidance
from itarflow.presets import itarflow_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from costs import H200, Cost, Peak, floor, inverse_costs, score_cost, total, training_cost

GUIDED = Guidance(weight=1.5, blocks=1)


@pytest.fixture(autouse=True)
def _products_of_pytorch(monkeypatch):
    """Those of oneDNN are the same, but nobody counts them."""
    monkeypatch.setattr("itarflow.runtime.kernels.cpu.ONEDNN", False)


def square(flow: TARFlow, batch_size: int, prefixes: bool = False) -> int:
    """FLOPs of a forward pass's attention that are counted above the diagonal, where nothing is looked at.

    Args:
        flow: any.
        batch_size: B.
        prefixes: of what comes before the tokens, alone.
    """
    count = 0
    for block in flow.blocks:
        rows = block.context_tokens + (block.start_token is not None)
        rows += 0 if prefixes else block.num_tokens - 1
        layers = sum(len(transformer.layers) for transformer in (*block.backbone, block.transformer))
        count += batch_size * 4 * layers * block.transformer.channels * rows * (rows - 1) // 2
    return count


class Flops(TorchDispatchMode):
    """What PyTorch's formulas count. Its own FlopCounterMode, which follows modules too, can't follow a score."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.count += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def counted(function: Any) -> int:
    with Flops() as flops, sdpa_kernel(SDPBackend.MATH):  # attention by products that there are formulas for
        function()
    return flops.count


def test_flops_of_a_training_step_are_those_counted(flow, make_inputs):
    if flow.blocks[0].num_tokens == 1 and flow.blocks[0].first_token is None:
        pytest.skip("a first block that does nothing has no gradients, which the count does not know")
    inputs = make_inputs(flow, 3)
    real = counted(lambda: nll_per_dim(flow(*inputs)).mean().backward())
    assert training_cost(flow, 3, torch.float32).flops == real - 3 * square(flow, 3)


def test_flops_of_a_score_are_those_counted(flow, make_inputs):
    inputs = make_inputs(flow, 3)
    real = counted(lambda: FlowDenoiser(flow).score(*inputs[:2], inputs[2] if inputs[2] is not None else 0.1))
    assert score_cost(flow, 3, torch.float32).flops == real - 3 * square(flow, 3)


@pytest.mark.parametrize("guidance", [None, GUIDED, Guidance(weight=1.5), Guidance(weight=1.5, temperature=2.0)])
def test_flops_of_an_inverse_are_those_counted(flow, make_inputs, guidance):
    _, labels, level = make_inputs(flow, 2)
    z = torch.zeros(2, *flow.z_shape)
    flow.inverse(z, labels, level)  # the first one also compares the layers with their cached form
    real = counted(lambda: flow.inverse(z, labels, level, guidance=guidance))
    guided = [block for index, block in enumerate(reversed(flow.blocks)) if is_guided(block, index, guidance)]
    both = SimpleNamespace(blocks=guided)
    above = square(flow, 2, prefixes=True) + square(both, 2, prefixes=True)
    assert total(inverse_costs(flow, 2, torch.float32, guidance)).flops == real - above


def is_guided(block: Any, from_noise: int, guidance: Guidance | None) -> bool:
    knows = block.class_embedding is not None or block.context_tokens > 0
    return guidance is not None and guidance.guides(from_noise) and (knows or guidance.temperature != 1)


class Products(TorchFunctionMode):
    """Values that linear layers, norms and attention are given and give."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.linear = self.keys_and_values = self.attention = 0

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.weights += args[1].numel() + args[2].numel()
            self.linear += args[0].numel() + result.numel()
        elif func is F.layer_norm:
            self.weights += kwargs["weight"].numel() + kwargs["bias"].numel()
        elif func is torch.layer_norm:
            self.weights += args[2].numel() + args[3].numel()
        elif func is F.rms_norm:
            self.weights += kwargs["weight"].numel()
        elif func is F.scaled_dot_product_attention:
            q, k, v = args
            self.keys_and_values += k.numel() + v.numel()
            self.attention += q.numel() + k.numel() + v.numel() + result.numel()
        return result


@pytest.mark.parametrize("guidance", [None, GUIDED])
def test_bytes_of_an_inverse_are_those_read(flow, make_inputs, guidance):
    _, labels, level = make_inputs(flow, 2)
    z = torch.zeros(2, *flow.z_shape)
    flow.inverse(z, labels, level)  # as above
    with Products() as read:
        flow.inverse(z, labels, level, guidance=guidance)
    placed = [block for block in flow.blocks if block.position_embedding is not None]
    positions = sum((block.num_tokens - 1) * block.transformer.channels for block in placed)
    starts = sum(block.start_token.numel() for block in flow.blocks if block.start_token is not None)
    tables = sum(block.class_embedding.weight.numel() for block in flow.blocks if block.class_embedding is not None)
    # In a guided block, noise level and first token are embedded for each pass: that could be done at once.
    twice = 0
    if guidance is not None and labels is not None:
        last = flow.blocks[-1]
        again = [m for m in (last.noise_embedding, last.first_token, last.proj_context) if m is not None]
        twice = sum(parameter.numel() for module in again for parameter in module.parameters())
    written = 0
    for index, block in enumerate(reversed(flow.blocks)):
        shape = block.cache_shape(4 if is_guided(block, index, guidance) else 2)
        written += math.prod(shape)
        if block.start_token is None:  # there is room for the last token too, which needs none
            written -= math.prod(shape) // shape[4]
    expected = read.weights - twice + positions + starts + tables + read.keys_and_values + written
    assert total(inverse_costs(flow, 2, torch.bfloat16, guidance)).moved_bytes == 2 * expected


def test_bytes_of_a_score_are_those_of_the_forward_pass_and_of_the_way_back(make_flow, make_inputs):
    flow = make_flow(num_layers=(1, 3), image_size=8)
    inputs = make_inputs(flow, 2)
    with Products() as forward:
        flow(*inputs)
    level_values = 2 * sum(8 + 32 + 32 + 8 for _ in flow.blocks)
    others = sum(15 * 8 + 3 * 8 for _ in flow.blocks)  # positions, classes
    weights = forward.weights + others
    # Back: gradients of outputs are read and of inputs written; attention reads q, k, v, its result and the gradient
    # of that, and writes three gradients: twice what it reads and writes on the way there.
    values = 2 * (forward.linear - level_values) + 3 * forward.attention
    assert score_cost(flow, 2, torch.float32).moved_bytes == 4 * (2 * weights + values)


class Multiplied(TorchDispatchMode):
    """Values that matrix products are given and give."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.values += sum(tensor.numel() for tensor in (*tree_leaves(args), result) if isinstance(tensor, Tensor))
        return result


def test_bytes_of_a_training_step_are_those_of_its_products_and_of_the_optimiser(make_flow, make_inputs):
    sizes = {"num_classes": 0, "noise_conditioned": False, "num_layers": (2, 1), "image_size": 8}
    flow = make_flow(**sizes)
    with Multiplied() as real, sdpa_kernel(SDPBackend.MATH):
        nll_per_dim(flow(*make_inputs(flow, 2))).mean().backward()
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    matrices = sum(m.weight.numel() for m in flow.modules() if isinstance(m, nn.Linear))
    biases = sum(m.bias.numel() for m in flow.modules() if isinstance(m, nn.Linear))
    tokens, width = 2 * 15, 8
    entrance = tokens * (width + 8) + 8 * width  # the gradient of the image, which nothing asks for, costs nothing
    others = parameters - matrices - biases - 2 * width  # norms and positions but for the last; read there and back
    # A weight gradient is written as part of the products here, and as float32 in the count.
    # The entrances' inputs are parts of tensors, for which PyTorch adds the bias apart.
    products = real.values + entrance - matrices + biases + 2 * width + 2 * others
    attention = (4 + 8) * tokens * 3 * width
    expected = 4 * (products + attention) + 4 * 8 * parameters
    assert training_cost(flow, 2, torch.float32).moved_bytes == expected


def test_costs_grow_with_the_batch_but_weights_are_read_once(make_flow):
    flow = make_flow(num_layers=(1, 3), image_size=8)
    one, two, three = (total(inverse_costs(flow, size, torch.float32, GUIDED)) for size in (1, 2, 3))
    assert (two.flops, three.flops) == (2 * one.flops, 3 * one.flops)
    assert three.moved_bytes - two.moved_bytes == two.moved_bytes - one.moved_bytes < one.moved_bytes


def test_floor_is_the_longer_of_computing_and_moving_at_each_step():
    peak = Peak("a device", torch.float32, flops_per_second=10.0, bytes_per_second=2.0)
    assert floor([Cost(100, 1)], peak) == 10
    assert floor([Cost(1, 10)], peak) == 5
    assert floor([Cost(100, 1), Cost(1, 10)], peak) == 15
    assert floor([total([Cost(100, 1), Cost(1, 10)])], peak) == pytest.approx(10.1)


def test_example_of_the_small_model_at_64_pixels_on_an_h200():
    with torch.device("meta"):
        flow = itarflow_model("S", 64).build()
    one, two = (total(inverse_costs(flow, size, torch.bfloat16, Guidance(weight=2.1, blocks=1))) for size in (1, 2))
    cache = (two.moved_bytes - one.moved_bytes) / H200.bytes_per_second
    assert cache == pytest.approx(18.7e-3, rel=0.01)
    assert 24 / 30 * cache == pytest.approx(
        15e-3, rel=0.01
    )  # of the deep block, whose two branches are 24 of 30 layers
    assert 10 * floor([score_cost(flow, 256, torch.bfloat16)], H200) / 256 == pytest.approx(20e-3, rel=0.02)
    assert math.isfinite(floor([training_cost(flow, 1, torch.bfloat16)], H200))
