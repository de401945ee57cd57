import pytest
import torch
from tiny_flows import condition_of, first_sample
from torch.autograd.functional import jacobian


@pytest.fixture
def blocks(flow, make_inputs):
    """Of every kind of flow in float64: each block with a condition and three sets of tokens in its own layout."""
    flow.double()
    _, labels, noise_level = make_inputs(flow)
    generator = torch.Generator().manual_seed(2)
    return [
        (
            block,
            condition_of(flow, block, labels, noise_level),
            torch.randn(3, block.num_tokens, block.proj_in.in_features, generator=generator, dtype=torch.float64),
        )
        for block in flow.blocks
    ]


def test_jacobian_of_each_block_is_triangular_in_its_own_order(flow, blocks):
    for index, (block, condition, x) in enumerate(blocks):
        assert block.reverse == (index % 2 == (0 if flow.config.first_block_reversed else 1))
        ordered = (lambda tokens: tokens.flip(1)) if block.reverse else (lambda tokens: tokens)
        one = first_sample(condition)

        def own_order(tokens, block=block, one=one, ordered=ordered):
            return ordered(block(ordered(tokens), one).z)

        matrix = jacobian(own_order, x[:1]).reshape(x[0].numel(), x[0].numel())
        assert torch.equal(matrix, matrix.tril())
        assert (matrix.diagonal() > 0).all()
        token = torch.arange(block.num_tokens).repeat_interleave(x.shape[2])
        assert (matrix[token[:, None] > token] != 0).all()  # every token depends on all before it
        log_det = block(ordered(x[:1]), one).log_det
        torch.testing.assert_close(log_det, matrix.diagonal().log().sum()[None])


def test_volume_and_the_first_token_are_kept_where_the_settings_say_so(flow, blocks):
    """By volume-preserving blocks and by a lone token; and unless the first token is learned."""
    for block, condition, x in blocks:
        z, log_det = block(x, condition)
        learned = flow.config.learned_first_token or flow.config.start_token
        lone = block.num_tokens == 1 and not learned
        kept = torch.equal(log_det, torch.zeros(3, dtype=x.dtype))
        assert kept == (flow.config.volume_preserving or lone)
        first = -1 if block.reverse else 0
        assert torch.equal(z[:, first], x[:, first]) != learned


def test_the_network_puts_out_log_scales_then_shifts(make_flow):
    """An order that checkpoints depend on."""
    flow = make_flow(fresh=True, num_layers=(1,), learned_first_token=True)
    (block,) = flow.blocks
    for head in (block.proj_out, block.first_token[-1]):
        head.bias.data[:8], head.bias.data[8:] = 0.5, 3.0
    condition = block.condition(2, None, torch.full((2,), 0.3))
    for shift, log_scale in (block.first_affine(condition), block.affine_at(torch.zeros(2, 1, 8), condition)):
        assert torch.equal(log_scale, torch.full((2, 1, 8), 0.5))
        assert torch.equal(shift, torch.full((2, 1, 8), 3.0))


def test_a_block_does_not_own_the_layers_it_shares(make_flow):
    flow = make_flow(shared_layers=1, num_layers=(1, 2, 3))
    assert [len(block.transformer.layers) for block in flow.blocks] == [0, 1, 2]
    assert not any("backbone" in name for block in flow.blocks for name in block.state_dict())
    assert all(block.backbone == (flow.shared_backbone,) for block in flow.blocks)
    assert sum(name.startswith("shared_backbone.") for name in flow.state_dict()) == 12


def test_temperature_reaches_shared_and_own_layers(make_flow, make_inputs):
    flow = make_flow(shared_layers=1, num_layers=(1, 2))
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    _, labels, noise_level = make_inputs(flow)
    for block in flow.blocks:
        plain, tempered = (block(x, condition_of(flow, block, labels, noise_level, t)).z for t in (1.0, 3.0))
        assert not torch.allclose(plain, tempered, atol=1e-4)
