import math
from functools import partial

import pytest
import torch
from conftest import few_variants

from itarflow.inverse import Guidance, Jacobi, sequential
from itarflow.pipeline import plan_search as profile
from itarflow.pipeline.plan_search import BlockProfile, Timing, block_metrics, find_plan


@pytest.fixture
def long_flow(make_flow):
    return make_flow(image_size=8, patch_size=1, num_layers=(1, 1)).double()


def test_metrics_of_a_flow_by_hand(make_flow, make_inputs):
    """A flow of one block in raster order, whose maps are computed one by one."""
    flow = make_flow(num_layers=(1,), learned_first_token=True).double()
    noisy, labels, noise_level = make_inputs(flow)
    (block,) = flow.blocks
    (metrics,) = block_metrics(flow, noisy, labels, noise_level)
    x = noisy.view(3, 2, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(3, 4, 8)
    condition = block.condition(3, labels, noise_level)

    def maps(x):
        first = block.first_affine(condition)
        rest = block.affine_at(x[:, :-1], condition)
        return [torch.cat(parts, dim=1) for parts in zip(first, rest, strict=True)]

    def norm(matrix):
        return torch.linalg.svdvals(matrix)[0].item()

    with torch.no_grad():
        shift, log_scale = maps(x)
        z = (x - shift) / log_scale.exp()
        log_scale_rows, shift_rows = block.proj_out.weight[:8], block.proj_out.weight[8:]
        crm = norm((x / log_scale.exp()).mean(0)) * norm(log_scale_rows) + norm(shift_rows)
        assert metrics.crm == pytest.approx(crm, rel=1e-5)
        for guess, start in (("z", z), ("zero", torch.zeros_like(z))):
            start = torch.cat([x[:, :1], start[:, 1:]], dim=1)
            shift_1, log_scale_1 = maps(start)
            step = z * log_scale_1.exp() + shift_1
            assert metrics.igm[guess] == pytest.approx(norm((step - x).mean(0)), rel=1e-5)


def test_metrics_of_the_identity_are_zero_and_blocks_are_noise_side_first(make_flow, make_inputs):
    flow = make_flow(fresh=True)
    assert [vars(block) for block in block_metrics(flow, *make_inputs(flow))] == [
        {"crm": 0.0, "igm": {"z": 0.0, "zero": 0.0}}
    ] * 2
    torch.nn.init.normal_(flow.blocks[0].proj_out.weight)  # the image side
    noise_side, image_side = block_metrics(flow, *make_inputs(flow))
    assert noise_side.crm == 0 < image_side.crm


@few_variants
def test_metrics_leave_the_flow_as_it_was(flow, make_inputs):
    inputs = make_inputs(flow)
    before = flow(*inputs).z
    assert all(math.isfinite(block.crm) for block in block_metrics(flow, *inputs))
    assert torch.equal(flow(*inputs).z, before)
    assert not any(block._forward_pre_hooks for block in flow.blocks)


def timing(seconds, **solver):
    return Timing(Jacobi(**solver), seconds, 1, 0.0)


def test_the_fastest_solver_must_be_worth_it():
    exact = timing(1.0, window=1)
    assert BlockProfile((exact, timing(0.99, window=4), timing(math.inf, window=8))).fastest is exact
    faster = timing(0.5, window=4)
    assert BlockProfile((exact, timing(0.8, window=8), faster)).fastest is faster


def inverse_of(flow, make_inputs, **settings):
    _, labels, noise_level = make_inputs(flow)
    z = torch.randn(3, *flow.z_shape, generator=torch.Generator().manual_seed(0)).to(flow.dtype)
    return partial(flow.inverse, z, labels, noise_level, guidance=Guidance(weight=1.0), **settings)


def search(flow, make_inputs, **settings):
    """Its pictures are the noisy images themselves."""
    invert = inverse_of(flow, make_inputs)
    return find_plan(flow, invert, lambda **options: [invert(**options)], batch_size=3, repeats=1, **settings)


@pytest.mark.slow
def test_a_plan_keeps_pictures_as_near_as_asked(long_flow, make_inputs):
    invert, reports = inverse_of(long_flow, make_inputs), []
    found = find_plan(
        long_flow,
        invert,
        lambda **options: [invert(**options)],
        batch_size=3,
        largest_difference=1e-3,
        windows=(4, 16),
        repeats=1,
        progress=lambda title, more: reports.append(more),
    )
    exact, planned = invert(), invert(solver=found.plan.solvers_of(long_flow))
    assert (planned - exact).abs().max() <= 5e-4  # half of it is the margin
    assert (found.plan.device, found.plan.batch_size, found.plan.num_tokens) == ("cpu", 3, (64, 64))
    assert found.plan.facts["largest difference of a pixel"] <= 5e-4
    assert found.plan.facts["seconds, exact"] > 0
    assert sum(reports) % (2 * 64) == 0 < sum(reports)
    for block, solver in zip(found.blocks, found.plan.solvers, strict=True):
        tried = [(t.solver.window, t.solver.guess) for t in block.timings[:3]]
        assert tried == [(1, "z"), (None, "z"), (None, "zero")]
        assert [t.solver.window for t in block.timings[3:]] == [4, 16]
        # On a busy machine all blocks together may be no faster than one by one, which the plan then is.
        assert found.plan.exact or solver == block.fastest.solver
        assert block.sequential.evaluations == 63
        for timing in block.timings:
            assert timing.evaluations <= 63
            assert timing.finished == math.isfinite(timing.difference)
        finished = [t for t in block.timings if t.finished]
        assert all(t.difference <= 0.1 for t in finished)


@pytest.mark.slow
def test_nothing_but_rounding_is_allowed_at_zero(long_flow, make_inputs):
    found = find_plan(
        long_flow,
        (invert := inverse_of(long_flow, make_inputs)),
        invert,
        batch_size=3,
        largest_difference=0.0,
        windows=(8,),
        repeats=1,
    )
    assert {solver.tolerance for solver in found.plan.solvers if solver.window != 1} <= {0.0}
    assert found.plan.facts["largest difference of a pixel"] < 1e-9


def test_a_solver_is_stopped_once_it_has_had_its_time(monkeypatch):
    """By a clock that each evaluation advances by the tokens it computes."""
    clock = [0.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: clock[0])

    class Doubling:
        """x_n = z_n + 2 x_(n - 1): no guess is right before its turn."""

        def __call__(self, tokens, start, stop=None):
            clock[0] += tokens.shape[1]
            return 2 * tokens, torch.ones_like(tokens)

    z, first = torch.ones(1, 20, 1), (torch.zeros(1), torch.ones(1))
    exact = sequential(Doubling(), z, first)
    tried = [
        profile._timed(solver, Doubling(), z, first, exact, 19.0, repeats=1)
        for solver in (Jacobi(window=1), Jacobi(window=4), Jacobi())
    ]
    assert [timing.evaluations for timing in tried] == [19, 5, 2]
    assert [timing.seconds for timing in tried] == [19.0, math.inf, math.inf]
    assert tried[0].difference == 0
    assert math.isnan(tried[1].difference)


@pytest.mark.slow
def test_a_plan_that_is_not_faster_in_the_end_is_none(long_flow, make_inputs, monkeypatch):
    monkeypatch.setattr(profile.statistics, "median", lambda seconds: 1.0)
    found = find_plan(
        long_flow,
        (invert := inverse_of(long_flow, make_inputs)),
        invert,
        batch_size=3,
        largest_difference=1.0,
        repeats=1,
    )
    assert found.plan.solvers_of(long_flow) == [sequential, sequential]
    assert found.plan.facts["largest difference of a pixel"] == 0


@pytest.mark.slow
def test_no_more_pictures_are_made_than_it_takes_to_tell(long_flow, make_inputs):
    made = []

    def pictures(solver, progress):
        for part in range(5):
            made.append((solver, part))
            exact = solver is sequential or solver == [sequential] * 2
            yield torch.zeros(1) if exact or part < 2 else torch.ones(1)

    find_plan(long_flow, inverse_of(long_flow, make_inputs), pictures, batch_size=3, largest_difference=0.5, repeats=1)
    first = [part for solver, part in made if isinstance(solver, list) and getattr(solver[0], "tolerance", 0) == 1e-2]
    assert first == [0, 1, 2]


def test_images_that_are_not_finite_can_not_be_compared(long_flow, make_inputs):
    with pytest.raises(ValueError, match="the exact images are not finite"):
        find_plan(
            long_flow,
            (invert := inverse_of(long_flow, make_inputs)),
            lambda **k: invert(**k) / 0,
            batch_size=3,
            largest_difference=1.0,
        )


def test_a_plan_names_the_precision_in_which_it_was_found(make_flow, make_inputs):
    flow = make_flow(patch_size=4, learned_first_token=True)
    assert search(flow, make_inputs, largest_difference=0.0).plan.dtype == "torch.float32"
    asked = search(flow, make_inputs, largest_difference=0.0, dtype=torch.bfloat16).plan
    assert (asked.device, asked.device_name, asked.dtype) == ("cpu", "cpu", "torch.bfloat16")


def test_flows_of_single_tokens_have_nothing_to_plan(make_flow, make_inputs):
    flow = make_flow(patch_size=4, learned_first_token=True).double()
    found = search(flow, make_inputs, largest_difference=0.0)
    assert found.plan.solvers_of(flow) == [sequential, sequential]
    assert found.blocks[0].whole("z") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"largest_difference": -1.0}, "largest_difference is -1.0"),
        ({"largest_difference": math.nan}, "largest_difference is nan"),
        ({"largest_difference": 0.1, "repeats": 0}, "repeats is 0"),
        ({"largest_difference": 0.1, "windows": (1,)}, r"windows are \[1\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(long_flow, settings, message):
    with pytest.raises(ValueError, match=message):
        find_plan(long_flow, None, None, batch_size=1, **settings)
