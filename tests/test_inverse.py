import pytest
import torch

from itarflow.inverse import sequential

B, N, D = 3, 5, 2


class KnownMap:
    """x_n = scale_n * z_n + sum over m < n of A_nm x_m, whose inverse is a linear system."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(N, D, N, D, generator=generator, dtype=torch.float64)
        self.matrix *= torch.ones(N, N).tril(-1)[:, None, :, None]
        self.scale = torch.randn(N, D, generator=generator, dtype=torch.float64).exp()
        self.tokens = torch.zeros(B, N, D, dtype=torch.float64)
        self.windows = []

    def affine_at(self, tokens, start):
        assert start == sum(self.windows)  # no token is skipped, none is repeated
        self.windows.append(tokens.shape[1])
        stop = start + tokens.shape[1]
        self.tokens[:, start:stop] = tokens
        after = slice(start + 1, stop + 1)
        shift = torch.einsum("nimj,bmj->bni", self.matrix[after, :, :stop], self.tokens[:, :stop])
        return shift, self.scale[after].expand(B, -1, -1)

    def solution(self, z):
        system = torch.eye(N * D, dtype=torch.float64) - self.matrix.reshape(N * D, N * D)
        return torch.linalg.solve(system, (z * self.scale).reshape(B, N * D, 1)).reshape(B, N, D)


@pytest.fixture
def known_map():
    return KnownMap()


@pytest.fixture
def z():
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_sequential_solves_a_known_triangular_system_one_token_at_a_time(known_map, z):
    first = torch.zeros(B, 1, D, dtype=z.dtype), known_map.scale[:1]
    torch.testing.assert_close(sequential(known_map.affine_at, z, first), known_map.solution(z))
    assert known_map.windows == [1] * (N - 1)


def test_sequential_maps_the_first_token_by_its_own_affine(known_map, z):
    x = sequential(known_map.affine_at, z, (torch.tensor(0.5), torch.tensor(-3.0)))
    torch.testing.assert_close(x[:, 0], 0.5 - 3.0 * z[:, 0])


def test_a_single_token_needs_no_conditioner(z):
    x = sequential(None, z[:, :1], (torch.tensor(1.0), torch.tensor(2.0)))
    torch.testing.assert_close(x, 1 + 2 * z[:, :1])


def test_sequential_reports_each_token(known_map, z):
    reports = []
    sequential(known_map.affine_at, z, (torch.tensor(0.0), torch.tensor(1.0)), reports.append)
    assert reports == [1] * N


def test_progress_of_a_flow_sums_to_its_number_of_tokens(flow, make_inputs):
    _, labels, noise_level = make_inputs(flow)
    reports = []
    flow.inverse(torch.zeros(3, *flow.z_shape), labels, noise_level, progress=reports.append)
    assert sum(reports) == flow.num_solved_tokens == sum((4 // patch) ** 2 for patch in flow.patch_sizes)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_any_solver_works_that_sees_windows_of_the_conditioner(make_flow, make_inputs, window):
    """Fixed-point iteration in windows: it rewrites the cache of a window until its tokens stand still."""

    def windowed(affine_at, z, first, progress=None):
        x = z * first[1] + first[0]
        for start in range(1, z.shape[1], window):
            stop = min(start + window, z.shape[1])
            for _ in range(start, stop):
                shift, scale = affine_at(x[:, start - 1 : stop - 1], start - 1)
                x = torch.cat([x[:, :start], z[:, start:stop] * scale + shift, x[:, stop:]], dim=1)
        return x

    flow = make_flow(patch_size=1, in_channels=1, learned_first_token=True, num_layers=(1, 1)).double()
    images, labels, noise_level = make_inputs(flow)
    z = flow(images, labels, noise_level).z.detach()
    torch.testing.assert_close(flow.inverse(z, labels, noise_level, solver=windowed), images)
