"""The router: a prompt in, a decision with its reason out (RouteT2I, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Metric, RouterSpec
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
        self,
        text_encoder: Encoder,
        predictor: Session,
        spec: RouterSpec,
        share: float,
        *,
        capped: bool = True,
    ) -> None:
        self._text_encoder = text_encoder
        self._predictor = predictor
        self._metrics = spec.metrics
        self.share = share
        self.threshold = threshold(spec.score_digest, share, capped=capped)

    def decide(self, prompt: str) -> tuple[Decision, Encoded]:
        """Return where a prompt goes, and its encoding for the edge to draw from."""
        encoded = self._text_encoder.encode(prompt)
        return self.judge(encoded), encoded

    def judge(self, encoded: Encoded) -> Decision:
        """Return where an encoded prompt goes; raises BundleError if the predictor is broken."""
        (d,) = self._predictor.run(words_of(encoded))
        distances = by_metric("router's predictor", d, self._metrics)
        return judged(distances, self._metrics, self.share, self.threshold, encoded.dropped)


def words_of(encoded: Encoded) -> dict[str, NDArray[Any]]:
    """Return `hidden` and `mask` of a prompt as far as its last word, as predictors read it.

    What follows changes nothing, but reading it takes most of the time.
    """
    words = slice(0, max(2, int(np.flatnonzero(encoded.mask).max(initial=0)) + 1))
    return {"hidden": encoded.hidden[:, words], "mask": encoded.mask[:, words]}


def by_metric(who: str, answer: NDArray[Any], metrics: Sequence[Metric]) -> dict[str, float]:
    """Return what a network said (1, k) by metric; raises BundleError unless it is k numbers."""
    if answer.shape != (1, len(metrics)) or not np.isfinite(answer).all():
        raise BundleError(
            f"the {who} answered {answer.tolist()} instead of {len(metrics)} numbers; {REBUILD}"
        )
    return {metric.name: float(one) for metric, one in zip(metrics, answer[0], strict=True)}


def judged(
    distances: Mapping[str, float],
    metrics: Sequence[Metric],
    share: float,
    limit: float,
    ignored_tokens: int,
) -> Decision:
    """Return what distances D_i by metric decide under a threshold."""
    prs = float(superiority(list(distances.values()), [metric.weight for metric in metrics]))
    decision = Decision(Route.EDGE, "", prs, 1.0 - prs, limit, share, distances, ignored_tokens)
    return under(limit, decision)


def under(limit: float, decision: Decision) -> Decision:
    """Return what the same judgement of a prompt decides under another threshold."""
    return replace(
        decision,
        route=Route.CLOUD if decision.score > limit else Route.EDGE,
        reason=explain(decision.score, limit, decision.share, decision.metrics),
        threshold=limit,
    )


def undecided(spec: RouterSpec, share: float, why: str, *, capped: bool = True) -> Decision:
    """Return the decision where nothing could be predicted: neither side is the better one."""
    reason = f"nothing could be decided, so the edge comes first: {why}"
    limit = threshold(spec.score_digest, share, capped=capped)
    return Decision(Route.EDGE, reason, 0.5, 0.5, limit, share, {})


def explain(score: float, limit: float, share: float, metrics: Mapping[str, float]) -> str:
    """Say in one sentence why a score leads where it leads; D_i below 1/2 favours the cloud."""
    if share == 0.0:
        return f"score {score:.3f}, but the cloud's share is 0: every prompt stays on the edge"
    if score > limit and score <= 0.5:
        return (
            f"score {score:.3f} above threshold {limit:.3f}: the edge is expected to be at least "
            f"as good, but without the cap the cloud gets its share of {share:.0%} all the same"
        )
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
