"""Choosing picture by picture: the edge draws first, and the cloud is asked where that falls short.

What the cloud's pictures gain over one of the edge's is counted from that picture's own qualities
to the mean of all the cloud's of the prompt: which one the cloud would have drawn nobody knows
before. Units are those of the prompts, so that numbers stand beside those of choosing by prompt.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from cloud_server.training.critic import fit_head, scored
from cloud_server.training.encoders import Features
from cloud_server.training.evaluation.curves import percentiles
from cloud_server.training.evaluation.measures import Comparison
from cloud_server.training.evaluation.splits import Plan
from cloud_server.training.evaluation.truth import Case, Truth
from cloud_server.training.labels import Labels
from cloud_server.training.quality import ALIGNMENT
from cloud_server.training.router import distances
from edge_agent.routing.pareto import dataset_gaps

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

BEFORE: Final = "ours, before drawing"
AFTER: Final = "ours, after a look at the edge's picture"


class Router(Protocol):
    """The router that a critic corrects."""

    @property
    def features(self) -> Features:
        """All prompts, as it reads them."""
        ...

    def distances(self, rows: Rows, seed: int) -> Floats:
        """Learn from the prompts `rows`; return D of every prompt (N, k)."""
        ...


def cascade(case: Case, plan: Plan, ours: Floats, router: Router, counts: Floats) -> dict[str, Any]:
    """Return what ways to choose by picture are worth, and what `ours` has more than each.

    `ours` (runs, judged prompts) are the `router`'s scores before drawing, the same for all
    pictures of a prompt; `counts` (B, judged prompts) are resamples.
    """
    labels, names = case.labels, case.labels.metrics
    prompt, seed, truth = pictures(labels, case.weights, plan.rows)
    quality = truth.edge / truth.gaps @ truth.weights
    ways = {
        ("before", BEFORE): ours[:, prompt],
        ("after", AFTER): after_a_look(router, labels, plan)[:, prompt, seed],
        ("quality", "the picture's quality alone"): -quality[None],
    }
    if ALIGNMENT in names:
        alignment = truth.edge[:, names.index(ALIGNMENT)]
        ways["alignment", f"{ALIGNMENT} of the picture alone"] = -alignment[None]
    ways["oracle", "oracle, naive"] = truth.gain[None]
    judge = None if case.judge_pictures is None else case.judge_pictures[plan.rows[prompt], seed]
    compared = Comparison(truth, names, counts, judge, prompt)
    for (key, _), scores in ways.items():
        compared.add(key, scores)
    return {
        "pictures": len(prompt),
        "rows": [compared.row(key, name, "before") for key, name in ways],
    }


def pictures(labels: Labels, weights: Floats, rows: Rows) -> tuple[Rows, Rows, Truth]:
    """Return every picture that the edge drew of the prompts in `rows`, and what is true of it.

    A picture is the place of its prompt in `rows` (M,) and the place of its seed (M,).
    """
    prompt, seed = np.nonzero(labels.drawn[0, rows])
    edge, cloud = labels.q[0, rows[prompt], seed], labels.mean[1, rows[prompt]]
    mu, gamma, _ = distances(labels, rows)
    return prompt, seed, Truth(edge, cloud, weights, dataset_gaps(*mu), gamma)


def after_a_look(router: Router, labels: Labels, plan: Plan) -> Floats:
    """Return what the critic of every run says of the judged pictures (runs, judged, seeds).

    It is in percentiles of a fold, NaN where the edge drew nothing.
    """
    features = router.features
    ranks = np.empty((len(plan.runs), len(plan.rows), len(labels.seeds)))
    for r, run in enumerate(plan.runs):
        for fold in run:
            mu, gamma, _ = distances(labels, fold.training)
            head = fit_head(features, labels, mu, gamma, fold.training)
            d = router.distances(fold.training, fold.seed)
            scores = scored(head, d, features, labels, fold.judged)
            drawn = np.isfinite(scores)
            scores[drawn] = percentiles(scores[drawn])
            ranks[r, np.searchsorted(plan.rows, fold.judged)] = scores
    return ranks
