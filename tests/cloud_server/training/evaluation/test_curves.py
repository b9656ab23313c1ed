"""The formulas of a cost-quality curve: identities, ties, orders, crossings, and coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cloud_server.training.evaluation.curves import NEVER, Curve, Ranking, percentiles
from cloud_server.training.intervals import percentile, resamples

# Of few values, so that ties are common; sums of these are exact.
steps = st.integers(-8, 8).map(lambda i: i / 8)


@st.composite
def routed(draw):
    """Scores and gains of the same prompts."""
    n = draw(st.integers(1, 30))
    column = st.lists(steps, min_size=n, max_size=n)
    return np.array(draw(column)), np.array(draw(column))


def curve(scores, gains, counts=None) -> Curve:
    return Ranking(scores, counts).curve(gains)


@given(routed())
def test_the_area_is_the_covariance_with_the_rank(data):
    """The formula of the module's text against the trapezoid over the full curve."""
    scores, gains = data
    n = len(scores)
    rank = n * (1 - percentiles(scores)) + 0.5
    w = 1 - (rank - 0.5) / n
    g = np.mean(gains * w) - gains.mean() * w.mean()
    assert curve(scores, gains).gain_area()[0] == pytest.approx(g, abs=1e-12)
    assume(gains.sum() > 0)
    apgr = curve(scores, gains).apgr()[0]
    assert apgr == pytest.approx((gains * w).sum() / gains.sum())
    assert apgr == pytest.approx(0.5 + g / gains.mean())


@given(routed())
def test_turning_the_scores_round_mirrors_the_curve(data):
    scores, gains = data
    ours, mirrored = curve(scores, gains), curve(-scores, gains)
    assert mirrored.gain_area()[0] == pytest.approx(-ours.gain_area()[0], abs=1e-12)
    if gains.sum() > 0:
        assert mirrored.apgr()[0] == pytest.approx(1 - ours.apgr()[0])
    else:  # no gap to recover: a part of it would turn good orders into bad ones
        assert np.isnan(mirrored.apgr()[0])


@given(routed(), st.randoms(use_true_random=False))
def test_the_order_in_the_file_decides_nothing(data, random):
    scores, gains = data
    order = np.array(random.sample(range(len(scores)), len(scores)))
    one, other = curve(scores, gains), curve(scores[order], gains[order])
    np.testing.assert_allclose(one.share, other.share)
    np.testing.assert_allclose(one.gain, other.gain, atol=1e-12)


@given(routed())
def test_only_the_order_of_scores_counts(data):
    scores, gains = data
    one, other = curve(scores, gains), curve(np.exp(3 * scores) - 7, gains)
    np.testing.assert_array_equal(one.gain, other.gain)
    np.testing.assert_array_equal(one.share, other.share)


@given(routed(), st.floats(0, 1))
def test_no_order_is_better_than_the_oracle(data, share):
    scores, gains = data
    best, ours = curve(gains, gains), curve(scores, gains)
    assert ours.area()[0] <= best.area()[0] + 1e-12
    assert ours.at(share)[0] <= best.at(share)[0] + 1e-12


@given(routed(), st.floats(0, 1))
def test_equal_scores_are_random_routing(data, share):
    _, gains = data
    straight = curve(np.zeros(len(gains)), gains)
    assert straight.gain_area()[0] == pytest.approx(0, abs=1e-12)
    assert straight.at(share)[0] == pytest.approx(share * gains.mean(), abs=1e-12)


def test_random_scores_give_one_half():
    rng = np.random.default_rng(0)
    gains = rng.normal(0.3, 1, 2000)
    apgr = [curve(rng.random(2000), gains).apgr()[0] for _ in range(200)]
    assert np.mean(apgr) == pytest.approx(0.5, abs=4 * np.std(apgr) / np.sqrt(200))
    assert np.std(apgr) < 0.05


def test_counts_stand_for_repeated_prompts():
    rng = np.random.default_rng(1)
    scores, gains = rng.integers(0, 6, 40) / 2, rng.normal(size=40)
    counts = resamples(40, 0)[:5]
    many = curve(scores, gains, counts)
    for row, count in enumerate(counts.astype(int)):
        one = curve(np.repeat(scores, count), np.repeat(gains, count))
        for share in (0.0, 0.2, 0.5, 1.0):
            assert many.at(share)[row] == pytest.approx(one.at(share)[0])
        assert many.apgr()[row] == pytest.approx(one.apgr()[0], nan_ok=True)
        assert many.first(0.05)[row] == pytest.approx(one.first(0.05)[0])


def test_the_curve_is_read_between_prompts():
    two = curve([2.0, 1.0], [0.6, 0.2])
    assert [two.at(share)[0] for share in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(
        [0, 0.15, 0.3, 0.35, 0.4]
    )
    with pytest.raises(ValueError, match=r"not at 1\.5"):
        two.at(1.5)


@pytest.mark.parametrize(
    ("gains", "level", "share"),
    [
        ([0.4, 0.4], 0.2, 0.5),  # on a point
        ([0.4, 0.4], 0.3, 0.75),  # between points
        ([0.4, 0.4], 0.0, 0.0),  # from the start
        ([0.4, 0.4], 0.4, 1.0),  # at the end
        ([0.4, 0.4], 0.41, NEVER),
        ([-0.4, -0.4], 0.1, NEVER),  # useless
        ([0.8, -1.2, 0.4, 0.8], 0.15, 0.1875),  # the first crossing of a curve that dips
        ([-0.4, 0.8], 0.1, 0.875),  # one that dips first
    ],
)
def test_a_threshold_is_the_first_crossing_or_never(gains, level, share):
    descending = -np.arange(len(gains))
    assert curve(descending, gains).first(level)[0] == pytest.approx(share)


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")], [float("inf")]])
def test_scores_must_be_finite(scores):
    with pytest.raises(ValueError, match="finite"):
        Ranking(scores)


@pytest.mark.slow
def test_the_bootstrap_covers_the_true_apgr():
    """Gains of mean `level + slope * u` in the percentile u: APGR = 1/2 + slope / 12 / mean."""
    rng = np.random.default_rng(2)
    level, slope, n, trials = 0.2, 0.6, 300, 400
    truth = 0.5 + slope / 12 / (level + slope / 2)
    held = 0
    for trial in range(trials):
        u = rng.random(n)
        gains = level + slope * u + rng.normal(0, 0.3, n)
        apgr = curve(u, gains).apgr()[0]
        interval = percentile(apgr, curve(u, gains, resamples(n, trial)).apgr(), n)
        held += interval.low <= truth <= interval.high
    assert 0.93 <= held / trials <= 0.97
