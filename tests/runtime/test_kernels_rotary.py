"""Rotary positions: on every path, what the formula gives in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from itarflow.runtime.kernels import Rotation, rotary, rotated, rotation_of, rotator

NEAR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(params=["complex", "real"])
def path(request, monkeypatch):
    """Of the two, devices without complex numbers take the second."""
    if request.param == "real":
        monkeypatch.setattr(rotary, "_DEVICES", ())


def formula(x, angles):
    """x (..., E), angles (..., E / 2) that broadcast, in float64, entry by entry."""
    x, cos, sin = x.double(), angles.double().cos(), angles.double().sin()
    out = torch.empty_like(x)
    for pair in range(x.shape[-1] // 2):
        even, odd = x[..., 2 * pair], x[..., 2 * pair + 1]
        out[..., 2 * pair] = even * cos[..., pair] - odd * sin[..., pair]
        out[..., 2 * pair + 1] = odd * cos[..., pair] + even * sin[..., pair]
    return out


def case(shape, dtype, per_sample=False):
    """qkv (B, n, 3, H, E) and angles (n, E / 2) or (B, n, E / 2)."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens, heads, width = shape
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator, dtype=torch.float64).to(dtype)
    outer = (batch, tokens) if per_sample else (tokens,)
    angles = torch.rand(*outer, width // 2, generator=generator, dtype=torch.float64) * 32
    return qkv, angles if dtype == torch.float64 else angles.float()


def assert_near(found, exact, dtype):
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= NEAR[dtype] * exact.abs().max()


SHAPES = [(1, 1, 1, 2), (3, 1, 2, 8), (2, 9, 3, 16)]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_are_rotated(shape, dtype, per_sample):
    qkv, angles = case(shape, dtype, per_sample)
    exact = formula(qkv, angles[..., None, None, :])
    for index in range(2):  # views whose entries lie apart
        found = rotated(qkv[:, :, index].transpose(1, 2), rotation_of(angles))
        assert_near(found, exact[:, :, index].transpose(1, 2), dtype)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_and_keys_are_rotated_in_place_and_values_are_not(shape, dtype, per_sample):
    qkv, angles = case(shape, dtype, per_sample)
    exact, values = formula(qkv, angles[..., None, None, :]), qkv[:, :, 2].clone()
    rotator(rotation_of(angles))(qkv[:, :, :2])
    assert_near(qkv[:, :, :2], exact[:, :, :2], dtype)
    assert torch.equal(qkv[:, :, 2], values)


@pytest.mark.parametrize("x", [torch.randn(2, 3, 4, 16)[..., ::2], torch.randn(97)[1:].view(2, 2, 3, 8)])
def test_entries_that_cannot_be_seen_as_complex_numbers(x):
    angles = torch.rand(x.shape[2], 4)
    exact = formula(x, angles)
    assert_near(rotated(x, rotation_of(angles)), exact, torch.float32)
    wide = x.movedim(2, 1)[:, :, :, None].movedim(3, 2)  # (B, n, 1, H, E)
    rotator(rotation_of(angles))(wide)
    assert_near(x, exact, torch.float32)


def test_in_double_precision_by_angles_in_single():
    qkv, angles = case((2, 5, 2, 8), torch.float64)
    exact = formula(qkv, angles.float()[:, None, None])
    rotator(rotation_of(angles.float()))(qkv[:, :, :2])
    assert (qkv - exact)[:, :, :2].abs().max() < 1e-5


def test_some_of_the_positions():
    angles = torch.rand(6, 4)
    whole = rotation_of(angles)
    assert torch.equal(whole.at(slice(2, 4)).pairs, whole.pairs[2:4])
    at = torch.tensor([[0, 5], [3, 4], [1, 1]])
    assert whole.at(at).pairs.shape == (3, 2, 8)
    assert torch.equal(whole.at(at).pairs[1, 1], whole.pairs[4])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("per_sample", [False, True])
def test_derivatives_of_both_orders(per_sample):
    qkv, angles = case((2, 3, 2, 4), torch.float64, per_sample)
    x, rotation = qkv[:, :, 0].transpose(1, 2).requires_grad_(), rotation_of(angles)
    assert torch.autograd.gradcheck(lambda x: rotated(x, rotation), x)
    assert torch.autograd.gradgradcheck(lambda x: rotated(x, rotation).pow(3), x)


def test_only_the_table_is_kept_for_gradients():
    qkv, angles = case((4, 50, 2, 8), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rotated(qkv[:, :, 0].transpose(1, 2).requires_grad_(), rotation_of(angles))
    assert all(tensor.numel() <= 50 * 8 for tensor in kept)


def test_autocast_and_checkpointing():
    qkv, angles = case((2, 5, 2, 8), torch.bfloat16)
    x, rotation = qkv[:, :, 0].transpose(1, 2), rotation_of(angles)
    gradients = []
    for again in (False, True):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(rotated, given, rotation, use_reentrant=False) if again else rotated(given, rotation)
        assert torch.equal(out, rotated(x, rotation))
        out.square().sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)
    assert_near(gradients[0], 2 * x.double(), torch.bfloat16)  # a rotation keeps lengths


def test_transforms_of_functions():
    qkv, angles = case((3, 5, 2, 8), torch.float64)
    x, rotation = qkv[:, :, 0].transpose(1, 2), rotation_of(angles)
    exact = rotated(x, rotation)
    one_by_one = torch.func.vmap(lambda one: rotated(one[None], rotation)[0])(x)
    torch.testing.assert_close(one_by_one, exact, rtol=1e-12, atol=1e-12)
    _, slope = torch.func.jvp(lambda x: rotated(x, rotation), (x,), (x,))
    torch.testing.assert_close(slope, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*complex")
def test_compiled():
    qkv, angles = case((2, 5, 2, 8), torch.float32)
    x, rotation = qkv[:, :, 0].transpose(1, 2).requires_grad_(), rotation_of(angles)
    compiled = torch.compile(lambda x, pairs: rotated(x, Rotation(pairs)), fullgraph=True)
    found = compiled(x, rotation.pairs)
    torch.testing.assert_close(found, rotated(x, rotation))
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach())
