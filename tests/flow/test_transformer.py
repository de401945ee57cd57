import math

import pytest
import torch

from itarflow.flow.transformer import Attention, Layer, Transformer

B, N, C, E = 3, 6, 8, 4


@pytest.fixture
def transformer(randomise):
    transformer = Transformer(channels=C, num_layers=2, head_dim=E, mlp_ratio=2).double()
    randomise(transformer)
    return transformer


@pytest.fixture
def x():
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


TEMPERATURES = {"untempered": None, "tempered": torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)}


def attention_by_hand(attention, x, temperature):
    """One query at a time, one head at a time."""
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for head in range(x.shape[-1] // attention.head_dim):
            own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            for n in range(x.shape[1]):
                logits = k[b, : n + 1, own] @ q[b, n, own] / math.sqrt(attention.head_dim)
                logits = logits if temperature is None else logits / temperature[b]
                out[b, n, own] = logits.softmax(0) @ v[b, : n + 1, own]
    return attention.proj(out)


@pytest.mark.parametrize(("head_dim", "tempered"), [(2, True), (4, False), (8, True)])
def test_attention_is_causal_softmax_attention_in_each_head(x, head_dim, tempered, randomise):
    temperature = TEMPERATURES["tempered"] if tempered else None
    attention = Attention(C, head_dim).double()
    randomise(attention, std=0.5)
    torch.testing.assert_close(attention(x, temperature), attention_by_hand(attention, x, temperature))


def test_layer_adds_attention_then_mlp_of_normalised_tokens(x, randomise):
    layer = Layer(C, E, mlp_ratio=3).double()
    randomise(layer)

    def norm(x, norm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    middle = x + attention_by_hand(layer.attention, norm(x, layer.attention_norm), None)
    expected = middle + layer.mlp[2](gelu(layer.mlp[0](norm(middle, layer.mlp_norm))))
    torch.testing.assert_close(layer(x), expected)
    assert layer.mlp[0].out_features == 3 * C


def test_a_token_changes_nothing_before_it_and_everything_from_it_on(transformer, x):
    before = transformer(x)
    for n in range(N):
        changed = x.clone()
        changed[:, n] += torch.randn(C, generator=torch.Generator().manual_seed(n), dtype=x.dtype)
        moved = (transformer(changed) != before).any(-1)
        assert not moved[:, :n].any()
        assert moved[:, n:].all()


def test_temperature_one_is_none(transformer, x):
    torch.testing.assert_close(transformer(x, torch.ones(B, dtype=x.dtype)), transformer(x))


@pytest.mark.parametrize("temperature", TEMPERATURES.values(), ids=TEMPERATURES)
def test_checkpointed_pass_equals_the_plain_one(transformer, x, temperature):
    expected, calls = transformer(x, temperature), []

    def checkpoint(layer, *args):
        calls.append(layer)
        return layer(*args)

    transformer.gradient_checkpointing, transformer._gradient_checkpointing_func = True, checkpoint
    assert torch.equal(transformer(x, temperature), expected)
    assert calls == list(transformer.layers)
