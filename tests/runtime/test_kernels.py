"""Linear layers and attention: as near to PyTorch's as their precision allows, and PyTorch's own where told to be."""

from __future__ import annotations

import os
import runpy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from itarflow.runtime.kernels import Linear, attention, linear, pack
from itarflow.runtime.kernels import cpu as kernels

onednn = pytest.mark.skipif(not kernels.ONEDNN, reason="float32 products don't go through oneDNN here")


@pytest.fixture
def _wide(monkeypatch):
    """As on a CPU with AVX-512; oneDNN is just as right on others."""
    monkeypatch.setattr(kernels, "WIDE", True)


@pytest.fixture
def _blocks(monkeypatch):
    """Blocks also on a CPU without products in bfloat16, where they are slower and just as right."""
    if kernels.PLAIN:
        pytest.skip("ITARFLOW_PLAIN_KERNELS is set")
    monkeypatch.setattr(kernels, "BLOCKS", True)


def takes_onednn(x, weight, bias=None):
    return "OneDnn" in linear(x, weight.detach().requires_grad_(), bias).grad_fn.name()


def takes_blocks(q, k, v):
    return "CausalBlocks" in attention(q, k, v, causal=True).grad_fn.name()


def test_the_environment_turns_all_of_it_off():
    told = os.environ.get("ITARFLOW_PLAIN_KERNELS", "0") == "1"
    assert told == kernels.PLAIN
    if told:
        assert not takes_onednn(*arrays(200))
        assert not takes_blocks(*heads(9)[0])


@pytest.mark.parametrize("why", ["told to", "absent", "other signature"])
def test_without_the_private_parts_all_is_pytorchs_to_the_bit(why, monkeypatch):
    monkeypatch.setenv("ITARFLOW_PLAIN_KERNELS", "1" if why == "told to" else "0")
    if why == "absent":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    if why == "other signature":
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight: weight)
    plain: dict[str, Any] = runpy.run_path(kernels.__file__)
    assert plain["PLAIN"] == (why == "told to")
    assert (plain["ONEDNN"], plain["BLOCKS"]) == (False, False)
    x, weight, bias = arrays(200)
    assert torch.equal(plain["linear"](x, weight, bias), F.linear(x, weight, bias))
    assert not plain["packs"](weight)
    monkeypatch.setattr(kernels, "ONEDNN", False)
    packed = pack(layer_of(weight, bias), torch.float32, activation=torch.nn.GELU())
    assert torch.equal(packed(x), F.gelu(F.linear(x, weight, bias)))
    (q, k, v), _ = heads(9)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(plain["attention"](q, k, v, causal=True), expected)
    if why == "told to":
        q, k, v = single_queries(100, torch.float32)
        assert torch.equal(plain["attention"](q, k, v), F.scaled_dot_product_attention(q, k, v))


# -- linear layers ----------------------------------------------------------------------------------------------


def arrays(*shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 64, generator=generator)
    return x, torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)


def layer_of(weight, bias):
    layer = torch.nn.Linear(64, 96)
    layer.weight.data, layer.bias.data = weight, bias
    return layer


@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize("shape", [(200,), (2, 5, 40)])
def test_values_and_all_gradients_are_those_of_a_linear_layer(shape):
    given = [tensor.requires_grad_() for tensor in arrays(*shape)]
    assert takes_onednn(*given) == kernels.ONEDNN
    ours, theirs = linear(*given), F.linear(*given)
    direction = torch.randn_like(theirs)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, given, direction)),
        (theirs, *torch.autograd.grad(theirs, given, direction)),
        strict=True,
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.usefixtures("_wide")
def test_second_derivatives():
    x, weight, _ = arrays(200)
    x.requires_grad_(), weight.requires_grad_()

    def curvature(product):
        (slope,) = torch.autograd.grad(product(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    expected = curvature(F.linear)
    torch.testing.assert_close(curvature(linear), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.usefixtures("_wide")
@onednn
def test_a_frozen_layer_keeps_no_input():
    x, weight, bias = arrays(200)
    saved = linear(x.requires_grad_(), weight, bias).grad_fn.saved_tensors
    assert [tensor is not None for tensor in saved] == [False, True]


@pytest.mark.usefixtures("_wide")
@onednn
def test_small_products_other_types_and_autocast_are_left_to_pytorch():
    x, weight, _ = arrays(200)
    assert takes_onednn(x, weight)
    assert not takes_onednn(x[:1], weight)
    assert not takes_onednn(x.double(), weight.double())
    assert not takes_onednn(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_onednn(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16


@onednn
def test_without_avx_512_only_packed_layers_take_onednn(monkeypatch):
    monkeypatch.setattr(kernels, "WIDE", False)
    x, weight, bias = arrays(200)
    assert not takes_onednn(x, weight)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert pack(layer_of(weight, bias), torch.float32).onednn


@pytest.mark.usefixtures("_wide")
def test_function_transforms_and_forward_derivatives():
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
@pytest.mark.parametrize("rows", [5, 40])  # GELU in the product's kernel; after it, without AVX-512
def test_packed_layers(dtype, rows):
    x, weight, bias = arrays(rows)
    packed, given, residual = pack(layer_of(weight, bias), dtype), x.to(dtype), torch.randn(rows, 96)
    norm = torch.nn.LayerNorm(64).requires_grad_(False)
    whole = pack(layer_of(weight, bias), dtype, norm, activation=torch.nn.GELU())
    assert kernels.ONEDNN or not packed.onednn
    expected = F.linear(x, weight, bias)
    tolerance = {"rtol": 0.02, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(packed(given).float(), expected, **tolerance)
    torch.testing.assert_close(whole(x).float(), F.gelu(F.linear(norm(x), weight, bias)), **tolerance)
    added = packed.plus(given, residual)
    assert added.dtype == torch.float32
    torch.testing.assert_close(added, expected + residual, **tolerance)


# -- attention --------------------------------------------------------------------------------------------------


def heads(tokens, dtype=torch.bfloat16, width=32):
    """Queries, keys and values that overlap in memory, as a layer makes them, and a direction."""
    generator = torch.Generator().manual_seed(0)
    together = torch.randn(2, tokens, 3, 4, width, generator=generator).to(dtype)
    direction = torch.randn(2, tokens, 4, width, generator=generator).to(dtype).transpose(1, 2)
    return [tensor.requires_grad_() for tensor in together.permute(2, 0, 3, 1, 4)], direction


def single_queries(samples, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, 4, n, 8, generator=generator).to(dtype) for n in (1, 9, 9)]


def values_and_gradients(attend, given, direction):
    out = attend(*given)
    return out, *torch.autograd.grad(out, given, direction)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("tokens", [1, 63, 128, 129, 328])  # around blocks of 128, and vectors of 32
def test_causal_attention_is_as_near_to_the_exact_result_as_bfloat16_allows(tokens):
    given, direction = heads(tokens)
    assert takes_blocks(*given)
    before = [tensor.clone() for tensor in given]
    ours = values_and_gradients(lambda *qkv: attention(*qkv, causal=True), given, direction)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    exact = values_and_gradients(
        lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), wide, direction.double()
    )
    for found, expected in zip(ours, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 2**-6 * expected.norm()


@pytest.mark.usefixtures("_blocks")
def test_contiguous_tensors_are_not_changed_either():
    given, direction = heads(64)
    given = [tensor.detach().contiguous().requires_grad_() for tensor in given]
    before = [tensor.clone() for tensor in given]
    values_and_gradients(lambda *qkv: attention(*qkv, causal=True), given, direction.contiguous())
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


@pytest.mark.usefixtures("_blocks")
def test_queries_keys_and_values_are_all_that_is_kept():
    given, _ = heads(256)
    kept = attention(*given, causal=True).grad_fn.saved_tensors
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in given]


@pytest.mark.parametrize(
    ("dtype", "mask", "causal"),
    [
        (torch.float32, None, True),
        (torch.bfloat16, None, False),
        (torch.bfloat16, torch.ones(9, 9, dtype=torch.bool).tril(), False),
    ],
    ids=str,
)
def test_elsewhere_it_is_pytorchs_to_the_bit(dtype, mask, causal):
    given, _ = heads(9, dtype)
    expected = F.scaled_dot_product_attention(*given, attn_mask=mask, is_causal=causal)
    assert torch.equal(attention(*given, mask, causal), expected)


@pytest.mark.usefixtures("_blocks")
def test_under_a_transform_it_has_a_gradient():
    (q, k, v), direction = heads(9)
    q, k, v = q.detach(), k.detach(), v.detach()
    found = torch.func.grad(lambda q: (attention(q, k, v, causal=True) * direction).sum())(q)
    expected = torch.func.grad(lambda q: (F.scaled_dot_product_attention(q, k, v, is_causal=True) * direction).sum())(
        q
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("samples", [1, 100, 8000])  # left to PyTorch; two products; the keys as the left factor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_queries_of_few_and_of_many_heads(samples, dtype):
    q, k, v = single_queries(samples, dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    for causal in (False, True):  # which for a single query is the first key alone
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(attention(q, k, v, causal=causal), expected, atol=tolerance, rtol=tolerance)
