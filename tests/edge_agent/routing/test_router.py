from __future__ import annotations

import numpy as np
import pytest

from edge_agent.bundle import Metric, RouterSpec
from edge_agent.errors import BundleError, ConfigError
from edge_agent.routing.encoder import Encoded
from edge_agent.routing.router import Router
from edge_agent.types import Route

NAMES = ("Detail", "Layout", "Color", "Realism")
SPEC = RouterSpec(
    metrics=tuple(Metric(name, f"{name}+", f"{name}-", 0.25, 0.5, 0.6) for name in NAMES),
    gamma=5.0,
    floor=1e-3,
    score_digest=tuple(np.linspace(0.3, 0.8, 200).tolist()),
    default_share=0.3,
    text_encoder="text_encoder",
    predictor="predictor",
)


class FixedEncoder:
    """Encodes any prompt as three tokens, of which the middle one is the prompt."""

    def encode(self, prompt):
        mask = np.array([[0, 1, 0]], np.float32)
        hidden = np.full((1, 3, 2), len(prompt), np.float32)
        return Encoded(np.array([[1, 7, 2]]), mask, hidden, hidden[:, 0])


class FixedPredictor:
    def __init__(self, *d):
        self.d = np.array([d], np.float32)
        self.feeds = None

    def run(self, feeds):
        self.feeds = feeds
        return [self.d]


def decide(*d, share=0.3, capped=True):
    router = Router(FixedEncoder(), FixedPredictor(*d), SPEC, share, capped=capped)
    return router.decide("a cat")[0]


def test_a_prompt_that_gains_much_goes_to_the_cloud_and_says_where_it_gains():
    decision = decide(0.2, 0.1, 0.6, 0.3)
    assert decision.route is Route.CLOUD
    assert decision.prs == pytest.approx(0.3)
    assert decision.score == pytest.approx(0.7)
    assert decision.score > decision.threshold
    assert decision.reason == (
        "score 0.700 above threshold 0.652: "
        "the cloud is expected to be better, most in Layout, Detail"
    )


def test_a_gain_too_small_for_the_share_stays_on_the_edge():
    decision = decide(0.4, 0.4, 0.4, 0.4)
    assert decision.route is Route.EDGE
    assert decision.reason.endswith("but not by enough for its share of 30%")


def test_a_prompt_that_the_edge_draws_better_stays_there_and_says_why():
    decision = decide(0.7, 0.4, 0.9, 0.6, share=1.0)
    assert decision.route is Route.EDGE
    assert decision.threshold == 0.5
    assert decision.reason.endswith(
        "the edge is expected to be at least as good, most in Color, Detail"
    )


def test_equal_quality_stays_on_the_edge_even_with_share_one():
    decision = decide(0.5, 0.5, 0.5, 0.5, share=1.0)
    assert decision.route is Route.EDGE
    assert decision.reason.endswith("the edge is expected to be at least as good")


def test_without_the_cap_the_share_is_filled_with_what_the_edge_draws_as_well():
    decision = decide(0.7, 0.4, 0.7, 0.6, share=0.9, capped=False)
    assert decision.route is Route.CLOUD
    assert decision.threshold < decision.score < 0.5
    assert decision.reason.endswith(
        "the edge is expected to be at least as good, "
        "but without the cap the cloud gets its share of 90% all the same"
    )
    assert decide(0.7, 0.4, 0.7, 0.6, share=0.3, capped=False).route is Route.EDGE
    assert decide(0.2, 0.1, 0.6, 0.3, capped=False) == decide(0.2, 0.1, 0.6, 0.3)


def test_share_zero_never_sends_anything():
    decision = decide(0.0, 0.0, 0.0, 0.0, share=0.0)
    assert decision.route is Route.EDGE
    assert "share is 0" in decision.reason


def test_the_decision_holds_every_metric_by_name():
    decision = decide(0.2, 0.1, 0.6, 0.3)
    assert list(decision.metrics) == list(NAMES)
    assert decision.metrics["Color"] == pytest.approx(0.6)
    assert decision.share == 0.3


def test_the_predictor_reads_hidden_states_and_mask_of_the_one_encoding():
    predictor = FixedPredictor(0.5, 0.5, 0.5, 0.5)
    _, encoded = Router(FixedEncoder(), predictor, SPEC, 0.3).decide("a cat")
    # What follows the last word of the prompt is not read.
    np.testing.assert_array_equal(predictor.feeds["hidden"], encoded.hidden[:, :2])
    np.testing.assert_array_equal(predictor.feeds["mask"], encoded.mask[:, :2])


@pytest.mark.parametrize("d", [(0.5,), (0.5, 0.5, 0.5, np.nan)])
def test_a_broken_predictor_is_reported_with_what_to_do(d):
    with pytest.raises(BundleError, match="python -m export"):
        decide(*d)


def test_a_share_outside_zero_to_one_is_refused_when_the_router_is_made():
    with pytest.raises(ConfigError, match=r"1\.5"):
        decide(0.5, 0.5, 0.5, 0.5, share=1.5)
