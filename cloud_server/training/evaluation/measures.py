"""Every number of a way to choose, on all judged prompts and on resamples of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cloud_server.training.evaluation.curves import NEVER, TINY, Curve, Ranking
from cloud_server.training.evaluation.truth import Truth
from cloud_server.training.intervals import Estimate, percentile

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Numbers = dict[str, Floats]

SHARES: Final = (10, 25, 40, 50, 80)  # % of prompts sent to the cloud
TARGETS: Final = (40, 50, 60)  # % of Delta P, as in the paper's table of savings
# What differences are taken of.
COMPARED: Final = (
    "apgr", "gain_area", "delta_p_25", "delta_p_40", "delta_p_50", "delta_p_80", "plain_50",
    "delta_w_40", "delta_w_50", "delta_w_80", "right_50", "judge_apgr", "judge_50",
)  # fmt: skip
RECOVERED: Final = (20, 50, 80, 95)  # % of the gap between the models, as RouteLLM's CPT
TOGETHER: Final = 100  # resamples
GRID: Final = tuple(i / 40 for i in range(41))  # shares at which curves are drawn


class Resampled:
    """As `Bench`, on many resamples (B, N), some at a time: what fits a cache is done sooner."""

    def __init__(
        self, truth: Truth, names: Sequence[str], counts: Floats, judge: Floats | None = None
    ) -> None:
        parts = np.array_split(counts, max(1, len(counts) // TOGETHER))
        self._benches = [Bench(truth, names, part, judge) for part in parts]

    def measure(self, scores: Floats) -> Numbers:
        """Return every number (B,) of routing by scores (N,)."""
        parts = [bench.measure(scores) for bench in self._benches]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def gains(self, scores: Floats) -> Floats:
        """Return the curve of Delta P at `GRID`, (grid, B)."""
        curves = [bench.gain_curve(scores) for bench in self._benches]
        return np.stack([np.concatenate([c.at(share) for c in curves]) for share in GRID])


class Bench:
    """Judges scores of the same prompts by the same truth, on the same resamples.

    `judge` (N,) is what the cloud's pictures gain by another judge, if there is one.
    """

    def __init__(
        self,
        truth: Truth,
        names: Sequence[str],
        counts: Floats | None = None,
        judge: Floats | None = None,
    ) -> None:
        self._gain, self._plain, self._judge = truth.gain, truth.plain_gain, judge
        self._metrics = dict(zip(names, truth.metric_gain.T, strict=True))
        self._wins, (self._edge_bad, self._cloud_bad) = truth.cloud_wins, truth.dominated
        self._counts = counts
        every = Ranking(np.zeros(len(self._gain)), counts)
        self._best = Ranking(self._gain, counts).curve(self._gain).gain_area()
        self._random = every.curve(self._gain)
        # Of w(rho) and of regretful choices, what they are at share 0.
        self._edge_wins = every.curve(1 - self._wins).total
        self._kept_bad = every.curve(self._edge_bad).total

    def measure(self, scores: Floats) -> Numbers:
        """Return every number (B,) of routing by scores (N,), with ties by their mean."""
        ranking = Ranking(scores, self._counts)
        gain, plain = ranking.curve(self._gain), ranking.curve(self._plain)
        found = _area("", gain) | _area("plain_", plain)
        found["efficiency"] = _ratio(found["gain_area"], self._best)  # of the best order, to 1
        found |= {f"delta_p_{p}": gain.at(p / 100) for p in SHARES}
        found |= {f"plain_{p}": plain.at(p / 100) for p in SHARES}
        found["over_cloud_50"] = found["delta_p_50"] - gain.total
        better = gain.total > TINY  # of a gap that is none, no part can be recovered
        for p in RECOVERED:
            found[f"cpt_{p}"] = np.where(better, gain.first(p / 100 * gain.total), np.nan)
        for p in TARGETS:
            calls, random = gain.first(p / 100), self._random.first(p / 100)
            found[f"calls_{p}"] = calls
            found[f"saved_{p}"] = _saved(calls, random)
        found |= self._choices(ranking)
        by_metric = {name: ranking.curve(values).at(0.5) for name, values in self._metrics.items()}
        found |= {f"metric_50 {name}": values for name, values in by_metric.items()}
        found["worst_metric_50"] = np.min(list(by_metric.values()), axis=0)
        if self._judge is not None:
            judged = ranking.curve(self._judge)
            found |= _area("judge_", judged)
            found |= {f"judge_{p}": judged.at(p / 100) for p in SHARES}
        return found

    def gain_curve(self, scores: Floats) -> Curve:
        """Return the curve of Delta P, a row a resample."""
        return Ranking(scores, self._counts).curve(self._gain)

    def curves(self, scores: Floats) -> dict[str, list[float]]:
        """Return the curves of Delta P and of what the judge finds at `GRID`, without resamples."""
        ranking = Ranking(scores)
        views = {"delta_p": self._gain, "plain": self._plain, "judge": self._judge}
        return {
            view: [float(ranking.curve(values).at(share)[0]) for share in GRID]
            for view, values in views.items()
            if values is not None
        }

    def _choices(self, ranking: Ranking) -> Numbers:
        """Return Delta w, and the share of choices whose other side is better on every metric.

        w(rho) is the share of prompts sent to the side that the true PRS prefers, and
        Delta w = w(rho) / w(rho) of random routing - 1, our reading of the paper.
        """
        wins = ranking.curve(2 * self._wins - 1)
        regret = ranking.curve(self._cloud_bad - self._edge_bad)
        found = {"regretful_50": self._kept_bad + regret.at(0.5)}
        for p in SHARES:
            chosen = self._edge_wins + wins.at(p / 100)
            random = self._edge_wins + p / 100 * wins.total
            found[f"right_{p}"] = chosen
            found[f"delta_w_{p}"] = _ratio(chosen - random, random)
        return found


class Comparison:
    """Ways to choose, by the same truth and the same resamples of prompts: counts (B, N).

    What is chosen may be several things of a prompt, `prompt` (M,) being the prompt of each; all
    things of a prompt are resampled together, as they are no independent evidence.
    """

    def __init__(
        self,
        truth: Truth,
        names: Sequence[str],
        counts: Floats,
        judge: Floats | None = None,
        prompt: Rows | None = None,
    ) -> None:
        repeated = counts if prompt is None else counts[:, prompt]
        self._point = Bench(truth, names, None, judge)
        self._again = Resampled(truth, names, repeated, judge)
        self._prompts = counts.shape[1]
        self._found: dict[str, list[Numbers]] = {}
        self._resampled: dict[str, Numbers] = {}
        self._curves: dict[str, dict[str, list[float]]] = {}

    def add(self, key: str, runs: Floats) -> None:
        """Measure a way to choose by its scores in every run, (runs, N) or (runs, M)."""
        self._found[key] = [self._point.measure(run) for run in runs]
        self._resampled[key] = mean([self._again.measure(run) for run in runs])
        self._curves[key] = average_curves([self._point.curves(run) for run in runs])

    def row(self, key: str, name: str, against: str) -> dict[str, Any]:
        """Return all that is said of one way, with what that with the key `against` has more."""
        n = self._prompts
        more = difference(mean(self._found[against]), mean(self._found[key]))
        again = difference(self._resampled[against], self._resampled[key])
        shown = [k for k in COMPARED if k in more]
        return {
            "key": key,
            "name": name,
            "numbers": estimates(mean(self._found[key]), self._resampled[key], n),
            "ours_more": estimates({k: more[k] for k in shown}, {k: again[k] for k in shown}, n),
            "runs": {
                k: [finite(float(run[k][0])) for run in self._found[key]]
                for k in ("apgr", "delta_p_50")
            },
            "curves": self._curves[key],
        }

    def band(self, runs: Floats) -> dict[str, list[float]]:
        """Return the interval of the curve of Delta P at `GRID`, of scores (runs, N)."""
        gains = np.mean([self._again.gains(run) for run in runs], axis=0)
        low, high = np.percentile(gains, (2.5, 97.5), axis=1)
        return {"low": low.tolist(), "high": high.tolist()}


def average_curves(curves: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Return the mean over runs of what `Bench.curves` gives."""
    return {
        view: [float(v) for v in np.mean([c[view] for c in curves], axis=0)] for view in curves[0]
    }


def _area(view: str, curve: Curve) -> Numbers:
    return {f"{view}apgr": curve.apgr(), f"{view}gain_area": curve.gain_area()}


def _saved(calls: Floats, random: Floats) -> Floats:
    """Return 1 - calls / random; 1 where random never gets there, and 0 where neither does."""
    with np.errstate(invalid="ignore"):
        saved = 1 - calls / random
    return np.where(np.isfinite(random), saved, np.isfinite(calls))


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.full(len(b), np.nan), where=b > 0)


def mean(runs: Sequence[Numbers]) -> Numbers:
    """Return the mean over runs of every number (B,)."""
    return {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]}


def estimates(found: Mapping[str, Floats], resampled: Mapping[str, Floats], n: int) -> Any:
    """Return every number of `found` (1,) with the interval of its resamples, as JSON can hold it.

    Of what is never reached, ends of intervals included, and of what is not defined, JSON has null.
    """
    return {
        key: plain(percentile(float(value[0]), resampled[key], n)) for key, value in found.items()
    }


def difference(ours: Numbers, theirs: Numbers) -> Numbers:
    """Return ours less theirs, number by number; NaN where neither is ever reached."""
    with np.errstate(invalid="ignore"):
        return {key: ours[key] - theirs[key] for key in ours}


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it."""
    return value if np.isfinite(value) else None


def plain(estimate: Estimate | None) -> dict[str, Any] | None:
    """Return an estimate as JSON can hold it."""
    if estimate is None:
        return None
    ends = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
    known = {name: finite(float(value)) for name, value in ends.items()}
    never = {"never": True} if abs(estimate.mean) == NEVER else {}
    return known | {"n": estimate.n} | never
