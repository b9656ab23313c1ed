"""Training the paper's predictor by gradient descent, resumable after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cloud_server.training.encoders import Features
from cloud_server.training.loop import Budget, fit
from cloud_server.training.predictor import Predictor, PredictorConfig
from edge_agent.routing.pareto import prs

BATCH = 64
# After more epochs some hundred prompts are learnt by heart, after more steps some thousand; of
# tens of thousands every one is worth several epochs.
MAX_EPOCHS, MIN_STEPS, MAX_STEPS, MIN_EPOCHS = 40, 200, 1250, 8
RATE, WEIGHT_DECAY, AVERAGE, WARM_UP = 1e-3, 0.1, 0.98, 50
PRS_LOSS = 4.0  # against the cross-entropy of the metrics


def most_steps(prompts: int) -> int:
    """Return how many steps training takes with so many prompts, if it may."""
    epoch = prompts / BATCH
    return max(min(max(MIN_STEPS, int(MAX_EPOCHS * epoch)), MAX_STEPS), int(MIN_EPOCHS * epoch))


def fit_gated(
    features: Features,
    d: NDArray[np.float64],
    weights: NDArray[np.float64],
    training: NDArray[np.int64],
    seed: int,
    *,
    sizes: Mapping[str, Any],
    work: Path,
    budget: Budget,
    device: str,
) -> Predictor:
    """Train on D (N, k) of the prompts in `training`; `sizes` are fields of PredictorConfig.

    The loss is soft-label cross-entropy on every D_i, and squared error on PRS. State is kept in
    `work` under a digest of all that decides the result.
    """
    config = PredictorConfig(width=features.hidden.shape[-1], experts=d.shape[1], **sizes)
    if config.single_metric:
        d = np.repeat(prs(d, weights)[:, None], d.shape[1], axis=1)
    most = most_steps(len(training))
    budget = replace(budget, steps=min(budget.steps or most, most))
    labels, w = torch.from_numpy(d).float(), torch.from_numpy(weights).float().to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Predictor(config)

        def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
            torch.manual_seed(seed * 1_000_003 + step)  # dropout: the same after an interruption
            rng = np.random.default_rng([seed, step])
            rows = rng.choice(training, min(BATCH, len(training)), replace=False)
            hidden, mask, truth = (x.to(device) for x in (*features.at(rows), labels[rows]))
            guess = model(hidden, mask)
            by_metric = F.binary_cross_entropy(guess, truth)
            overall = F.mse_loss(guess @ w, truth @ w)
            shown = {"bce": by_metric.item(), "prs": overall.item() ** 0.5}
            return by_metric + PRS_LOSS * overall, shown

        fit(
            f"router-{_digest(features, d[training], weights, training, seed, config, budget)}",
            model,
            loss_fn,
            lr=RATE,
            budget=budget,
            work=work,
            device=device,
            ema=AVERAGE,
            warmup=WARM_UP,
            weight_decay=WEIGHT_DECAY,
        )
    return model


def _digest(
    features: Features,
    d: NDArray[np.float64],
    weights: NDArray[np.float64],
    training: NDArray[np.int64],
    seed: int,
    config: PredictorConfig,
    budget: Budget,
) -> str:
    total = hashlib.sha256(repr((seed, asdict(config), asdict(budget))).encode())
    for array in (d, weights, training, features.hidden.numpy(), features.mask.numpy()):
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()[:16]
