import pytest
import torch
import torch.nn.functional as F

from itarflow.runtime import attention as module
from itarflow.runtime.attention import _BLOCK, attention

blocks = pytest.mark.skipif(not module._HAS_ONEDNN, reason="this CPU has no bfloat16")


def arrays(tokens, dtype=torch.bfloat16, width=32):
    """Queries, keys and values that overlap in memory, as a layer makes them, and a direction."""
    generator = torch.Generator().manual_seed(0)
    together = torch.randn(2, tokens, 3, 4, width, generator=generator).to(dtype)
    direction = torch.randn(2, tokens, 4, width, generator=generator).to(dtype).transpose(1, 2)
    return [tensor.requires_grad_() for tensor in together.permute(2, 0, 3, 1, 4)], direction


def values_and_gradients(attend, given, direction):
    out = attend(*given)
    return out, *torch.autograd.grad(out, given, direction)


@blocks
@pytest.mark.parametrize("tokens", [1, 2, 32, 63, _BLOCK, _BLOCK + 1, 2 * _BLOCK + 72])
def test_blocks_are_as_near_to_the_exact_result_as_bfloat16_allows(tokens):
    given, direction = arrays(tokens)
    ours = values_and_gradients(lambda *qkv: attention(*qkv, causal=True), given, direction)
    assert "CausalBlocks" in ours[0].grad_fn.name()
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    exact = values_and_gradients(
        lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), wide, direction.double()
    )
    for found, expected in zip(ours, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 2**-6 * expected.norm()


@blocks
def test_given_tensors_are_not_changed():
    given, direction = arrays(64)
    given = [tensor.detach().contiguous().requires_grad_() for tensor in given]
    before = [tensor.clone() for tensor in given]
    values_and_gradients(lambda *qkv: attention(*qkv, causal=True), given, direction.contiguous())
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


@blocks
def test_queries_keys_and_values_are_all_that_is_kept():
    given, _ = arrays(256)
    kept = attention(*given, causal=True).grad_fn.saved_tensors
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in given]


@pytest.mark.parametrize(
    ("dtype", "mask", "causal"),
    [
        (torch.float32, None, True),
        (torch.float64, None, True),
        (torch.bfloat16, None, False),
        (torch.bfloat16, torch.ones(9, 9, dtype=torch.bool).tril(), False),
    ],
    ids=str,
)
def test_elsewhere_it_is_pytorchs_to_the_bit(dtype, mask, causal):
    given, _ = arrays(9, dtype)
    expected = F.scaled_dot_product_attention(*given, attn_mask=mask, is_causal=causal)
    assert torch.equal(attention(*given, mask, causal), expected)


def test_a_window_of_queries_is_pytorchs():
    (q, k, v), _ = arrays(9)
    mask = torch.ones(2, 9, dtype=torch.bool).tril(7)
    expected = F.scaled_dot_product_attention(q[:, :, 7:], k, v, attn_mask=mask)
    assert torch.equal(attention(q[:, :, 7:], k, v, mask), expected)


def test_under_a_transform_it_is_pytorchs():
    given, direction = arrays(9)
    given = [tensor.detach() for tensor in given]
    slope = torch.func.grad(lambda q: (attention(q, *given[1:], causal=True) * direction).sum())(given[0])
    assert slope.isfinite().all()


@pytest.mark.parametrize("samples", [1, 100, 8000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_single_queries_of_few_and_of_many_heads(samples, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(samples, 4, n, 8, generator=generator).to(dtype) for n in (1, 9, 9))
    assert module._prefers_products(q) == (samples >= 100)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    for causal in (False, True):  # which for a single query is the first key alone
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(attention(q, k, v, causal=causal), expected, atol=tolerance, rtol=tolerance)
