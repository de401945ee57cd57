import math

import pytest
import torch
from conftest import few_variants

from itarflow.inverse import Guidance, Jacobi, sequential

B, N, D = 3, 9, 2


class KnownMap:
    """x_n = scale_n * z_n + sum over m < n of A_nm x_m, a linear system; coupling is the size of A."""

    def __init__(self, coupling=1.0, samples=B):
        generator = torch.Generator().manual_seed(0)
        self.matrix = coupling * torch.randn(N, D, N, D, generator=generator, dtype=torch.float64)
        self.matrix *= torch.ones(N, N).tril(-1)[:, None, :, None]
        self.scale = torch.randn(N, D, generator=generator, dtype=torch.float64).exp()
        self.tokens = torch.zeros(samples, N, D, dtype=torch.float64)
        self.given = torch.zeros(samples, dtype=torch.int64)
        self.calls = []

    def __call__(self, tokens, start, stop=None):
        samples, count, _ = tokens.shape
        self.calls.append((samples, count))
        starts = torch.full((samples,), start) if isinstance(start, int) else start
        assert (starts <= self.given).all()  # no token is skipped
        assert (starts + count < N).all()
        self.given = torch.maximum(self.given, starts + count)
        shifts = []
        for tokens_of, memory, first in zip(tokens, self.tokens, starts.tolist(), strict=True):
            memory[first : first + count] = tokens_of
            after = slice(first + 1, first + 1 + count)
            known = torch.ones(count, N).tril(first)[:, None, :, None]  # later ones in memory are not to be seen
            shifts.append(torch.einsum("nimj,mj->ni", self.matrix[after] * known, memory))
        scale = self.scale[starts[:, None] + 1 + torch.arange(count)]
        return torch.stack(shifts), scale

    def select(self, samples):
        part = KnownMap(samples=len(samples))
        part.matrix, part.scale, part.calls = self.matrix, self.scale, self.calls
        part.tokens, part.given = self.tokens[samples], self.given[samples]
        return part

    def solution(self, z):
        system = torch.eye(N * D, dtype=torch.float64) - self.matrix.reshape(N * D, N * D)
        return torch.linalg.solve(system, (z * self.scale).reshape(len(z), N * D, 1)).reshape(len(z), N, D)

    @property
    def first(self):
        return torch.zeros(D, dtype=torch.float64), self.scale[:1]


@pytest.fixture
def known_map():
    return KnownMap()


@pytest.fixture
def z():
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_sequential_solves_a_known_triangular_system_one_token_at_a_time(known_map, z):
    torch.testing.assert_close(sequential(known_map, z, known_map.first), known_map.solution(z))
    assert known_map.calls == [(B, 1)] * (N - 1)


@pytest.mark.parametrize("solver", [sequential, Jacobi(window=3)], ids=["sequential", "jacobi"])
def test_the_first_token_is_mapped_by_its_own_affine(known_map, z, solver):
    x = solver(known_map, z, (torch.tensor(0.5), torch.tensor(-3.0)))
    torch.testing.assert_close(x[:, 0], 0.5 - 3.0 * z[:, 0])


@pytest.mark.parametrize("solver", [sequential, Jacobi()], ids=["sequential", "jacobi"])
def test_a_single_token_needs_no_conditioner(z, solver):
    x = solver(None, z[:, :1], (torch.tensor(1.0), torch.tensor(2.0)))
    torch.testing.assert_close(x, 1 + 2 * z[:, :1])


@pytest.mark.parametrize(
    "solver", [sequential, Jacobi(window=1), Jacobi(window=4), Jacobi()], ids=["sequential", "1", "4", "all"]
)
def test_progress_sums_up_to_the_tokens(known_map, z, solver):
    reports = []
    solver(known_map, z, known_map.first, reports.append)
    assert sum(reports) == N
    assert min(reports) > 0


@pytest.mark.parametrize(
    ("coupling", "window", "guess"),
    [
        (0.0, None, "z"),
        (0.0, 2, "zero"),
        (0.01, 3, "z"),
        (0.01, N, "zero"),
        (1.0, 1, "z"),
        (1.0, N - 1, "zero"),
        (1.0, None, "z"),
        (30.0, N, "z"),
        (30.0, 2, "z"),
        (30.0, None, "zero"),
    ],
)
def test_jacobi_without_tolerance_is_exact_in_no_more_evaluations_than_tokens(coupling, window, guess, z):
    known_map = KnownMap(coupling)
    x = Jacobi(window=window, tolerance=0.0, guess=guess)(known_map, z, known_map.first)
    torch.testing.assert_close(x, sequential(KnownMap(coupling), z, known_map.first))
    assert len(known_map.calls) <= N - 1
    assert max(count for _, count in known_map.calls) <= min(window or N, N - 1)


def test_independent_tokens_are_solved_in_two_evaluations(z):
    """The first computes them, the second sees that nothing changes."""
    known_map = KnownMap(coupling=0.0)
    Jacobi()(known_map, z, known_map.first)
    assert len(known_map.calls) == 2


def test_a_perfect_guess_needs_one_evaluation(known_map, z):
    x = Jacobi(tolerance=1e-9)(known_map, z, known_map.first, guess=known_map.solution(z))
    torch.testing.assert_close(x, known_map.solution(z))
    assert len(known_map.calls) == 1


def test_a_tolerance_saves_evaluations_and_bounds_the_error(z):
    exact, rough = KnownMap(coupling=0.05), KnownMap(coupling=0.05)
    Jacobi(tolerance=0.0)(exact, z, exact.first)
    x = Jacobi(tolerance=1e-2)(rough, z, rough.first)
    assert len(rough.calls) < len(exact.calls)
    error = (x - rough.solution(z)).abs().max()
    assert 0 < error < 1e-2


def test_samples_move_on_by_themselves_and_leave_when_done(z):
    """A sample that is all guessed right is done at once; the others are no slower than alone."""
    known_map = KnownMap()
    guess = torch.zeros_like(z)
    guess[:2] = known_map.solution(z)[:2]
    x = Jacobi(window=3, tolerance=1e-9)(known_map, z, known_map.first, guess=guess)
    torch.testing.assert_close(x, known_map.solution(z))
    alone = KnownMap(samples=1)
    Jacobi(window=3, tolerance=1e-9)(alone, z[2:], alone.first, guess=guess[2:])
    assert len(known_map.calls) == len(alone.calls)
    assert known_map.calls[0] == (3, 3)
    assert known_map.calls[-1][0] == 1


def test_guesses_that_overflow_are_given_up_and_their_window_is_done_one_by_one(z):
    known_map = KnownMap(coupling=1e200)  # a guess of z overflows in the second evaluation; so does the answer
    x = Jacobi(window=4)(known_map, z * 1e-210, known_map.first, guess=torch.ones_like(z))
    assert (B, 1) in known_map.calls
    assert len(known_map.calls) <= N - 1
    finite = sequential(KnownMap(coupling=1e200), z * 1e-210, known_map.first)
    torch.testing.assert_close(x, finite, equal_nan=True)


@pytest.mark.parametrize(("window", "wrong"), [(None, math.inf), (None, 1e30), (4, math.nan)])
def test_a_senseless_guess_does_no_harm(make_flow, make_inputs, window, wrong):
    flow = make_flow(image_size=8, patch_size=1, num_layers=(1, 1))
    _, labels, noise_level = make_inputs(flow)
    z = torch.randn(3, *flow.z_shape, generator=torch.Generator().manual_seed(0))
    path = flow.inverse(z, labels, noise_level, return_trajectory=True)
    guess = path.clone()
    guess[1, 0, 0, 3, 3], guess[2, 1] = wrong, wrong
    found = flow.inverse(z, labels, noise_level, solver=Jacobi(window=window, tolerance=1e-6), guess=guess)
    torch.testing.assert_close(found, path[-1], atol=1e-4, rtol=1e-4)


def test_guesses_that_grow_too_large_are_given_up_before_they_are_infinite(z):
    seen = []

    class Watched(KnownMap):
        def __call__(self, tokens, start, stop=None):
            seen.append(tokens.abs().max().item())
            return super().__call__(tokens, start)

    known_map = Watched(coupling=100.0)
    exact = sequential(KnownMap(coupling=100.0), 1e-9 * z, known_map.first)
    guess = torch.full_like(z, 9000.0)
    x = Jacobi(window=6, tolerance=0.0)(known_map, 1e-9 * z, known_map.first, guess=guess)
    torch.testing.assert_close(x, exact)
    assert max(seen) <= max(1e4, exact.abs().max().item())


def test_a_sample_that_is_not_a_number_slows_no_other(z):
    def evaluations(z):
        known_map = KnownMap(coupling=0.05)
        Jacobi(tolerance=1e-6)(known_map, z, known_map.first)
        return len(known_map.calls)

    expected = evaluations(z)
    z[1, 2] = math.nan
    assert evaluations(z) <= expected + 1


def test_a_flow_in_float64_takes_z_of_float32(make_flow, make_inputs):
    flow = make_flow().double()
    _, labels, noise_level = make_inputs(flow)
    z = flow.sample_prior(3, torch.Generator().manual_seed(0))
    assert z.dtype == torch.float32
    exact = flow.inverse(z, labels, noise_level)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(flow.inverse(z, labels, noise_level, solver=Jacobi(tolerance=0.0)), exact)


def test_a_sample_that_is_not_a_number_ends_and_spoils_no_other(known_map, z):
    z[1, 2] = math.nan
    x = Jacobi(window=4, tolerance=0.0)(known_map, z, known_map.first)
    expected = known_map.solution(z[::2])
    torch.testing.assert_close(x[::2], expected)
    assert x[1, 3:].isnan().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"window": 4.5}, "window is 4.5"),
        ({"tolerance": -1e-3}, "tolerance is -0.001"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"guess": "x"}, "guess is 'x'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Jacobi(**settings)


def test_a_window_longer_than_the_sequence_is_refused_before_work(known_map, z, make_flow, make_inputs):
    with pytest.raises(ValueError, match=r"window is 10.* 9 tokens"):
        Jacobi(window=10)(known_map, z, known_map.first)
    assert known_map.calls == []
    flow, reports = make_flow(patch_size=(2, 1), in_channels=1), []  # 16 tokens, then 4
    with pytest.raises(ValueError, match=r"window is 8.* 4 tokens"):
        flow.inverse(torch.zeros(1, *flow.z_shape), None, 0.2, solver=Jacobi(window=8), progress=reports.append)
    assert reports == []


def test_a_solver_a_block_in_the_order_of_inversion(make_flow):
    flow, asked = make_flow(patch_size=(2, 1), in_channels=1), []

    def solver(name):
        def solve(conditioner, z, first, progress=None, guess=None):
            asked.append((name, z.shape[1]))
            return sequential(conditioner, z, first, progress)

        return solve

    z = torch.zeros(1, *flow.z_shape)
    flow.inverse(z, None, 0.2, solver=[solver("noise side"), solver("image side")])
    assert asked == [("noise side", 16), ("image side", 4)]
    for wrong in (4, "jacobi", [Jacobi(), None]):
        with pytest.raises(ValueError, match=r"solver is .*itarflow.inverse"):
            flow.inverse(z, None, 0.2, solver=wrong)
    with pytest.raises(ValueError, match=r"1 solvers .*2 blocks"):
        flow.inverse(z, None, 0.2, solver=[sequential])


def test_the_trajectory_of_a_near_noise_level_is_a_good_guess(make_flow, make_inputs):
    flow = make_flow(image_size=8, patch_size=1, num_layers=(1, 1), input_scale=0.7).double()
    _, labels, _ = make_inputs(flow)
    z = torch.randn(3, *flow.z_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def evaluations(level, guess=None):
        calls = []

        def counted(conditioner, *args):
            class Counted:
                def __call__(self, tokens, start, stop=None):
                    calls.append(tokens.shape[1])
                    return conditioner(tokens, start)

                select = conditioner.select

            return Jacobi(tolerance=1e-6)(Counted(), *args)

        path = flow.inverse(z, labels, level, solver=counted, guess=guess, return_trajectory=True)
        torch.testing.assert_close(path[-1], flow.inverse(z, labels, level), atol=1e-4, rtol=0)
        return path, len(calls)

    path, first = evaluations(0.3)
    assert evaluations(0.3001, path)[1] < first
    assert evaluations(0.3, path)[1] == 2  # one a block, to see that all is right
    with pytest.raises(ValueError, match=r"guess .*\(2, 3, 2, 8, 8\).*\(3, 3, 2, 8, 8\)"):
        flow.inverse(z, labels, 0.3, guess=path[:2])


def test_a_guess_of_another_shape_is_refused(known_map, z):
    with pytest.raises(ValueError, match=r"guess .*\(3, 4, 2\).*\(3, 9, 2\)"):
        Jacobi()(known_map, z, known_map.first, guess=z[:, :4])


@few_variants
def test_progress_of_a_flow_sums_to_its_number_of_tokens(flow, make_inputs):
    _, labels, noise_level = make_inputs(flow)
    reports = []
    flow.inverse(torch.zeros(3, *flow.z_shape), labels, noise_level, progress=reports.append)
    assert sum(reports) == flow.num_solved_tokens == sum((4 // patch) ** 2 for patch in flow.patch_sizes)


def test_every_kind_of_flow_is_inverted_by_jacobi(flow, make_inputs):
    images, labels, noise_level = make_inputs(flow.double())
    z = flow(images, labels, noise_level).z.detach()
    lone = any(block.num_tokens < 2 for block in flow.blocks)
    solver = Jacobi(tolerance=0.0) if lone else Jacobi(window=2, tolerance=0.0, guess="zero")
    torch.testing.assert_close(flow.inverse(z, labels, noise_level, solver=solver), images)
    guidance = Guidance(weight=1.5, temperature=0.8)
    exact = flow.inverse(z, labels, noise_level, guidance=guidance)
    torch.testing.assert_close(flow.inverse(z, labels, noise_level, guidance=guidance, solver=solver), exact)
