from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import ConfigError
from edge_agent.routing.policy import score_digest, threshold

scores = st.lists(st.floats(0, 1), min_size=1, max_size=600)
shares = st.floats(0, 1)


@given(scores, shares)
def test_on_the_calibration_set_the_share_is_never_exceeded(calibration, share):
    limit = threshold(score_digest(calibration), share)
    assert sum(score > limit for score in calibration) <= share * len(calibration)


@given(scores, shares, shares)
def test_a_larger_share_never_raises_the_threshold(calibration, a, b):
    digest = score_digest(calibration)
    assert threshold(digest, max(a, b)) <= threshold(digest, min(a, b))


@given(scores, shares)
def test_a_prompt_that_the_edge_draws_as_well_stays_on_the_edge(calibration, share):
    assert threshold(score_digest(calibration), share) >= 0.5


@given(scores, st.floats(0, 1))
def test_share_zero_sends_no_score_whatever(calibration, score):
    assert not score > threshold(score_digest(calibration), 0.0)


@given(scores)
def test_the_digest_is_200_ascending_scores_from_least_to_largest(calibration):
    digest = score_digest(calibration)
    assert len(digest) == 200
    assert digest == sorted(digest)
    assert (digest[0], digest[-1]) == (min(calibration), max(calibration))
    assert set(digest) <= set(calibration)


def test_with_many_scores_the_share_is_nearly_used_up():
    calibration = np.random.default_rng(0).uniform(0.4, 1.0, 5000)
    digest = score_digest(calibration)
    for share in (0.1, 0.3, 0.5):
        assert np.mean(calibration > threshold(digest, share)) == pytest.approx(share, abs=0.006)


def test_with_share_one_only_the_cap_binds():
    assert threshold(score_digest([0.1, 0.4, 0.6, 0.9]), 1.0) == 0.5


@given(scores, shares)
def test_without_the_cap_the_share_is_kept_too_and_more_is_sent(calibration, share):
    digest = score_digest(calibration)
    free = threshold(digest, share, capped=False)
    assert free <= threshold(digest, share) == max(0.5, free)
    assert sum(score > free for score in calibration) <= share * len(calibration)


@given(st.floats(0, 1), st.integers(1, 50), shares)
def test_tied_scores_go_together_and_never_beyond_the_share(score, count, share):
    limit = threshold(score_digest([score] * count), share, capped=False)
    assert not score > limit


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_outside_zero_to_one_is_refused_with_its_value(share):
    with pytest.raises(ConfigError, match=str(share)):
        threshold([0.4, 0.6], share)


@pytest.mark.parametrize("calibration", [[], [0.5, float("nan")]])
def test_no_digest_without_finite_scores(calibration):
    with pytest.raises(ValueError, match="digest"):
        score_digest(calibration)
