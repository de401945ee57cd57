"""Means and covariances summed share by share, and the distance of Gaussians."""

import math

import numpy as np
import pytest
import torch
from fidelity import torch_fidelity

from itarflow.evaluation.metrics.features import Moments, Sums, frechet_distance


def features(count, size=6, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator)
    return torch.randn(count, size, generator=generator) @ mixing + shift


def gaussian(mean, covariance):
    return Moments(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


def test_moments_are_those_of_numpy():
    values = features(50)
    moments = Sums.of(values).moments()
    np.testing.assert_allclose(moments.mean, values.double().mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(values.double().numpy(), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("cuts", [(1, 2, 47), (25, 25), (49, 1)])
def test_shares_of_a_set_add_up_to_the_set(cuts):
    values = features(50, shift=3.0)
    first, *others = map(Sums.of, values.split(cuts))
    for other in others:
        first = first + other
    whole = Sums.of(values)
    assert first.count == 50
    torch.testing.assert_close(first.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(first.scatter, whole.scatter, rtol=1e-12, atol=1e-12)


def test_sums_lose_nothing_far_from_zero():
    values = features(64).double()
    far = [Sums.of(part + 1e7) for part in values.split(8)]
    total = far[0]
    for share in far[1:]:
        total = total + share
    # The values themselves are rounded to 2e-9 there; sums of squares would lose all but two digits.
    torch.testing.assert_close(total.moments().covariance, Sums.of(values).moments().covariance, rtol=1e-7, atol=1e-7)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="2 or more"):
        Sums.of(features(1)).moments()


def test_diagonal_gaussians_have_the_distance_of_their_deviations():
    a = gaussian([1.0, 2.0], [[4.0, 0.0], [0.0, 9.0]])
    b = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    assert frechet_distance(a, b) == pytest.approx(5 + (2 - 1) ** 2 + 3**2, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(15, rel=1e-12)


def test_gaussians_whose_covariances_do_not_commute():
    cos, sin = math.cos(0.7), math.sin(0.7)
    turn = np.array([[cos, -sin], [sin, cos]])
    covariances = np.diag([3.0, 0.5]), turn @ np.diag([2.0, 0.1]) @ turn.T
    # Of 2 x 2 matrices, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    product = covariances[0] @ covariances[1]
    shared = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    a, b = (gaussian([0.0, 0.0], matrix.tolist()) for matrix in covariances)
    assert frechet_distance(a, b) == pytest.approx(5.6 - 2 * shared, rel=1e-12)


def test_a_set_is_at_no_distance_from_itself_though_its_covariance_is_singular():
    few = Sums.of(features(3, size=8)).moments()
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(few, Moments(few.mean + 1, few.covariance)) == pytest.approx(8, rel=1e-12)


def test_distances_are_those_of_torch_fidelity():
    fidelity = torch_fidelity()
    a, b = features(40, seed=1).double(), features(50, seed=2, shift=0.5).double()
    statistics = [fidelity.metric_fid.fid_features_to_statistics(values) for values in (a, b)]
    expected = fidelity.metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    ours = frechet_distance(Sums.of(a).moments(), Sums.of(b).moments())
    assert ours == pytest.approx(expected["frechet_inception_distance"], rel=1e-10)


def test_what_has_no_distance_is_refused():
    a = Sums.of(features(5)).moments()
    with pytest.raises(ValueError, match="6 features and 3"):
        frechet_distance(a, Sums.of(features(5, size=3)).moments())
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(a, Moments(a.mean * math.inf, a.covariance))
