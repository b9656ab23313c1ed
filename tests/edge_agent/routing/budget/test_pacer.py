"""A share that is kept whatever prompts come, however mean their order."""

from __future__ import annotations

from math import nextafter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.routing.budget.pacer import ETA, Pace, Pacer
from edge_agent.routing.policy import score_digest, threshold

WORTHY = np.linspace(0.5001, 0.9, 200).tolist()  # the edge is never as good: the cap never binds
shares = st.floats(0, 1)
etas = st.sampled_from([0.01, 0.05, 0.2, 1.0])
any_score = st.floats(0, 1)
worthy_score = st.floats(0.5, 1, exclude_min=True)
digests = st.lists(any_score, min_size=1, max_size=50).map(score_digest)


def follow(pacer, scores, pace=None):
    """Return which of `scores` the pacer sends, one after the other."""
    pace, sent = pace or Pace(), []
    for score in scores:
        sent.append(score > pacer.threshold(pace))
        pace = pacer.decided(pace, sent=sent[-1])
    return np.array(sent)


def bound(eta):
    return (1 + 2 * eta) / eta + 1e-6  # and the rounding of some hundred additions


def within(sent, share, eta):
    """Whether the bound holds at the end and at every moment before."""
    errors = np.cumsum(sent) - share * np.arange(1, len(sent) + 1)
    return np.abs(errors).max() <= bound(eta)


@settings(max_examples=40, deadline=None)
@given(digests, shares, etas, st.lists(worthy_score, min_size=1, max_size=200))
def test_the_share_is_kept_on_any_sequence_of_worthy_prompts(digest, share, eta, scores):
    assert within(follow(Pacer(digest, share, eta), scores), share, eta)


@settings(max_examples=40, deadline=None)
@given(digests, shares, etas, st.lists(any_score, min_size=1, max_size=200))
def test_the_share_is_never_exceeded_on_any_sequence_whatever(digest, share, eta, scores):
    sent = follow(Pacer(digest, share, eta), scores)
    assert (np.cumsum(sent) - share * np.arange(1, len(sent) + 1)).max() <= bound(eta)
    assert not sent[np.array(scores) <= 0.5].any()


@settings(max_examples=40, deadline=None)
@given(digests, shares, etas, st.lists(any_score, min_size=1, max_size=200))
def test_without_the_cap_the_share_is_kept_on_any_sequence_whatever(digest, share, eta, scores):
    above_nothing = np.maximum(scores, 1e-9)  # a score of 0 is above no threshold
    assert within(follow(Pacer(digest, share, eta, capped=False), above_nothing), share, eta)


@settings(max_examples=40, deadline=None)
@given(shares, etas, st.booleans())
def test_an_adversary_who_knows_the_threshold_gains_nothing(share, eta, greedy):
    """Every score lies just above the threshold, or just at it, whichever hurts."""
    pacer, pace, sent = Pacer(WORTHY, share, eta), Pace(), []
    for _ in range(300):
        limit = pacer.threshold(pace)
        score = min(1.0, nextafter(limit, 2)) if greedy else max(limit, nextafter(0.5, 1))
        sent.append(score > limit)
        pace = pacer.decided(pace, sent=sent[-1])
    assert within(sent, share, eta)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize(
    "scores",
    [
        np.full(3000, 0.7),
        np.full(3000, 0.5 + 1e-9),
        np.ones(3000),
        np.linspace(0.51, 0.99, 3000),
        np.linspace(0.99, 0.51, 3000),
        np.tile([0.51, 0.99], 1500),
        np.repeat([0.51, 0.99, 0.51], 1000),
    ],
    ids=["constant", "least", "greatest", "rising", "falling", "alternating", "jumping"],
)
def test_the_bound_holds_on_classic_adversaries(share, scores):
    assert within(follow(Pacer(WORTHY, share), scores), share, ETA)


@given(digests, shares, st.booleans())
def test_it_starts_at_the_quantile(digest, share, capped):
    pacer = Pacer(digest, share, capped=capped)
    assert pacer.threshold(Pace()) == threshold(digest, share, capped=capped)


@given(digests, st.floats(-200, 200), any_score)
def test_share_zero_sends_nothing_whatever_the_pace_was_before(digest, ahead, score):
    assert not score > Pacer(digest, 0.0).threshold(Pace(ahead))


def test_hundreds_of_easy_prompts_earn_no_burst():
    """What the edge draws as well cannot be sent, so waiting for it to end must not pay off."""
    digest = np.linspace(0.3, 0.7, 200).tolist()
    sent = follow(Pacer(digest, 0.3), np.concatenate([np.full(1000, 0.4), np.full(100, 0.65)]))
    assert sent[1000:].sum() <= 0.3 * 100 + 0.5 / ETA + 2


def test_prompts_sorted_by_difficulty_keep_their_share_where_the_fixed_quantile_does_not():
    generator = np.random.default_rng(0)
    digest, share = score_digest(generator.beta(2, 3, 2000) * 0.4 + 0.5), 0.3
    easy_to_hard = np.sort(generator.beta(2, 3, 2000) * 0.4 + 0.5)
    for prompts in (easy_to_hard, easy_to_hard[::-1]):
        paced = follow(Pacer(digest, share), prompts)
        fixed = prompts > threshold(digest, share)
        windows = [slice(start, start + 500) for start in range(500, 1501)]
        paced_errors = [abs(paced[window].mean() - share) for window in windows]
        fixed_errors = [abs(fixed[window].mean() - share) for window in windows]
        print(f"worst window: paced {max(paced_errors):.3f}, fixed {max(fixed_errors):.3f}")
        assert max(paced_errors) <= 0.02
        assert max(fixed_errors) >= 0.29


def test_while_the_cloud_is_down_nothing_accumulates():
    pacer = Pacer(WORTHY, 0.3)
    generator = np.random.default_rng(1)
    pace = Pace()
    for score in generator.uniform(0.5, 0.9, 200):
        sent = score > pacer.threshold(pace)
        pace = pacer.decided(pace, sent=sent)
        pace = pace.answered() if sent else pace
    before = pace
    for score in generator.uniform(0.5, 0.9, 2000):
        sent = score > pacer.threshold(pace)
        pace = pacer.decided(pace, sent=sent)
        if sent:
            pace = pace.failed(counted=True)
            assert pace.ahead == pytest.approx(before.ahead + before.credit)
    # And its return is met by no burst: the next hundred get their share, within the usual noise.
    assert follow(pacer, generator.uniform(0.5, 0.9, 100), pace).sum() <= 0.3 * 100 + 5


def test_a_fall_of_difficulty_during_an_outage_does_not_stop_the_pacer_for_good():
    """A threshold that waited for the cloud to answer would never ask it again."""
    pacer, pace, asked = Pacer(WORTHY, 0.3), Pace(), 0
    for _ in range(1000):
        sent = pacer.threshold(pace) < 0.51
        pace = pacer.decided(pace, sent=sent)
        if sent:
            asked += 1
            pace = pace.failed(counted=True)
    assert asked >= 10
