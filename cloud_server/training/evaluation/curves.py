"""Cost-quality curves and what is read from them: exact, by a full sort, ties by their mean.

Of n prompts, sorted by score with those for the cloud first, a share rho is sent. What that gains,

    Q(rho) - Q(0) = (1/n) * sum of gain_i over the prompts sent,   gain_i = cloud_i - edge_i,

is the uplift (Qini) curve of Radcliffe 2007: routing ranks prompts by the effect of a treatment.
Prompts of equal score are sent in equal parts, which makes the curve straight among them: a router
that says the same of every prompt gives the straight line of random routing, analytically.

From it, with w_i = 1 - (rank_i - 1/2) / n and the mean rank where scores tie:

    gain area     G    = area between curve and straight line = Cov(gain, w), in units of quality
    APGR               = area / Q(1) = 1/2 + G / mean(gain)        (RouteLLM, arXiv 2406.18665)
    CPT(x)             = least rho at which the curve first reaches x; "never" is an answer

Everything takes resamples of the prompts as counts, so that a bootstrap is one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

NEVER = np.inf
TINY = 1e-9  # a mean gain of rounding alone


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of a curve, a row a resample: `share` (B, P) of prompts sent, `gain` (B, P) over edge.

    The first point is (0, 0), the last (1, mean gain of all prompts).
    """

    share: Floats
    gain: Floats

    @property
    def total(self) -> Floats:
        """The mean gain (B,) of sending everything."""
        return self.gain[:, -1]

    def area(self) -> Floats:
        """Return the area (B,) under the curve."""
        return np.asarray(np.trapezoid(self.gain, self.share, axis=1))

    def gain_area(self) -> Floats:
        """Return the area (B,) between the curve and that of random routing, G."""
        return self.area() - self.total / 2

    def apgr(self) -> Floats:
        """Return the average performance gap recovered (B,), NaN where the cloud is no better.

        There is no gap then; `gain_area` is sound everywhere.
        """
        better = self.total > TINY
        return np.divide(self.area(), self.total, out=np.full(len(better), np.nan), where=better)

    def at(self, share: float) -> Floats:
        """Return the gain (B,) when this share of prompts is sent; ValueError outside 0..1."""
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"a share of prompts lies between 0 and 1, not at {share}")
        # The first point at or beyond the share; share 0 needs one to its left as well.
        right = np.maximum((self.share < share).sum(1), 1)
        return self._between(self.share, self.gain, right, share)

    def first(self, level: ArrayLike) -> Floats:
        """Return the least share (B,) at which the gain reaches `level` (B,), else NEVER.

        It is the first crossing of the curve itself, which may dip again behind it.
        """
        levels = np.broadcast_to(np.asarray(level, np.float64), len(self.gain))
        reached = self.gain >= levels[:, None]
        right = np.maximum(reached.argmax(1), 1)
        crossing = self._between(self.gain, self.share, right, levels)
        crossing = np.where(reached[:, 0], 0.0, crossing)
        return np.where(reached.any(1), crossing, NEVER)

    @staticmethod
    def _between(x: Floats, y: Floats, right: NDArray[np.intp], at: ArrayLike) -> Floats:
        """Interpolate y at x = `at` (B,) between point `right` (B,) and the one before."""
        rows = np.arange(len(x))
        x0, x1, y0, y1 = x[rows, right - 1], x[rows, right], y[rows, right - 1], y[rows, right]
        rise = x1 - x0
        part = np.divide(np.asarray(at) - x0, rise, out=np.zeros(len(x)), where=rise != 0)
        return np.asarray(y0 + part * (y1 - y0))


class Ranking:
    """Prompts in the order of their scores (N,), highest first, in every resample.

    `counts` (B, N) says how often each prompt is in each resample; by default once, in one row.
    """

    def __init__(self, scores: ArrayLike, counts: Floats | None = None) -> None:
        values = np.asarray(scores, np.float64)
        if len(values) == 0 or not np.isfinite(values).all():
            raise ValueError("a ranking needs at least one score, and finite ones")
        self._order = np.argsort(-values, kind="stable")
        self._groups = np.flatnonzero(np.diff(values[self._order], prepend=np.inf))
        counts = np.ones((1, len(values))) if counts is None else counts
        self._counts = counts[:, self._order]
        self._n = counts.sum(1, keepdims=True)
        self._share = self._accumulated(self._counts)

    def curve(self, gains: ArrayLike) -> Curve:
        """Return the curve of gains (N,)."""
        return Curve(self._share, self._accumulated(self._counts * np.asarray(gains)[self._order]))

    def _accumulated(self, values: Floats) -> Floats:
        by_score = np.add.reduceat(values, self._groups, axis=1)
        total = np.cumsum(by_score, axis=1) / self._n
        return np.concatenate([np.zeros((len(total), 1)), total], axis=1)


def percentiles(scores: ArrayLike) -> Floats:
    """Return the mid-rank of every score (N,) in 0..1, ties by their mean.

    What different trainings say of different prompts is comparable in these, not in scores.
    """
    values = np.asarray(scores, np.float64)
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, side="left")
    upto = np.searchsorted(ordered, values, side="right")
    return np.asarray((below + upto) / 2 / len(values), np.float64)
