"""Our router as one of the ways to choose: the network learnt from the training prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloud_server.training.labels import Labels
from cloud_server.training.loop import Budget
from cloud_server.training.router import Features, distances, fit_predictor, predict
from edge_agent.routing.pareto import prs

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """The routing network of one setting, trained anew for every fold."""

    key: str
    name: str
    features: Features
    labels: Labels
    weights: Floats
    work: Path
    budget: Budget
    device: str
    learns: bool = True

    def fit(self, rows: Rows, seed: int) -> Floats:
        """Return 1 - prs, predicted for every prompt (N,)."""
        _, _, d = distances(self.labels, rows)
        model = fit_predictor(
            self.features,
            d,
            self.weights,
            rows,
            self.labels.digest,
            self.work,
            self.budget,
            seed,
            self.device,
        )
        return 1.0 - prs(predict(model, self.features, self.device), self.weights)


def single_score(labels: Labels, weights: Floats) -> Labels:
    """Return labels with one metric only, the weighted mean of all: the paper's single score."""
    mean = (labels.q @ weights)[..., None]
    return Labels(mean, labels.prompts, labels.seeds, ("mean",), f"{labels.digest}-mean")
