"""The critic: how much better the cloud would be, once the edge's picture is there to be looked at.

Of a finished picture the qualities q are measured, by the CLIP that labelled. How far they are from
what its prompt let expect corrects the router's D_i (RouteT2I, section 3) in their own units:

    D'_i = sigmoid(logit(D_i) + trust_i (q_i - E[q_i | prompt]) / (Gamma gap_i))

Asking the large model only where the small one fell short is a cascade, as FrugalGPT's (Chen et al.
2023, arXiv 2305.05176) for text.
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
from torch import Tensor, nn

from cloud_server.training.encoders import Features
from cloud_server.training.labels import Labels
from cloud_server.training.linear import fit_columns
from cloud_server.training.predictor import pooled
from cloud_server.training.quality import ALIGNMENT, DISTRACTORS
from cloud_server.training.router import Learned
from cloud_server.training.weights import save_weights
from edge_agent.routing.pareto import dataset_gaps, prs, quality_distance
from edge_agent.routing.policy import score_digest

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

WEIGHTS = "critic.safetensors"
# How far a picture's own luck counts, in its looks and in whether it shows its prompt. With 1 all
# that CLIP measures counts, also what another drawing would have by chance, and a judge that is not
# CLIP agrees less. On 700 captions of the starter pair, by which it was chosen, one picture each,
# learnt from others by a linear router; Delta P at half of the calls by CLIP in %, and APGR by the
# judge of objects:
#     looks       0      0.05   0.05   0.1    0.1    0.2    0.35   1
#     alignment   0      0.05   0.2    0.1    0.2    0.2    0.35   1
#     Delta P     109    148    158    166    171    183    185    171
#     judge       0.654  0.660  0.667  0.649  0.652  0.624  0.603  0.575
LOOKS_TRUST, ALIGNMENT_TRUST = 0.05, 0.2
EPSILON = 1e-6
BATCH = 1024


class CriticHead(nn.Module):
    """D of the router (B, k), states (B, n, d), mask (B, n), measured qualities (B, k) to D (B, k).

    Expected qualities are linear in `predictor.pooled` of the states; `scale` (k,) is Gamma times
    the gap of the models' means, over the trust.
    """

    def __init__(self, width: int, metrics: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(metrics, 2 * width + 1))
        self.bias = nn.Parameter(torch.zeros(metrics))
        self.scale = nn.Parameter(torch.ones(metrics))

    def forward(self, d: Tensor, hidden: Tensor, mask: Tensor, quality: Tensor) -> Tensor:
        expected = F.linear(pooled(hidden, mask), self.weight, self.bias)
        return (d.logit(EPSILON) + (quality - expected) / self.scale).sigmoid()


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
    features: Features,
    labels: Labels,
    learned: Learned,
    d: Floats,
    training: Rows,
    held_out: Rows,
    seed: int,
) -> Critic | None:
    """Train on the prompts in `training`, beside the router that was `learned` from them.

    `d` (N, k) is what that says of all prompts. The scores of `held_out` prompts' pictures set the
    critic's threshold. None for labels that no CLIP made, such as ratings: nobody could measure the
    same on the device.
    """
    scorer = labels.origin.get("scorer")
    if not scorer:
        return None
    head = fit_head(features, labels, learned.mu, learned.gamma, training)
    scores = scored(head, d, features, labels, held_out)
    alignment = scorer.get("alignment") or {}
    return Critic(
        head,
        score_digest(scores[np.isfinite(scores)]),
        {"name": scorer["clip"], "digest": scorer["digest"]},
        float(alignment.get("sharpness", 1.0)),
        _others(labels, alignment, seed),
    )


def fit_head(
    features: Features, labels: Labels, mu: Floats, gamma: float, training: Rows
) -> CriticHead:
    """Fit what quality the edge is expected to reach; `mu` (2, k) and `gamma` as in `Learned`."""
    inputs = pooled(*features.at(training)).double().numpy()
    fit = fit_columns(inputs, labels.mean[0, training])
    trust = [ALIGNMENT_TRUST if name == ALIGNMENT else LOOKS_TRUST for name in labels.metrics]
    head = CriticHead(features.hidden.shape[-1], len(labels.metrics))
    head.load_state_dict({
        "weight": torch.from_numpy(fit.weight.T).float(),
        "bias": torch.from_numpy(fit.bias).float(),
        "scale": torch.from_numpy(gamma * dataset_gaps(*mu) / trust).float(),
    })  # fmt: skip
    return head.eval()


@torch.inference_mode()
def scored(head: CriticHead, d: Floats, features: Features, labels: Labels, rows: Rows) -> Floats:
    """Return 1 - prs (len(rows), seeds) of the edge's pictures, NaN where none was drawn.

    `d` (N, k) is what the router said of every prompt of the labels.
    """
    scores = np.full((len(rows), len(labels.seeds)), np.nan)
    place, column = np.nonzero(labels.drawn[0, rows])
    quality, before = labels.q[0, rows[place], column], d[rows[place]]
    for at in np.array_split(np.arange(len(place)), -(-len(place) // BATCH)):
        given = torch.from_numpy(before[at]).float(), *features.at(rows[place[at]])
        after = head(*given, torch.from_numpy(quality[at]).float()).double().numpy()
        scores[place[at], column[at]] = 1.0 - prs(after, labels.weights)
    return scores


def looked(
    head: CriticHead, features: Features, labels: Labels, learned: Learned, d: Floats, rows: Rows
) -> Floats:
    """Return PRS (M, 2) of the edge's pictures of prompts: predicted after a look, and true.

    `d` (N, k) is what the router said. True is the PRS beside the cloud's mean over all its seeds.
    """
    place, column = np.nonzero(labels.drawn[0, rows])
    edge, cloud = labels.q[0, rows[place], column], labels.mean[1, rows[place]]
    mu_edge, mu_cloud = learned.mu
    true = prs(quality_distance(edge, cloud, mu_edge, mu_cloud, learned.gamma), labels.weights)
    predicted = 1.0 - scored(head, d, features, labels, rows)
    return np.stack([predicted[place, column], true], axis=1)


def save(head: CriticHead, folder: Path) -> None:
    """Write critic.safetensors."""
    weights = {name: weight.contiguous() for name, weight in head.state_dict().items()}
    save_weights(weights, folder / WEIGHTS)


def load(folder: Path) -> CriticHead:
    """Read what `save` wrote, ready to judge."""
    weights = load_file(folder / WEIGHTS)
    metrics, inputs = weights["weight"].shape
    head = CriticHead((inputs - 1) // 2, metrics)
    head.load_state_dict(weights)
    return head.eval()


def _others(labels: Labels, alignment: Mapping[str, Any], seed: int) -> tuple[str, ...] | None:
    """Return the prompts that every picture is compared with on the device.

    Labelling drew others for every prompt; of so many prompts the mean is nearly the same.
    """
    if not alignment or ALIGNMENT not in labels.metrics:
        return None
    count = int(alignment.get("distractors", DISTRACTORS))
    if count == 0:
        return ()
    count = min(max(count, 2), len(labels.prompts))  # one alone might be the prompt itself
    chosen = np.random.default_rng(seed).choice(len(labels.prompts), count, replace=False)
    return tuple(labels.prompts[i] for i in np.sort(chosen))
