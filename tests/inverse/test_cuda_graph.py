import pytest
import torch

from itarflow.inverse import Guidance, Jacobi, sequential
from itarflow.inverse import cuda_graph as replay
from itarflow.inverse.cuda_graph import GraphedConditioner


def as_a_graph(evaluation, tokens, start):
    """What a CUDA graph does, without one: inputs and results stay at one address, and nothing else is looked at."""
    given, found = (tokens.clone(), start.clone()), tuple(part.clone() for part in evaluation(tokens, start))
    recordings.append((tuple(tokens.shape), tuple(start.shape)))

    def play(tokens, start):
        for buffer, value in zip(given, (tokens, start), strict=True):
            assert buffer.shape == value.shape
            buffer.copy_(value)
        for buffer, value in zip(found, evaluation(*given), strict=True):
            buffer.copy_(value)
        return found

    return play


recordings = []


@pytest.fixture
def long_block(make_flow, make_inputs, monkeypatch):
    """A block of 64 tokens with its passes; lengths are rounded up from 4 on."""
    monkeypatch.setattr(replay, "_SHORTEST", 4)
    monkeypatch.setattr(replay, "_WIDEST", 8)
    recordings.clear()
    flow = make_flow(image_size=8, patch_size=1, num_layers=(2,)).double()
    _, labels, noise_level = make_inputs(flow)
    (block,) = flow.blocks
    z = torch.randn(3, 64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return block, block.condition(3, labels, noise_level), block.condition(3, None, noise_level), z


@torch.no_grad()
@pytest.mark.parametrize(
    ("solver", "guided"),
    [(sequential, True), (Jacobi(window=5, tolerance=0.0), False), (Jacobi(window=20, tolerance=0.0), True)],
    ids=["sequential", "5", "20"],
)
def test_replayed_windows_give_the_same_result(long_block, solver, guided):
    block, condition, guiding, z = long_block
    passes = condition, guiding if guided else None, Guidance(weight=1.5)
    first = torch.zeros(1, dtype=z.dtype), torch.ones(1, dtype=z.dtype)
    expected = sequential(block.conditioner(*passes), z, first)
    replayed = GraphedConditioner(block.conditioner(*passes), as_a_graph)
    address = replayed.conditioner.cache.tensor.data_ptr()
    found = solver(replayed, z, first)
    torch.testing.assert_close(found, expected)
    assert replayed.conditioner.cache.tensor.data_ptr() == address  # or a graph would write where nobody reads
    assert len(recordings) <= 6  # a few lengths; not one for each of the last windows


@torch.no_grad()
def test_a_block_is_recorded_once_for_each_power_of_two(long_block):
    block, condition, _, z = long_block
    first = torch.zeros(1, dtype=z.dtype), torch.ones(1, dtype=z.dtype)
    sequential(GraphedConditioner(block.conditioner(condition, None, Guidance()), as_a_graph), z, first)
    assert recordings == [((3, 1, 2), (3,))] * 5  # 4, 8, 16, 32, 64, each at its second use


@pytest.mark.cuda
@pytest.mark.parametrize("solver", [sequential, Jacobi(window=5, tolerance=0.0)], ids=["sequential", "5"])
def test_cuda_graphs_give_the_result_of_the_cpu(make_flow, make_inputs, solver):
    flow = make_flow(image_size=16, patch_size=1, channels=32, head_dim=16, num_layers=(2, 2))
    _, labels, noise_level = make_inputs(flow)
    z = 0.5 * torch.randn(3, *flow.z_shape, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(weight=1.0)
    expected = flow.inverse(z, labels, noise_level, guidance=guidance)
    found = flow.cuda().inverse(z.cuda(), labels.cuda(), noise_level.cuda(), guidance=guidance, solver=solver)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
