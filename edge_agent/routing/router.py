"""The router: a prompt in, a decision with its reason out (RouteT2I, section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from edge_agent.bundle import RouterSpec
from edge_agent.errors import REBUILD, BundleError
from edge_agent.routing.encoder import Encoded, Session
from edge_agent.routing.pareto import prs as superiority
from edge_agent.routing.policy import threshold
from edge_agent.types import Decision, Route


class Encoder(Protocol):
    """What the router needs of `TextEncoder`."""

    def encode(self, prompt: str) -> Encoded:
        """Run the text encoder on one prompt."""
        ...


class Router:
    """Sends at most a share of prompts to the cloud: those that gain most by it."""

    def __init__(
        self, text_encoder: Encoder, predictor: Session, spec: RouterSpec, share: float
    ) -> None:
        self._text_encoder = text_encoder
        self._predictor = predictor
        self._names = [metric.name for metric in spec.metrics]
        self._weights = np.array([metric.weight for metric in spec.metrics])
        self.share = share
        self.threshold = threshold(spec.score_digest, share)

    def decide(self, prompt: str) -> tuple[Decision, Encoded]:
        """Return where a prompt goes, and its encoding for the edge to draw from."""
        encoded = self._text_encoder.encode(prompt)
        return self.judge(encoded), encoded

    def judge(self, encoded: Encoded) -> Decision:
        """Return where an encoded prompt goes; raises BundleError if the predictor is broken."""
        # What follows the last word changes nothing, but reading it takes most of the time.
        words = slice(0, max(2, int(np.flatnonzero(encoded.mask).max(initial=0)) + 1))
        (d,) = self._predictor.run(
            {"hidden": encoded.hidden[:, words], "mask": encoded.mask[:, words]}
        )
        if d.shape != (1, len(self._names)) or not np.isfinite(d).all():
            raise BundleError(
                f"the router's predictor answered {d.tolist()} instead of {len(self._names)} "
                f"numbers; {REBUILD}"
            )
        distances = [float(value) for value in d[0]]
        prs = float(superiority(distances, self._weights))
        score = 1.0 - prs
        metrics = dict(zip(self._names, distances, strict=True))
        judged = Decision(
            Route.EDGE, "", prs, score, self.threshold, self.share, metrics, encoded.dropped
        )
        return self.under(self.threshold, judged)

    def under(self, threshold: float, decision: Decision) -> Decision:
        """Return what the same judgement of a prompt decides under another threshold."""
        return replace(
            decision,
            route=Route.CLOUD if decision.score > threshold else Route.EDGE,
            reason=explain(decision.score, threshold, self.share, decision.metrics),
            threshold=threshold,
        )


def undecided(spec: RouterSpec, share: float, why: str) -> Decision:
    """Return the decision where nothing could be predicted: neither side is the better one."""
    reason = f"nothing could be decided, so the edge comes first: {why}"
    limit = threshold(spec.score_digest, share)
    return Decision(Route.EDGE, reason, 0.5, 0.5, limit, share, {})


def explain(score: float, limit: float, share: float, metrics: Mapping[str, float]) -> str:
    """Say in one sentence why a score leads where it leads; D_i below 1/2 favours the cloud."""
    if share == 0.0:
        return f"score {score:.3f}, but the cloud's share is 0: every prompt stays on the edge"
    if score > limit:
        best = sorted((d, name) for name, d in metrics.items() if d < 0.5)
        names = ", ".join(name for _, name in best[:2])
        return (
            f"score {score:.3f} above threshold {limit:.3f}: "
            f"the cloud is expected to be better, most in {names}"
        )
    told = f"score {score:.3f} not above threshold {limit:.3f}"
    if score > 0.5:
        return (
            f"{told}: the cloud is expected to be better, "
            f"but not by enough for its share of {share:.0%}"
        )
    best = sorted((-d, name) for name, d in metrics.items() if d > 0.5)
    names = ", ".join(name for _, name in best[:2])
    where = f", most in {names}" if names else ""
    return f"{told}: the edge is expected to be at least as good{where}"
