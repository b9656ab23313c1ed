"""Other ways to choose between edge and cloud, all behind one door.

Those that learn see pooled embeddings of the prompts and the labels of their training prompts, and
choose their strength among those by cross-validation. They are linear or neighbours on purpose: at
some hundred labels a head on a frozen encoder is what the papers' fine-tuned BERTs come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsRegressor

from cloud_server.training.evaluation.truth import Truth
from cloud_server.training.labels import Labels

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

ALPHAS = np.geomspace(1e-2, 1e3, 11)  # of rows of mean length 1
NEIGHBOURS = (5, 10, 20, 40, 80)
INNER_FOLDS = 5


class Method(Protocol):
    """A way to choose: what it is called, and how it learns."""

    @property
    def key(self) -> str:
        """What it is called in JSON."""
        ...

    @property
    def name(self) -> str:
        """What it is called on the page."""
        ...

    @property
    def learns(self) -> bool:
        """Whether its scores depend on the training prompts."""
        ...

    def fit(self, rows: Rows, seed: int) -> Floats:
        """Learn from the prompts `rows`; return a score for every prompt (N,), high for cloud."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Scores that are known beforehand: the length of a prompt, or the same for all (random)."""

    key: str
    name: str
    scores: Floats
    learns: bool = False

    def fit(self, rows: Rows, seed: int) -> Floats:
        """Return the scores."""
        return self.scores


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """What the learning baselines learn from: labels, metric weights (k,), embeddings (N, d)."""

    labels: Labels
    weights: Floats
    embeddings: Floats

    def inputs(self, rows: Rows) -> Floats:
        """Return the embeddings of all prompts, those of `rows` of mean 0 and mean length 1."""
        centred = self.embeddings - self.embeddings[rows].mean(0)
        length = np.linalg.norm(centred[rows], axis=1).mean()
        return centred / length if length > 0 else centred

    def truth(self, rows: Rows) -> Truth:
        """Return what was measured of the training prompts."""
        return Truth.of(self.labels, self.weights, rows)


@dataclass(frozen=True, slots=True)
class Ridge:
    """Ridge regression of the relative gain."""

    material: Material
    key: str = "ridge"
    name: str = "ridge on pooled embeddings"
    learns: bool = True

    def fit(self, rows: Rows, seed: int) -> Floats:
        """Return the predicted gain."""
        return _ridge(self.material.inputs(rows), rows, self.material.truth(rows).gain)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The mean relative gain of the nearest training prompts, by cosine."""

    material: Material
    key: str = "knn"
    name: str = "kNN on pooled embeddings"
    learns: bool = True

    def fit(self, rows: Rows, seed: int) -> Floats:
        """Return the mean gain of the neighbours."""
        x, target = self.material.inputs(rows), self.material.truth(rows).gain
        fewest = len(rows) - -(-len(rows) // INNER_FOLDS)
        sizes = [k for k in NEIGHBOURS if k <= fewest] or [1]
        search = GridSearchCV(
            KNeighborsRegressor(metric="cosine"),
            {"n_neighbors": sizes},
            scoring="neg_mean_squared_error",
            cv=INNER_FOLDS,
        )
        return np.asarray(search.fit(x[rows], target).predict(x), np.float64)


@dataclass(frozen=True, slots=True)
class WinClassifier:
    """RouteLLM (arXiv 2406.18665): the probability that the cloud's picture is the better one."""

    material: Material
    key: str = "routellm"
    name: str = "RouteLLM-style classifier"
    learns: bool = True

    def fit(self, rows: Rows, seed: int) -> Floats:
        """Return the log-odds that the cloud wins; prompts without a winner are left out."""
        wins = self.material.truth(rows).cloud_wins
        decided = wins != 0.5
        return _logistic(self.material.inputs(rows), rows[decided], wins[decided] > 0.5)


@dataclass(frozen=True, slots=True)
class MarginClassifier:
    """Hybrid LLM (arXiv 2404.14618): the probability that the edge falls short by over a margin.

    As there, the margin is the one that parts the training prompts most evenly.
    """

    material: Material
    key: str = "hybrid"
    name: str = "Hybrid-LLM-style margin classifier"
    learns: bool = True

    def fit(self, rows: Rows, seed: int) -> Floats:
        """Return the log-odds that the edge is not good enough."""
        gain = self.material.truth(rows).gain
        margins = np.unique(gain)
        above = 1 - np.searchsorted(np.sort(gain), margins, side="right") / len(gain)
        margin = margins[np.abs(above - 0.5).argmin()]
        return _logistic(self.material.inputs(rows), rows, gain > margin)


@dataclass(frozen=True, slots=True)
class TwoRegressors:
    """ZOOTER (arXiv 2311.08692): the quality of each model predicted, the difference taken."""

    material: Material
    key: str = "zooter"
    name: str = "ZOOTER-style quality regressors"
    learns: bool = True

    def fit(self, rows: Rows, seed: int) -> Floats:
        """Return the predicted quality of the cloud less that of the edge, in gaps."""
        truth, x = self.material.truth(rows), self.material.inputs(rows)
        cloud, edge = (
            _ridge(x, rows, (q / truth.gaps) @ truth.weights) for q in (truth.cloud, truth.edge)
        )
        return cloud - edge


def learned_baselines(material: Material) -> Sequence[Method]:
    """Return all that learn, except the network itself."""
    kinds = (Neighbours, Ridge, WinClassifier, MarginClassifier, TwoRegressors)
    return [kind(material) for kind in kinds]


def _ridge(x: Floats, rows: Rows, target: Floats) -> Floats:
    """Regress with the strength that leaving one out prefers."""
    return np.asarray(RidgeCV(alphas=ALPHAS).fit(x[rows], target).predict(x), np.float64)


def _logistic(x: Floats, rows: Rows, yes: NDArray[np.bool_]) -> Floats:
    """Return log-odds (N,), constant where the training prompts leave nothing to tell apart."""
    fewest = min(int(yes.sum()), int((~yes).sum()))
    if fewest < 2:
        return np.zeros(len(x))
    model = LogisticRegressionCV(
        Cs=1 / ALPHAS[1::2],
        cv=min(INNER_FOLDS, fewest),
        l1_ratios=(0,),
        scoring="neg_log_loss",
        max_iter=1000,
        use_legacy_attributes=False,
    )
    return np.asarray(model.fit(x[rows], yes).decision_function(x), np.float64)
