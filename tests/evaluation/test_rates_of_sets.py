"""Rates and their intervals, against published values."""

from __future__ import annotations

import pytest

from itarflow.evaluation.diagnosis.rates import difference, rate


# Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_as_published(count, total, low, high):
    found = rate(count, total)
    assert found.value == count / total
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


# Newcombe, "Interval estimation for the difference between independent proportions" (1998), table II, method 10.
@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0000),
    ],
)
def test_newcombe_is_as_published(first, second, low, high):
    found = difference(rate(*first), rate(*second))
    assert found.value == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_nothing_of_many_is_rare_but_not_impossible():
    assert rate(0, 50).low == 0
    assert rate(0, 50).high > 0.05
    assert rate(50, 50).high == pytest.approx(1)
    assert rate(50, 50).low == pytest.approx(1 - rate(0, 50).high)


@pytest.mark.parametrize(("count", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_rate_is_refused(count, total):
    with pytest.raises(ValueError, match=f"{count} of {total} is no rate"):
        rate(count, total)
