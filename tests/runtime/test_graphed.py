"""The inverse by recorded functions, here without a GPU: what is kept from call to call, and what is not."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from tiny_flows import STARFLOW_TEXT

from itarflow.inverse import Guidance, Jacobi, sequential
from itarflow.runtime import graphed
from itarflow.runtime.kernels import cpu
from itarflow.runtime.recording import Lane, release_recordings

GUIDANCE = Guidance(weight=1.5, rule="log_scale", temperature=0.7)
SOLVERS = {"sequential": sequential, "5": Jacobi(window=5, tolerance=0.0), "all": Jacobi(tolerance=0.0)}
recorded = []


def as_a_graph(lane, function, *inputs, warm_up=None):
    """What a CUDA graph does, without one: inputs and results stay at one address, and nothing else is looked at."""
    for _ in range(2):
        (warm_up or function)(*inputs)
    given, found = tuple(tensor.clone() for tensor in inputs), []
    recorded.append(function)

    def play(*inputs):
        for buffer, value in zip(given, inputs, strict=True):
            assert buffer.shape == value.shape
            buffer.copy_(value)
        results = function(*given)
        if results is None:
            return None
        if not found:
            found.extend(part.clone() for part in results)
        for buffer, value in zip(found, results, strict=True):
            buffer.copy_(value)
        return tuple(found)

    return play


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def _recorded_here(monkeypatch):
    """As on a GPU; lengths are rounded up from 4 on, and graphs solve 4 tokens."""
    monkeypatch.setattr(graphed, "DEVICES", {"cpu"})
    monkeypatch.setattr(graphed, "_SHORTEST", 4)
    monkeypatch.setattr(graphed, "_TOGETHER", 4)
    monkeypatch.setattr(graphed, "_WIDEST", 8)
    monkeypatch.setattr(Lane, "record", as_a_graph)
    monkeypatch.setattr(cpu, "ONEDNN", False)  # whose weights have no address
    recorded.clear()


@pytest.fixture
def case(flow, make_inputs):
    """A flow of every kind in float64, a function that inverts by it, and one that does so eagerly."""
    return cases(flow.double(), make_inputs)


def cases(flow, make_inputs, batch_size=5):
    _, labels, noise_level = make_inputs(flow, batch_size)
    z = normal(batch_size, *flow.z_shape)

    def inverse(solver=sequential, guidance=GUIDANCE, z=z, labels=labels, **options):
        return flow.inverse(z, labels, noise_level, solver=solver, guidance=guidance, **options)

    def expected(guidance=GUIDANCE, z=z, labels=labels):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphed, "DEVICES", set())
            return flow.inverse(z, labels, noise_level, guidance=guidance)

    return flow, inverse, expected


def longer(make_flow, make_inputs, **changes):
    """A case of 64 tokens."""
    return cases(make_flow(image_size=8, patch_size=1, num_layers=(2,), **changes).double(), make_inputs)


def windows(flow, name):
    solver = SOLVERS[name]
    shortest = min(block.num_tokens for block in flow.blocks)
    return Jacobi(window=shortest, tolerance=0.0) if name == "5" and shortest < 5 else solver


@pytest.mark.usefixtures("_recorded_here")
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_flow_has_the_same_inverse_again_and_again(case, solver):
    flow, inverse, expected = case
    for guidance in (GUIDANCE, None, Guidance(weight=0.5, rule="log_scale", temperature=0.7), GUIDANCE):
        torch.testing.assert_close(inverse(windows(flow, solver), guidance), expected(guidance))


@pytest.mark.usefixtures("_recorded_here")
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_second_call_records_little_and_has_its_own_values(make_flow, make_inputs, solver):
    flow, inverse, expected = longer(make_flow, make_inputs)
    inverse(SOLVERS[solver])
    before = len(recorded)
    assert before <= {"sequential": 6, "5": 20, "all": 20}[solver]
    other = {"z": normal(5, *flow.z_shape, seed=1), "labels": torch.tensor([2, 2, 0, -1, 1])}
    torch.testing.assert_close(inverse(SOLVERS[solver], **other), expected(**other))
    if solver == "sequential":
        assert len(recorded) == before


@pytest.mark.usefixtures("_recorded_here")
def test_graphs_hold_several_tokens_of_one_length(make_flow, make_inputs):
    longer(make_flow, make_inputs)[1]()
    assert len(recorded) == 6  # lengths of 4, 8, 16, 32, 64; and the last three of 63 tokens


@pytest.mark.usefixtures("_recorded_here")
def test_weights_may_change_move_and_be_exchanged(make_flow, make_inputs):
    flow, inverse, expected = longer(make_flow, make_inputs)
    inverse(dtype=torch.float32)
    for change in (in_place, behind_autograd, moved, exchanged):
        change(flow)
        before = expected()
        torch.testing.assert_close(inverse(), before)
        torch.testing.assert_close(inverse(dtype=torch.float32), before, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(expected(), before)  # nothing has been written to the weights


def in_place(flow):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(0.9)


def behind_autograd(flow):
    for parameter in flow.parameters():
        parameter.data.mul_(1.1)  # its version stays


def moved(flow):
    flow.load_state_dict({name: 0.9 * tensor for name, tensor in flow.state_dict().items()}, assign=True)


def exchanged(flow):
    """As averaged weights may be: the addresses are those of others now, which live on."""
    flow.averages = [parameter.data for parameter in flow.parameters()]
    for parameter in flow.parameters():
        parameter.data = 1.1 * parameter.data


@pytest.mark.usefixtures("_recorded_here")
def test_an_earlier_call_that_was_not_finite_spoils_nothing(make_flow, make_inputs):
    flow, inverse, expected = longer(make_flow, make_inputs)
    assert inverse(z=torch.full((5, *flow.z_shape), torch.nan, dtype=torch.float64)).isnan().all()
    torch.testing.assert_close(inverse(), expected())


@pytest.mark.usefixtures("_recorded_here")
def test_two_batch_sizes_are_kept_until_they_are_released(make_flow, make_inputs):
    flow, inverse, _ = longer(make_flow, make_inputs)
    for size in (5, 2, 5, 3, 5):
        _, small, right = cases(flow, make_inputs, size)
        torch.testing.assert_close(small(), right())
    assert len(flow._recordings) == 2
    assert len(copy.deepcopy(flow)._recordings) == len(pickle.loads(pickle.dumps(flow))._recordings) == 0
    flow.release_recordings()
    assert len(flow._recordings) == 0
    inverse()
    assert release_recordings()
    inverse()
    flow.float()
    assert len(flow._recordings) == 0


@pytest.mark.usefixtures("_recorded_here")
def test_inference_mode_may_come_and_go(make_flow, make_inputs):
    _, inverse, expected = longer(make_flow, make_inputs)
    with torch.inference_mode():
        inverse()
    torch.testing.assert_close(inverse(Jacobi(window=5, tolerance=0.0)), expected())
    with torch.inference_mode():
        torch.testing.assert_close(inverse(), expected())


@pytest.mark.usefixtures("_recorded_here")
def test_a_flow_that_is_gone_takes_its_memory_along(make_flow, make_inputs):
    flow, inverse, expected = longer(make_flow, make_inputs)
    inverse(Jacobi(window=5, tolerance=0.0))
    kept = [weakref.ref(flow._recordings), *map(weakref.ref, flow._recordings._entries.values())]
    gc.collect()
    gc.disable()
    try:
        del flow, inverse, expected  # no collector is needed: graphs must not die at any moment
        recorded.clear()
        assert [one() for one in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.usefixtures("_recorded_here")
def test_the_parts_of_all_blocks_share_their_memory(make_flow, make_inputs):
    flow, inverse, expected = cases(
        make_flow(image_size=8, patch_size=1, num_layers=(2, 2, 2)).double(), make_inputs, 9
    )
    solver = Jacobi(window=5, tolerance=0.0)
    z = 0.1 * normal(9, *flow.z_shape)  # larger ones overflow
    for _ in range(2):
        torch.testing.assert_close(inverse(solver, z=z), expected(z=z))
    (decoders,) = flow._recordings._entries.values()
    parts = [fixed for whole in decoders._blocks.values() for fixed in whole.parts.values()]
    assert len(parts) > len(decoders._blocks)
    assert {part.conditioner.cache.tensor.untyped_storage().data_ptr() for part in parts} == {
        decoders._parts.untyped_storage().data_ptr()
    }
    assert len(decoders._parts) <= 1.5 * len(decoders._memory)


@pytest.mark.usefixtures("_recorded_here")
def test_a_part_may_be_of_any_size(make_flow, make_inputs):
    """As other solvers than ours may ask for."""
    flow, _, _ = longer(make_flow, make_inputs)
    block = flow.blocks[0]
    condition = block.condition(5, None, torch.full((5,), 0.3, dtype=torch.float64))
    tokens = normal(5, 3, 2)
    eager = block.conditioner(condition, None, Guidance())
    with torch.no_grad(), graphed.decoders(flow._recordings, flow.device, 5, torch.float64, 10**5) as decoders:
        here = decoders.of("block", block.conditioner(condition, None, Guidance()), [*block.parameters()])
        here(tokens, 0), eager(tokens, 0)
        for left in ([0, 1, 2, 4], [3, 1, 0], [2, 1], [1]):
            rows = torch.tensor(left)
            here, eager, tokens = here.select(rows), eager.select(rows), tokens[rows]
            torch.testing.assert_close(here(tokens[:, :1], 3), eager(tokens[:, :1], 3))


@pytest.mark.usefixtures("_recorded_here")
def test_the_dtype_of_z_is_kept(make_flow, make_inputs):
    _, inverse, expected = longer(make_flow, make_inputs)
    z = normal(5, 64, 2).float()
    for solver in SOLVERS.values():
        for given in (z, z.double()):
            found = inverse(solver, z=given)
            assert found.dtype == expected(z=given).dtype
            torch.testing.assert_close(found, expected(z=given))


@pytest.mark.usefixtures("_recorded_here")
def test_another_activation_is_another_block(make_flow, make_inputs):
    flow, inverse, expected = longer(make_flow, make_inputs)
    inverse()
    flow.blocks[0].transformer.layers[0].mlp[1] = torch.nn.SiLU()
    torch.testing.assert_close(inverse(), expected())


@pytest.mark.usefixtures("_recorded_here")
def test_progress_and_trajectories(case):
    flow, inverse, _ = case
    solved = []
    path = inverse(progress=solved.append, return_trajectory=True)
    assert sum(solved) == flow.num_solved_tokens
    assert len(path) == len(flow.blocks) + 1
    assert not torch.equal(path[0], path[-1])


@pytest.mark.usefixtures("_recorded_here")
def test_threads_take_turns(make_flow, make_inputs):
    flow, inverse, expected = longer(make_flow, make_inputs)
    given = [normal(5, *flow.z_shape, seed=seed) for seed in range(3)]
    found = [None] * 3

    def run(number):
        found[number] = inverse(z=given[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for z, images in zip(given, found, strict=True):
        torch.testing.assert_close(images, expected(z=z))


@pytest.mark.usefixtures("_recorded_here")
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("changes", [{}, {"start_token": False, "final_norm": False}, {"rotary_side": 0}], ids=str)
def test_a_prefix_of_texts_may_change(make_flow, changes, solver, monkeypatch):
    flow = make_flow(**STARFLOW_TEXT | {"image_size": 8, "patch_size": 1, "num_layers": (2, 1)} | changes).double()
    for seed in range(2):
        z = 0.3 * normal(5, *flow.z_shape, seed=seed)
        options = {"context": normal(5, 3, 5, seed=seed + 2), "null_context": normal(1, 3, 5, seed=seed + 4)}
        for guidance in (GUIDANCE, None):
            found = flow.inverse(z, **options, guidance=guidance, solver=SOLVERS[solver])
            with monkeypatch.context() as patch:
                patch.setattr(graphed, "DEVICES", set())
                torch.testing.assert_close(found, flow.inverse(z, **options, guidance=guidance))
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.mul_(1.01)


@pytest.mark.cuda
@pytest.mark.parametrize("solver", [sequential, Jacobi(window=5, tolerance=0.0)], ids=["sequential", "5"])
def test_cuda_graphs_of_a_prefix_give_the_result_of_the_cpu(make_flow, solver):
    flow = make_flow(**STARFLOW_TEXT | {"image_size": 16, "patch_size": 1, "channels": 32, "num_layers": (2, 2)})
    z, context, null_context = (normal(*shape).float() for shape in ((3, *flow.z_shape), (3, 3, 5), (1, 3, 5)))
    guidance = Guidance(weight=1.0, rule="gaussian")
    expected = flow.inverse(0.5 * z, context=context, null_context=null_context, guidance=guidance)
    given = {"context": context.cuda(), "null_context": null_context.cuda()}
    found = flow.cuda().inverse(0.5 * z.cuda(), **given, guidance=guidance, solver=solver)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


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
