"""The whole evaluation as plain data: what `evaluate-router` writes as JSON and as a page.

Every way to choose is trained on the training prompts of every fold and judged on the others.
What its trainings say is compared in percentiles within a fold, as a device would: its threshold
is a quantile of the scores of its own router. Intervals resample prompts, 2,000 times, the same
for every way, so that differences are paired; numbers of several trainings are averaged first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cloud_server.training.evaluation import details
from cloud_server.training.evaluation.baselines import Method
from cloud_server.training.evaluation.cascade import AFTER, Router, cascade
from cloud_server.training.evaluation.curves import percentiles
from cloud_server.training.evaluation.measures import (
    GRID,
    Bench,
    Comparison,
    Resampled,
    average_curves,
    estimates,
    mean,
)
from cloud_server.training.evaluation.splits import Plan
from cloud_server.training.evaluation.truth import Case, Truth, halves, reliability
from cloud_server.training.evaluation.verdict import verdict
from cloud_server.training.intervals import RESAMPLES, resamples

Floats = NDArray[np.float64]
Report = dict[str, Any]
"""What JSON can hold; an estimate is {"mean", "low", "high", "n"} with null for none."""

OURS: Final = "ours"


@dataclass(frozen=True, slots=True)
class Trained:
    """Scores of every run, (runs, judged prompts): as they came, and as percentiles of a fold."""

    raw: Floats
    ranks: Floats


def evaluate(
    case: Case,
    plan: Plan,
    methods: Sequence[Method],
    ablations: Sequence[Method] = (),
    *,
    router: Router | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Judge `methods`, among which one has the key "ours", and `ablations` against their first.

    Of "ours" as a `router` a critic is trained and judged too, on labels by a CLIP: what
    people rated, a device cannot measure.
    """
    truth = Truth.of(case.labels, case.weights, plan.rows)
    judge = None if case.judge is None else case.judge[plan.rows]
    counts = resamples(len(plan.rows), seed)
    names = case.labels.metrics
    compared = Comparison(truth, names, counts, judge)

    trained = {}
    for method in (*methods, *ablations):
        progress(method.name)
        trained[method.key] = scores = train(method, plan)
        compared.add(method.key, scores.ranks)
    ours = trained[OURS]
    after = None
    if router is not None and case.labels.origin.get("scorer"):
        progress(AFTER)
        after = cascade(case, plan, ours.ranks, router, counts)
    predicted = 1.0 - ours.raw.mean(0)
    sent = ours.ranks[0] > 0.5
    report: Report = {
        "plan": {
            "description": plan.description,
            "prompts": len(case.labels.prompts),
            "judged": len(plan.rows),
            "seeds": len(case.labels.seeds),
            "runs": len(plan.runs),
            "resamples": RESAMPLES,
            "seed": seed,
        },
        "labels": {"digest": case.labels.digest, "metrics": list(names)},
        "pair": {
            "edge_model": case.models[0],
            "cloud_model": case.models[1],
            "reliability": reliability(case.labels, case.weights, plan.rows),
            **details.the_pair(truth, names, seed),
        },
        "methods": [compared.row(m.key, m.name, OURS) for m in methods],
        "ablations": [compared.row(m.key, m.name, ablations[0].key) for m in ablations],
        "oracles": _oracles(case, plan, truth, judge, counts),
        "grid": list(GRID),
        "band": compared.band(ours.ranks),
        "cascade": after,
        "nouns": {
            "counted": case.counted,
            "rows": details.by_nouns(
                Truth.of(case.labels, case.weights, np.arange(len(case.nouns))), case.nouns, seed
            ),
        },
        "reliability": details.calibration(predicted, truth.prs, seed),
        "shares": details.shares(ours.raw[0], seed),
        "drift": details.drift(ours.raw[0], truth.gain, seed),
        "regrets": details.worst_regrets(
            truth, 1.0 - ours.raw[0], sent, case.labels.prompts, plan.rows
        ),
    }
    return report | {"verdict": verdict(report)}


def train(method: Method, plan: Plan) -> Trained:
    """Train a method in every run of a plan; what needs no training is asked once.

    A prompt that is left out pulls the mean of the others away from itself, and with it what is
    predicted of it. So raw scores of several folds stand by their distance from the mean score of
    the fold's training prompts, plus the mean of those.
    """
    if not method.learns:
        fold = plan.runs[0][0]
        known = method.fit(fold.training, fold.seed)[plan.rows][None]
        return Trained(known, percentiles(known[0])[None])
    raw, ranks = np.empty((2, len(plan.runs), len(plan.rows)))
    for r, run in enumerate(plan.runs):
        means = []
        for fold in run:
            scores = method.fit(fold.training, fold.seed)
            at = np.searchsorted(plan.rows, fold.judged)
            means.append(scores[fold.training].mean())
            raw[r, at] = scores[fold.judged] - means[-1]
            ranks[r, at] = percentiles(scores[fold.judged])
        raw[r] += np.mean(means)
    return Trained(raw, ranks)


def _oracles(
    case: Case, plan: Plan, truth: Truth, judge: Floats | None, counts: Floats
) -> list[Report]:
    """Return the oracle that chooses by the numbers it is judged by, and the split-half one.

    The first knows noise for truth and is too good; the second chooses by half of the seeds and is
    judged by the others, which makes it too poor. A perfect router lies between.
    """
    n, names = len(plan.rows), case.labels.metrics
    kinds = {
        ("oracle", "oracle, naive"): [(truth, truth)],
        ("split_oracle", "oracle, split-half"): halves(case.labels, case.weights, plan.rows),
    }
    rows = []
    for (key, name), pairs in kinds.items():
        found, again, curves = [], [], []
        for chooser, scored in pairs:
            one = Bench(scored, names, None, judge)
            found.append(one.measure(chooser.gain))
            curves.append(one.curves(chooser.gain))
            again.append(Resampled(scored, names, counts, judge).measure(chooser.gain))
        if pairs:
            numbers = estimates(mean(found), mean(again), n)
            rows.append(
                {
                    "key": key,
                    "name": name,
                    "numbers": numbers,
                    "curves": average_curves(curves),
                }
            )
    return rows
