"""Intervals hold what they are of, and are as wide as theory says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_server.training.intervals import (
    auroc,
    average,
    difference,
    rank_correlation,
    share,
)

shares = st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=30)


@given(shares)
@settings(max_examples=50)
@pytest.mark.parametrize("method", [average, share, difference])
def test_an_interval_holds_the_mean_of_the_known_values(method, values):
    known = [value for value in values if not np.isnan(value)]
    result = method(np.array(values))
    if not known:
        assert result is None
    else:
        assert result.n == len(known)
        assert result.mean == pytest.approx(np.mean(known))
        assert -1 <= result.low <= result.mean <= result.high <= 1 + 1e-9


@pytest.mark.parametrize(
    ("right", "low", "high"), [(0, 0.0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1.0)]
)
def test_plain_shares_have_wilsons_interval(right, low, high):
    result = share(np.arange(10) < right)
    assert (result.low, result.high) == pytest.approx((low, high), abs=1e-4)


def test_a_bootstrap_is_as_wide_as_the_normal_interval_and_seeded():
    values = np.random.default_rng(0).normal(3, 2, 400)
    result = average(values, seed=1)
    reach = 1.96 * values.std() / 20
    assert (result.low, result.high) == pytest.approx((3 - reach, 3 + reach), abs=0.15)
    assert result == average(values, seed=1) != average(values, seed=2)


def test_differences_of_nothing_still_have_a_width_both_ways():
    result = difference(np.zeros(50))
    assert (result.mean, result.low) == (0.0, -result.high)
    assert 0.02 < result.high < 0.1
    assert difference(np.full(20, -1.0)).high > -1


def test_auroc_counts_pairs_and_halves_ties():
    better, worse = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 2.5])
    assert auroc(better, worse).mean == pytest.approx((1 + 1.5 + 3) / 9)
    assert auroc(better + 9, worse).mean == auroc(better + 9, worse).low == 1.0
    assert auroc(better, better).mean == 0.5
    both = auroc(np.stack([better, better + 9]), np.stack([worse, worse]))
    assert both.mean == pytest.approx((5.5 / 9 + 1) / 2)
    assert both.low <= both.mean <= both.high


def test_rank_correlation_is_of_order_alone():
    levels = np.arange(5.0)
    rows = np.stack([levels**3, -np.exp(levels), np.zeros(5), [0, 1, 1, 1, 2]])
    result = rank_correlation(rows, np.broadcast_to(levels, rows.shape))
    assert result[:3].tolist() == pytest.approx([1.0, -1.0, 0.0])
    assert 0.85 < result[3] < 1.0
