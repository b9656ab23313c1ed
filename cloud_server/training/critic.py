"""The critic: how much better the cloud would be, once the edge's picture is there to be looked at.

Before drawing, both qualities in D_i = sigmoid((q_edge - q_cloud) / (Gamma gap_i)) are expectations
(RouteT2I, section 3). Of a finished picture the first is measured, by the CLIP that labelled, and
only the cloud's is left to predict: from the prompt, and from what that picture says of it. So
asking the large model only where the small one fell short is a cascade, as FrugalGPT's (Chen et al.
2023, arXiv 2305.05176) for text, judged by PRS like the router.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from cloud_server.training.encoders import Features
from cloud_server.training.labels import Labels
from cloud_server.training.predictor import pooled
from cloud_server.training.quality import ALIGNMENT, DISTRACTORS
from cloud_server.training.router import Learned, check
from cloud_server.training.weights import save_weights
from edge_agent.routing.pareto import dataset_gaps, prs, quality_distance
from edge_agent.routing.policy import score_digest

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

WEIGHTS = "critic.safetensors"
FOLDS = 5
RIDGES = np.geomspace(1e-3, 1e3, 13)
PROMPT = 3.0  # length of a prompt's inputs, where each quality of the picture has a spread of 1
BATCH = 1024


class CriticHead(nn.Module):
    """States (B, n, d), mask (B, n) and the edge's measured qualities (B, k) to D (B, k).

    The cloud's expected qualities are linear in `predictor.pooled` of the states and in those of
    the edge; `scale` (k,) is Gamma times the gap of the models' means.
    """

    def __init__(self, width: int, metrics: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(metrics, 2 * width + 1 + metrics))
        self.bias = nn.Parameter(torch.zeros(metrics))
        self.scale = nn.Parameter(torch.ones(metrics))

    def forward(self, hidden: Tensor, mask: Tensor, quality: Tensor) -> Tensor:
        return self.distances(pooled(hidden, mask), quality)

    def distances(self, prompts: Tensor, quality: Tensor) -> Tensor:
        """Return D (B, k) for pooled prompts (B, 2d + 1)."""
        cloud = F.linear(torch.cat([prompts, quality], 1), self.weight, self.bias)
        return ((quality - cloud) / self.scale).sigmoid()


@dataclass(frozen=True, slots=True, eq=False)
class Critic:
    """A trained head, quantiles of the scores it gives, and the labels' own CLIP and alignment.

    `others` are the prompts that alignment compares with on the device; None where the labels have
    no such metric, empty where it is the plain cosine.
    """

    head: CriticHead
    digest: list[float]
    clip: Mapping[str, Any]
    sharpness: float
    others: tuple[str, ...] | None

    @property
    def facts(self) -> dict[str, Any]:
        """What router.json says of it."""
        return {
            "clip": dict(self.clip),
            "sharpness": self.sharpness,
            "others": None if self.others is None else list(self.others),
            "score_digest": self.digest,
        }


def train_critic(
    features: Features, labels: Labels, learned: Learned, training: Rows, seed: int
) -> Critic | None:
    """Train on the pictures of the prompts in `training`, in the units of what was `learned`.

    None for labels that no CLIP made, such as ratings: nobody could measure the same on the device.
    """
    scorer = labels.origin.get("scorer")
    if not scorer:
        return None
    folds = np.array_split(np.random.default_rng(seed).permutation(training), FOLDS)
    scores = []
    for fold in folds:
        head = fit_head(features, labels, learned.mu, learned.gamma, np.setdiff1d(training, fold))
        found = scored(head, features, labels, fold)
        scores.append(found[np.isfinite(found)])
    others = _others(labels, scorer.get("alignment"), seed)
    return Critic(
        fit_head(features, labels, learned.mu, learned.gamma, training),
        score_digest(np.concatenate(scores)),
        {"name": scorer["clip"], "digest": scorer["digest"]},
        float((scorer.get("alignment") or {}).get("sharpness", 1.0)),
        others,
    )


def fit_head(
    features: Features, labels: Labels, mu: Floats, gamma: float, training: Rows
) -> CriticHead:
    """Fit a head to the prompts in `training`: a row a picture of the edge, ridge by leave-one-out.

    What is to be predicted is the cloud's mean over all its seeds of the prompt. `mu` (2, k) and
    `gamma` are as in `Learned`. Raises DataError for labels that nothing can be learnt from.
    """
    check(labels)
    prompts = _prompts(features)
    rows, edge = _pictures(labels, training)
    inputs = np.concatenate([prompts[rows], edge], axis=1)
    centre, spread = inputs.mean(0), inputs.std(0)
    spread[spread < 1e-9] = np.inf  # what never varies says nothing
    spread[: prompts.shape[1]] *= prompts.shape[1] ** 0.5 / PROMPT
    ridge = RidgeCV(alphas=RIDGES, alpha_per_target=edge.shape[1] > 1)
    ridge.fit((inputs - centre) / spread, labels.mean[1, rows])
    weight = np.atleast_2d(ridge.coef_) / spread
    head = CriticHead(features.hidden.shape[-1], edge.shape[1])
    head.load_state_dict({
        "weight": torch.from_numpy(weight).float(),
        "bias": torch.from_numpy(np.atleast_1d(ridge.intercept_) - weight @ centre).float(),
        "scale": torch.from_numpy(gamma * dataset_gaps(*mu)).float(),
    })  # fmt: skip
    return head.eval()


@torch.inference_mode()
def scored(head: CriticHead, features: Features, labels: Labels, rows: Rows) -> Floats:
    """Return 1 - prs (len(rows), seeds) of the edge's pictures, NaN where none was drawn."""
    scores = np.full((len(rows), len(labels.seeds)), np.nan)
    prompts = torch.from_numpy(_prompts(features)[rows]).float()
    for column in range(len(labels.seeds)):
        drawn = np.flatnonzero(labels.drawn[rows, column])
        quality = torch.from_numpy(labels.q[0, rows[drawn], column]).float()
        d = head.distances(prompts[drawn], quality).double().numpy()
        scores[drawn, column] = 1.0 - prs(d, labels.weights)
    return scores


def looked(
    head: CriticHead, features: Features, labels: Labels, learned: Learned, rows: Rows
) -> Floats:
    """Return PRS (M, 2) of the edge's pictures of prompts: predicted after a look, and true."""
    prompt, edge = _pictures(labels, rows)
    mu_edge, mu_cloud = learned.mu
    d = quality_distance(edge, labels.mean[1, prompt], mu_edge, mu_cloud, learned.gamma)
    predicted = 1.0 - scored(head, features, labels, rows)
    return np.stack([predicted[np.isfinite(predicted)], prs(d, labels.weights)], axis=1)


def save(head: CriticHead, folder: Path) -> None:
    """Write critic.safetensors."""
    weights = {name: weight.contiguous() for name, weight in head.state_dict().items()}
    save_weights(weights, folder / WEIGHTS)


def load(folder: Path) -> CriticHead:
    """Read what `save` wrote, ready to judge."""
    weights = load_file(folder / WEIGHTS)
    metrics, inputs = weights["weight"].shape
    head = CriticHead((inputs - 1 - metrics) // 2, metrics)
    head.load_state_dict(weights)
    return head.eval()


def _prompts(features: Features) -> Floats:
    """Return what a linear predictor reads of every prompt (N, 2d + 1)."""
    batches = zip(features.hidden.split(BATCH), features.mask.split(BATCH), strict=True)
    return torch.cat([pooled(*batch) for batch in batches]).double().numpy()


def _pictures(labels: Labels, rows: Rows) -> tuple[Rows, Floats]:
    """Return the prompt (M,) and the qualities (M, k) of every picture that the edge drew."""
    prompt, seed = np.nonzero(labels.drawn[rows])
    return rows[prompt], labels.q[0, rows[prompt], seed]


def _others(
    labels: Labels, alignment: Mapping[str, Any] | None, seed: int
) -> tuple[str, ...] | None:
    """Return the prompts that every picture is compared with on the device.

    Labelling drew others for every prompt; of so many prompts the mean is nearly the same.
    """
    if not alignment or ALIGNMENT not in labels.metrics:
        return None
    count = min(int(alignment.get("distractors", DISTRACTORS)), len(labels.prompts))
    chosen = np.random.default_rng(seed).choice(len(labels.prompts), count, replace=False)
    return tuple(labels.prompts[i] for i in np.sort(chosen))
