"""Student's t against its textbook table and closed forms; intervals by hand."""

from __future__ import annotations

import math

import pytest

from fgd_hooks.evaluation.arms import mean_interval, t_quantile


@pytest.mark.parametrize(
    ("freedom", "printed"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_the_printed_table(freedom, printed):
    assert t_quantile(0.95, freedom) == pytest.approx(printed, abs=6e-4)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_closed_forms(confidence):
    # one degree: a Cauchy distribution; two: t = c sqrt(2 / (1 - c^2))
    assert t_quantile(confidence, 1) == pytest.approx(math.tan(math.pi * confidence / 2), rel=1e-9)
    assert t_quantile(confidence, 2) == pytest.approx(confidence * math.sqrt(2 / (1 - confidence**2)), rel=1e-9)


@pytest.mark.parametrize(("confidence", "freedom"), [(0, 3), (1, 3), (0.95, 0)])
def test_what_has_no_quantile(confidence, freedom):
    with pytest.raises(ValueError, match="expected 0 < confidence < 1"):
        t_quantile(confidence, freedom)


def test_an_interval_by_hand():
    # 1, 2, 6: mean 3, deviations -2, -1, 3, variance 14 / 2 = 7; half = 4.302653 * sqrt(7 / 3)
    found = mean_interval([1.0, 2.0, 6.0])
    assert (found.mean, found.count) == (3.0, 3)
    assert found.half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert (found.low, found.high) == (pytest.approx(3 - found.half), pytest.approx(3 + found.half))


def test_one_value_has_no_interval():
    found = mean_interval([2.5])
    assert (found.mean, found.half, found.low, found.high) == (2.5, None, -math.inf, math.inf)
    with pytest.raises(ValueError, match="one value or more"):
        mean_interval([])
