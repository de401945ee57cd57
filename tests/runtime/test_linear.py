import pytest
import torch
import torch.nn.functional as F

from itarflow.runtime import linear as module
from itarflow.runtime.linear import Linear, _OneDnn, _prefers_onednn, linear, pack

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def arrays(*shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 64, generator=generator)
    return x, torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)


@onednn
@pytest.mark.parametrize("shape", [(200,), (2, 100), (2, 5, 40)])
def test_values_and_all_gradients_are_those_of_a_linear_layer(shape):
    given = [tensor.requires_grad_() for tensor in arrays(*shape)]
    ours, theirs = linear(*given), F.linear(*given)
    assert "OneDnn" in ours.grad_fn.name()
    direction = torch.randn_like(theirs)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, given, direction)),
        (theirs, *torch.autograd.grad(theirs, given, direction)),
        strict=True,
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@onednn
def test_second_derivatives():
    x, weight, _ = arrays(200)
    x.requires_grad_(), weight.requires_grad_()

    def curvature(product):
        (slope,) = torch.autograd.grad(product(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    expected = curvature(F.linear)
    torch.testing.assert_close(curvature(linear), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@onednn
def test_a_frozen_layer_keeps_no_input():
    x, weight, bias = arrays(200)
    saved = linear(x.requires_grad_(), weight, bias).grad_fn.saved_tensors
    assert [tensor is not None for tensor in saved] == [False, True]


@onednn
def test_where_the_detour_is_taken():
    x, weight, _ = arrays(200)
    assert _prefers_onednn(x, weight)
    assert not _prefers_onednn(x[:1], weight)  # too few
    assert not _prefers_onednn(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not _prefers_onednn(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16
    assert not _prefers_onednn(x.to("meta"), weight.to("meta"))


@onednn
def test_function_transforms_and_forward_derivatives_still_work():
    x, weight, bias = arrays(200)
    tangent = torch.ones_like(x)
    expected = F.linear(tangent, weight)
    torch.testing.assert_close(torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (tangent,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(linear(dual, weight, bias)).tangent
    torch.testing.assert_close(found, expected)
    rows = torch.func.vmap(lambda row: linear(row[None], weight, bias)[0])(x)
    torch.testing.assert_close(rows, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_the_module_has_the_state_and_the_start_of_torchs():
    torch.manual_seed(0)
    ours = Linear(64, 96)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(64, 96)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(200, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("there", [True, False])
def test_packed_layers_with_and_without_onednn(dtype, there, monkeypatch):
    if not there:  # as in a PyTorch that was built without
        monkeypatch.setattr(module, "_HAS_ONEDNN", False)
        monkeypatch.setattr(torch.ops, "mkldnn", None)
    x, weight, bias = arrays(5)
    layer = torch.nn.Linear(64, 96)
    layer.weight.data, layer.bias.data = weight, bias
    packed, given = pack(layer, dtype), x.to(dtype)
    residual = torch.randn(5, 96)
    expected = F.linear(x, weight, bias)
    tolerance = {"rtol": 0.02, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(packed(given).float(), expected, **tolerance)
    torch.testing.assert_close(packed.gelu(given).float(), F.gelu(expected), **tolerance)
    added = packed.plus(given, residual)
    assert added.dtype == torch.float32
    torch.testing.assert_close(added, expected + residual, **tolerance)


@onednn
def test_a_tiny_product_agrees_too():
    x, weight, bias = arrays(1)
    torch.testing.assert_close(_OneDnn.apply(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
