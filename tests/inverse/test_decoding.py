import itertools

import pytest
import torch
from tiny_flows import condition_of

from itarflow.inverse import Guidance, Jacobi, guide
from itarflow.runtime.kernels import Cache

GUIDANCE = Guidance(weight=1.5, rule="gaussian", temperature=0.7)


@pytest.fixture
def passes(flow, make_inputs):
    """Of every kind of flow in float64: each block, without guidance and with it, with its passes (the second is None
    if it is not guided), tokens in its own order, and the affine maps that follow them, computed at once and without
    a cache."""
    flow.double()
    _, labels, noise_level = make_inputs(flow)
    generator = torch.Generator().manual_seed(2)
    found = []
    for block in flow.blocks:
        width = block.proj_in.in_features
        tokens = torch.randn(3, block.num_tokens - 1, width, generator=generator, dtype=torch.float64)
        condition = condition_of(flow, block, labels, noise_level)
        guiding = condition_of(flow, block, None, noise_level, GUIDANCE.temperature)
        weights = GUIDANCE.weights(torch.arange(1, block.num_tokens), block.num_tokens, torch.float64)
        with torch.no_grad():
            shift, log_scale = block.affine_at(tokens, condition)
            guided = guide((shift, log_scale), block.affine_at(tokens, guiding), weights, GUIDANCE)
        if block.num_tokens > 1:
            found.append((block, condition, None, tokens, (shift, log_scale.exp())))
            found.append((block, condition, guiding, tokens, guided))
    return found


@torch.no_grad()
def test_windows_of_any_width_give_the_maps_of_the_parallel_pass(passes):
    for (block, condition, guiding, tokens, expected), width in itertools.product(passes, (1, 2, 15)):
        conditioner, start, found = block.conditioner(condition, guiding, GUIDANCE), 0, []
        conditioner.begin()
        for window in tokens.split(width, dim=1):
            found.append(conditioner(window, start))
            start += window.shape[1]
        torch.testing.assert_close([torch.cat(parts, dim=1) for parts in zip(*found, strict=True)], list(expected))


@torch.no_grad()
def test_each_sample_may_be_elsewhere(passes):
    for block, condition, guiding, tokens, expected in passes:
        count = min(2, tokens.shape[1])
        conditioner = block.conditioner(condition, guiding, GUIDANCE)
        conditioner.begin()
        conditioner(tokens, 0)  # the cache holds all
        start = torch.tensor([0, tokens.shape[1] - count, (tokens.shape[1] - count) // 2])
        rows, positions = torch.arange(3)[:, None], start[:, None] + torch.arange(count)
        found = conditioner(tokens[rows, positions], start)
        torch.testing.assert_close(list(found), [part[rows, positions] for part in expected])


@torch.no_grad()
def test_what_is_given_again_counts_as_given_last(passes):
    for block, condition, guiding, tokens, expected in passes:
        conditioner = block.conditioner(condition, guiding, GUIDANCE)
        conditioner.begin()
        conditioner(tokens.flip(0), 0)
        torch.testing.assert_close(list(conditioner(tokens, 0)), list(expected))


@torch.no_grad()
def test_a_part_of_the_batch_goes_on_by_itself(passes):
    for block, condition, guiding, tokens, expected in passes:
        conditioner = block.conditioner(condition, guiding, GUIDANCE)
        conditioner.begin()
        conditioner(tokens[:, :1], 0)
        if tokens.shape[1] > 1:
            samples = torch.tensor([2, 0])
            part = conditioner.select(samples)(tokens[samples, 1:], 1)
            torch.testing.assert_close(list(part), [whole[samples, 1:] for whole in expected])
            # and the whole is as it was
            torch.testing.assert_close(list(conditioner(tokens[:, 1:], 1)), [whole[:, 1:] for whole in expected])


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 40])
def test_float32_and_low_precision_are_near(make_flow, make_inputs, batch_size):
    """Batches so large that all kernels are met."""
    flow = make_flow(channels=64, head_dim=16, num_layers=(2,), patch_size=1)
    _, labels, noise_level = make_inputs(flow, batch_size)
    (block,) = flow.blocks
    condition = block.condition(batch_size, labels, noise_level)
    tokens = torch.randn(batch_size, 15, 2, generator=torch.Generator().manual_seed(0))
    expected = block.affine_at(tokens, condition)
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.1)):
        conditioner = block.conditioner(condition, None, Guidance(), dtype)
        assert conditioner.cache.tensor.dtype == (dtype or torch.float32)
        windows = [conditioner(tokens[:, n : n + 1], n) for n in range(15)]
        shift, scale = (torch.cat(parts, dim=1) for parts in zip(*windows, strict=True))
        assert shift.dtype == scale.dtype == torch.float32
        torch.testing.assert_close(shift, expected[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(scale, expected[1].exp(), atol=tolerance, rtol=tolerance)
        assert dtype is None or not torch.equal(shift, expected[0])


def test_the_cache_grows_with_what_is_given_and_keeps_it(make_flow):
    cache = Cache((1, 2, 3, 2, 100, 4), torch.zeros(0, dtype=torch.float64), room=8)
    assert (cache.tensor.shape, cache.tensor.dtype) == ((1, 2, 3, 2, 8, 4), torch.float64)
    cache.tensor.fill_(7)
    rooms = [cache.reaching(stop).shape[4] for stop in (1, 8, 9, 20, 50, 100)]
    assert rooms == [8, 8, 16, 32, 64, 100]
    assert (cache.tensor[..., :8, :] == 7).all()
    assert (cache.tensor[..., 8:, :] == 0).all()
    part = cache.select(torch.tensor([2]))
    part.tensor.zero_()
    assert part.reaching(100).shape == (1, 2, 1, 2, 100, 4)
    assert (cache.tensor[..., :8, :] == 7).all()


@torch.no_grad()
def test_a_long_sequence_outgrows_its_first_room(make_flow, make_inputs):
    flow = make_flow(image_size=12, patch_size=1, num_layers=(2,)).double()
    images, labels, noise_level = make_inputs(flow)
    z = flow(images, labels, noise_level).z
    torch.testing.assert_close(flow.inverse(z, labels, noise_level), images)
    jacobi = Jacobi(window=40, tolerance=0.0)
    torch.testing.assert_close(flow.inverse(z, labels, noise_level, solver=jacobi), images)


def test_the_cache_has_the_type_of_the_weights_or_the_given_one(make_flow):
    flow = make_flow().to(torch.bfloat16)
    block = flow.blocks[0]
    condition = condition_of(flow, block, None, torch.full((3,), 0.2))
    for dtype in (None, torch.float32):
        cache = block.conditioner(condition, None, Guidance(), dtype).cache.tensor
        assert (cache.dtype, cache.shape) == (dtype or torch.bfloat16, (1, 2, 3, 2, 4, 4))
