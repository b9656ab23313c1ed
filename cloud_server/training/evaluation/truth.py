"""What was measured of both models' pictures, as the numbers that a way of routing is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cloud_server.training.labels import Labels
from edge_agent.routing.pareto import dataset_gaps, fit_gamma, prs, quality_distance

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Case:
    """What is evaluated on: labels, metric weights (k,), names of the two models, nouns (N,).

    `judge` (N,) is what the cloud's picture of every prompt gains by a judge of another kind, and
    `judge_pictures` (N, seeds), where known, what the cloud's gain on average over each of the
    edge's.
    """

    labels: Labels
    weights: Floats
    models: tuple[str, str]
    nouns: Floats
    counted: str
    judge: Floats | None = None
    judge_pictures: Floats | None = None


@dataclass(frozen=True)
class Truth:
    """Qualities `edge` and `cloud` (N, k), averaged over seeds, metric weights (k,) of sum 1.

    `gaps` (k,) is the unit of each metric: the distance of the models' means, and at least a floor.
    `gamma` is that of PRS, None for the one that fits these qualities.
    """

    edge: Floats
    cloud: Floats
    weights: Floats
    gaps: Floats
    gamma: float | None = None

    @classmethod
    def of(cls, labels: Labels, weights: Floats, rows: Rows) -> Truth:
        """Return the truth of some prompts, in units of their own gaps."""
        edge, cloud = labels.mean[:, rows]
        return cls(edge, cloud, weights, dataset_gaps(edge.mean(0), cloud.mean(0)))

    @property
    def metric_gain(self) -> Floats:
        """What the cloud's picture gains on each metric, in gaps, (N, k)."""
        return (self.cloud - self.edge) / self.gaps

    @property
    def gain(self) -> Floats:
        """What the cloud's picture adds to the relative improvement Delta P, (N,).

        Delta P = sum_i w_i (q_i(route) - q_i(edge)) / |q_i(cloud) - q_i(edge)|, deduced from the
        paper's table: sending everything scores 1 less twice the weight of every metric that the
        cloud is worse on, and good routing can score more than that.
        """
        return self.metric_gain @ self.weights

    @property
    def plain_gain(self) -> Floats:
        """What the cloud's picture adds to the weighted mean of the qualities, (N,)."""
        return (self.cloud - self.edge) @ self.weights

    @cached_property
    def prs(self) -> Floats:
        """The true PRS (N,)."""
        means = self.edge.mean(0), self.cloud.mean(0)
        gamma = self.gamma or fit_gamma(self.edge, self.cloud, *means)
        return prs(quality_distance(self.edge, self.cloud, *means, gamma), self.weights)

    @property
    def cloud_wins(self) -> Floats:
        """1 where the true PRS prefers the cloud, 0 where the edge, 1/2 where neither, (N,)."""
        return 0.5 - 0.5 * np.sign(np.round(self.prs - 0.5, 9))

    @property
    def dominated(self) -> tuple[Floats, Floats]:
        """1 where the edge's picture is Pareto-dominated, and where the cloud's is, (N,) each."""
        better = (self.cloud - self.edge) * np.where(self.weights > 0, 1.0, 0.0)
        some = (better != 0).any(1)
        edge, cloud = some & (better >= 0).all(1), some & (better <= 0).all(1)
        return edge.astype(np.float64), cloud.astype(np.float64)


def halves(labels: Labels, weights: Floats, rows: Rows) -> list[tuple[Truth, Truth]]:
    """Return every way to choose by half of the seeds and score by the others, both in turn.

    Both are in the units of all seeds. Of an odd number of seeds the chooser has one fewer.
    """
    seeds = set(range(len(labels.seeds)))
    unit = Truth.of(labels, weights, rows).gaps
    pairs = []
    for chosen in combinations(sorted(seeds), len(seeds) // 2):
        if chosen:
            half, other = (
                labels.q[:, rows][:, :, sorted(part)].mean(2)
                for part in (chosen, seeds.difference(chosen))
            )
            pairs.append(
                (Truth(half[0], half[1], weights, unit), Truth(other[0], other[1], weights, unit))
            )
    return pairs


def reliability(labels: Labels, weights: Floats, rows: Rows) -> float | None:
    """Return how far the gain is signal: the correlation between halves of the seeds.

    It is stepped up to all seeds by Spearman and Brown, and averaged over the ways to halve; None
    with a single seed, of which nothing can be said.
    """
    found = []
    for one, other in halves(labels, weights, rows):
        if one.gain.std() > 0 and other.gain.std() > 0:
            r = float(np.corrcoef(one.gain, other.gain)[0, 1])
            found.append(2 * r / (1 + r) if r > -0.5 else r)
    return float(np.mean(found)) if found else None
