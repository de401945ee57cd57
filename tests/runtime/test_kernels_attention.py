"""Which kernel attention names on a GPU, seen on tensors that only pretend to be there."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from itarflow.runtime.kernels import attention, attention_bias

FLASH, EFFICIENT = (f"aten._scaled_dot_product_{name}_attention.default" for name in ("flash", "efficient"))
HALVES = [torch.bfloat16, torch.float16]


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.given = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not str(function).startswith("prim."):
            self.names.append(str(function))
            self.given.append(args)
        return function(*args, **(kwargs or {}))


def heads(dtype, width=64, queries=9, device="cuda"):
    """Queries, keys and values of 9 tokens as a layer makes them, in one tensor."""
    together = torch.empty(2, 9, 3, 4, width, dtype=dtype, device=device)
    q, k, v = together.permute(2, 0, 3, 1, 4).unbind()
    return q.narrow(2, 9 - queries, queries), k, v


def seen(*given):
    with Operators() as operators:
        out = attention(*given)
    q = given[0]
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    return operators.names


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bits_without_a_mask_take_flash(dtype):
    with FakeTensorMode():
        assert seen(*heads(dtype), None, True) == [FLASH]
        assert seen(*heads(dtype, queries=1)) == [FLASH]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 9), (2, 1, 3, 9)], ids=str)
def test_a_mask_is_one_bias_in_the_queries_type(dtype, shape):
    with FakeTensorMode():
        bias = attention_bias(torch.ones(shape, dtype=torch.bool, device="cuda"), dtype)
        assert (bias.shape, bias.dtype) == (shape, dtype)
        assert bias.stride(-1) == 1
        assert bias.stride(-2) == 16
        given = heads(dtype, queries=3)
        with Operators() as operators:
            attention(*given, bias)
    assert operators.names == ["aten.expand.default", EFFICIENT]  # a view, and one kernel
    given = operators.given[-1]
    assert given[3].shape == (2, 4, 3, 9)
    assert given[4] is False  # no gradient is asked for


def test_float32_takes_the_efficient_kernel():
    with FakeTensorMode():
        assert seen(*heads(torch.float32), None, True) == [EFFICIENT]
        assert seen(*heads(torch.float32, queries=1)) == [EFFICIENT]


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float64, 64), (torch.bfloat16, 4), (torch.float32, 20), (torch.float16, 256)]
)
def test_others_are_left_to_pytorch(dtype, width):
    with FakeTensorMode():
        bias = attention_bias(torch.ones(9, 9, dtype=torch.bool, device="cuda"), dtype)
        for given in ((None, True), (bias, False)):
            assert not {FLASH, EFFICIENT} & set(seen(*heads(dtype, width), *given))
        few = heads(torch.bfloat16, queries=3)  # from the first key on, which flash counts from the last
        assert FLASH not in seen(*few, None, True)


def test_the_choice_of_the_user_holds():
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # which has second derivatives
        assert not {FLASH, EFFICIENT} & set(seen(*heads(torch.bfloat16), None, True))


def test_a_bias_says_what_the_mask_says(monkeypatch):
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    assert attention_bias(mask, torch.float32) is mask
    q, k, v = (torch.randn(2, 4, count, 8) for count in (5, 9, 9))

    class Cuda:
        type = "cuda"

    class Pretending(torch.Tensor):
        device = Cuda()

    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *given, device, **named: full(*given, **named))
    bias = attention_bias(mask.as_subclass(Pretending), torch.float32).as_subclass(torch.Tensor)
    assert bias.dtype == torch.float32
    torch.testing.assert_close(attention(q, k, v, bias), attention(q, k, v, mask))


def test_gradients_are_prepared_where_they_are_wanted(monkeypatch):
    given = []
    monkeypatch.setattr(
        torch.ops.aten,
        "_scaled_dot_product_efficient_attention",
        lambda q, k, v, bias, with_gradient, *rest: given.append(with_gradient) or (q,),
    )
    with FakeTensorMode():
        q, k, v = heads(torch.float32)
        monkeypatch.setattr(type(q), "requires_grad", property(lambda tensor: tensor is q), raising=False)
        attention(q, k, v, None, True)
        attention(k, k, v, None, True)
        with torch.no_grad():
            attention(q, k, v, None, True)
    assert given == [True, False, False]


@pytest.mark.parametrize(
    ("dtype", "masked", "name"), [(torch.bfloat16, False, "flash"), (torch.float32, True, "effi")]
)
def test_compiled_it_is_one_graph_with_that_kernel(dtype, masked, name):
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    def attend(q, k, v, bias):
        return attention(q, k, v, bias, not masked)

    torch._dynamo.reset()
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bias = attention_bias(torch.ones(9, 9, dtype=torch.bool, device="cuda"), dtype) if masked else None
        torch.compile(attend, backend=backend, fullgraph=True)(*heads(dtype), bias)
    assert f"aten._scaled_dot_product_{name}" in graphs[0]
    torch._dynamo.reset()


@pytest.mark.parametrize(("capability", "fused"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((13, 0), False)])
def test_only_devices_for_which_the_kernels_are_built_take_them(monkeypatch, capability, fused):
    class Properties:
        major, minor = capability

    kernels = sys.modules[attention.__module__]
    monkeypatch.setattr(kernels, "_KNOWN", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    with FakeTensorMode():
        q, k, _ = heads(torch.bfloat16)
        assert kernels._takes_flash(q, k, None, True) == fused
        assert kernels._takes_efficient(q, k) == fused


def test_on_a_meta_device_there_are_only_shapes():
    assert attention(*heads(torch.bfloat16, device="meta"), None, True).shape == (2, 4, 9, 64)
