"""Learning to route: labels to mu, Gamma and D, and a predictor of D from prompts.

Three predictors can be learnt: the paper's gated mixture of experts, a linear one, and a mixed one
in which both speak. Whether the mixed one suits the labels better than the linear one is found out
by cross-validation inside the training prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server.errors import DataError
from cloud_server.training.encoders import Features
from cloud_server.training.gated import fit_gated
from cloud_server.training.labels import Labels
from cloud_server.training.linear import fit_columns
from cloud_server.training.loop import Budget
from cloud_server.training.predictor import (
    AnyPredictor,
    LinearPredictor,
    MixedPredictor,
    Predictor,
    PredictorConfig,
    pooled,
)
from edge_agent.routing.pareto import dataset_gaps, fit_gamma, prs, quality_distance

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

BATCH = 256
LEAST_PROMPTS = 10
INNER_FOLDS = 5
MEMBERS = 3  # gated networks in a mixed predictor


@dataclass(frozen=True, slots=True)
class Settings:
    """Which predictor, auto being linear or mixed, and the sizes of the gated one.

    The last three each take one idea of the paper away from the gated one.
    """

    predictor: str = "auto"
    hidden: int = 192
    low_rank: int = 32
    top_k: int = 8
    dropout: float = 0.1
    single_gate: bool = False
    all_tokens: bool = False
    single_metric: bool = False

    @property
    def sizes(self) -> dict[str, Any]:
        """What goes into a PredictorConfig."""
        return {key: value for key, value in asdict(self).items() if key != "predictor"}


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """A trained predictor, and mu (2, k), Gamma and D (N, k) of the labels it was trained on."""

    model: AnyPredictor
    mu: Floats
    gamma: float
    d: Floats
    device: str

    @torch.inference_mode()
    def predict(self, features: Features) -> Floats:
        """Return predicted D (N, k)."""
        batches = zip(features.hidden.split(BATCH), features.mask.split(BATCH), strict=True)
        model = self.model.to(self.device).eval()
        d = [model(hidden.to(self.device), mask.to(self.device)).cpu() for hidden, mask in batches]
        return torch.cat(d).double().numpy()


def learn(
    features: Features,
    labels: Labels,
    weights: Floats,
    training: Rows,
    seed: int,
    *,
    settings: Settings = Settings(),
    work: Path,
    budget: Budget,
    device: str,
    related: Floats | None = None,
) -> Learned:
    """Learn to predict D from the labels of the prompts in `training`, rows of all of them.

    `weights` (k,) are the metrics' in PRS. `related` (N, m), NaN where unknown, are qualities of
    other models or metrics on the same prompts, which the linear predictor learns with.
    `budget` bounds all gated networks together, each getting its part of the minutes. Raises
    DataError for labels that nothing can be learnt from.
    """
    check(labels)
    mu, gamma, d = distances(labels, training)
    kind = settings.predictor
    trainings = {"auto": (INNER_FOLDS + 1) * MEMBERS, "mixed": MEMBERS}.get(kind, 1)
    if budget.minutes is not None:
        budget = replace(budget, minutes=budget.minutes / trainings)

    def gated(rows: Rows, seed: int) -> Predictor:
        return fit_gated(features, d, weights, rows, seed, sizes=settings.sizes, work=work,
                         budget=budget, device=device)  # fmt: skip

    def fit(kind: str, rows: Rows) -> Learned:
        if kind == "gated":
            return Learned(gated(rows, seed), mu, gamma, d, device)
        linear = _fit_linear(features, labels, mu, gamma, rows, related)
        if kind == "linear":
            return Learned(linear, mu, gamma, d, device)
        members = [gated(rows, seed * MEMBERS + i) for i in range(MEMBERS)]
        return Learned(_mixed(members, linear), mu, gamma, d, device)

    if kind == "auto":
        folds = np.array_split(np.random.default_rng(seed).permutation(training), INNER_FOLDS)
        gains = {
            kind: _gains(fit, kind, features, d, weights, folds) for kind in ("linear", "mixed")
        }
        more = gains["mixed"] - gains["linear"]
        # The larger one has to be better by more than chance.
        kind = "mixed" if more.mean() > more.std() / len(more) ** 0.5 else "linear"
    return fit(kind, training)


def _gains(
    fit: Callable[[str, Rows], Learned],
    kind: str,
    features: Features,
    d: Floats,
    weights: Floats,
    folds: list[Rows],
) -> Floats:
    """Return what each prompt adds to the area gained over random routing, out of fold.

    The area is Cov(1 - PRS, rank of the predicted score), the Qini area of a ranking by uplift.
    """
    gains = []
    for held_out in folds:
        rows = np.concatenate([fold for fold in folds if fold is not held_out])
        predicted = prs(fit(kind, rows).predict(features.some(held_out)), weights)
        true = prs(d[held_out], weights)
        rank = np.searchsorted(np.sort(predicted), predicted, "left") + np.searchsorted(
            np.sort(predicted), predicted, "right"
        )  # ties get their mean rank
        gains.append((true - true.mean()) * (rank / (2 * len(rank)) - 0.5))
    return np.concatenate(gains)


def distances(labels: Labels, training: Rows) -> tuple[Floats, float, Floats]:
    """Return mu (2, k) and Gamma of the training prompts, and D (N, k) of all.

    Qualities are averaged over seeds first: D of an average is less noisy than an average of D.
    """
    q_edge, q_cloud = labels.mean
    mu_edge, mu_cloud = q_edge[training].mean(0), q_cloud[training].mean(0)
    gamma = fit_gamma(q_edge[training], q_cloud[training], mu_edge, mu_cloud)
    d = quality_distance(q_edge, q_cloud, mu_edge, mu_cloud, gamma)
    return np.stack([mu_edge, mu_cloud]), gamma, d


def _mixed(members: Sequence[Predictor], linear: LinearPredictor) -> MixedPredictor:
    gated = Predictor.joined(members)
    model = MixedPredictor(replace(gated.config, kind="mixed"))
    model.gated.load_state_dict(gated.state_dict())
    model.linear.load_state_dict(linear.state_dict())
    return model.eval()


def _fit_linear(
    features: Features,
    labels: Labels,
    mu: Floats,
    gamma: float,
    training: Rows,
    related: Floats | None,
) -> LinearPredictor:
    """Put predicted gaps into the formula of D: before its sigmoid that is linear too.

    What a prompt does not tell of a gap pulls the expected D towards 1/2: for a Gaussian rest of
    variance v the sigmoid of x / sqrt(1 + pi v / 8) is close to it (MacKay 1992, equation 10).
    """
    q_edge, q_cloud = labels.mean
    count = q_edge.shape[1]
    columns = np.concatenate([q_edge, q_cloud, *([] if related is None else [related])], axis=1)
    inputs = pooled(features.hidden[training], features.mask[training]).double().numpy()
    fit = fit_columns(inputs, columns[training])
    scale = gamma * dataset_gaps(*mu)
    config = PredictorConfig(features.hidden.shape[-1], count, kind="linear")
    model = LinearPredictor(config)
    gap_weight = (fit.weight[:, :count] - fit.weight[:, count : 2 * count]) / scale
    gap_bias = (fit.bias[:count] - fit.bias[count : 2 * count]) / scale
    rest = (q_edge - q_cloud)[training] / scale - inputs @ gap_weight - gap_bias
    pull = 1.0 / np.sqrt(1.0 + np.pi * rest.var(0) / 8.0)
    model.load_state_dict({
        "weight": torch.from_numpy((gap_weight * pull).T).float(),
        "bias": torch.from_numpy(gap_bias * pull).float(),
    })  # fmt: skip
    return model.eval()


def check(labels: Labels) -> None:
    """Raise DataError where nothing can be learnt from labels, and say why."""
    prompts = labels.q.shape[1]
    if prompts < LEAST_PROMPTS:
        raise DataError(
            f"there are labels of {prompts} prompt{'s' * (prompts != 1)} only, and training needs "
            f"{LEAST_PROMPTS} at least, better hundreds; label more prompts"
        )
    bad = ~np.isfinite(labels.q)
    bad &= (labels.drawn | ~labels.drawn.any(2, keepdims=True))[..., None]
    if bad.any():
        model, prompt, _, metric = np.argwhere(bad)[0]
        raise DataError(
            f"the quality of the {('edge', 'cloud')[model]}'s picture of "
            f"{labels.prompts[prompt]!r} on {labels.metrics[metric]} is not a number; label it "
            "again or leave the prompt out"
        )
    for name, q in zip(labels.metrics, np.moveaxis(labels.q, -1, 0), strict=True):
        if (low := np.nanmin(q)) < 0 or (high := np.nanmax(q)) > 1:
            worst = low if low < 0 else high
            raise DataError(
                f"the metric {name} has the value {worst:g}, but qualities lie between 0 and 1; "
                "scale it first"
            )
    labels.check_trainable()
