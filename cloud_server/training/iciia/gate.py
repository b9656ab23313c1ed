"""The gate back to the plain backbone: whether a history helps with a picture or would mislead.

The paper says to bypass the module below 3 to 5 pictures of history (section 4.2), and a client
who sees every class loses by it at any length (figure 7). A device knows neither, so the gate
judges by the features themselves and decides for each picture which of both heads is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloud_server.training.iciia.learn import Cohort, answers, stream
from cloud_server.training.iciia.module import Iciia
from cloud_server.training.iciia.samples import Ints, by_client, mixed_clients

SIGNS = ("own", "crowd", "share", "one")
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (1, 2, 3, 5, 8, 15, 30, 60)
TARGETS = 2000  # for each level and length
HARM = 0.0015  # share of pictures that may be harmed more than helped where clients are all alike
_DECAY = 1e-3


class Gate(nn.Module):
    """Sequences (..., B, D) and rows (n,) to (..., n): above 0 where the module is to be asked.

    A logistic rule on `SIGNS`: how near the picture is to all B >= 2, the mean of their cosines;
    how near all are to each other; and what share of all one picture is, since its own cosine of 1
    counts. Vectors count from `centre`, the mean of all features.
    """

    centre: Tensor
    weights: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("weights", torch.zeros(len(SIGNS)))

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        return self.signs(features, rows) @ self.weights

    def signs(self, features: Tensor, rows: Tensor) -> Tensor:
        """Return what the rule goes by, (..., n, 4)."""
        unit = F.normalize(features - self.centre, dim=-1)  # (..., B, D)
        cosines = (unit @ unit.mean(-2, keepdim=True).transpose(-2, -1)).squeeze(-1)  # (..., B)
        own = cosines.index_select(-1, rows)
        crowd = cosines.mean(-1, keepdim=True).expand_as(own)
        one = torch.ones_like(own)
        return torch.stack([own, crowd, one / features.shape[-2], one], -1)


def fit_gate(model: Iciia, plain: Tensor, cohort: Cohort, seed: int) -> Gate:
    """Fit the rule on the validation split, its clients mixed to all levels of heterogeneity.

    It learns from pictures that only one of both names rightly, which makes 1/2 the point where
    both are as often right. Where clients are all alike that is not enough: for them it is raised
    until next to no picture is harmed. `plain` (N,) is what the backbone names.
    """
    gate = Gate(model.config.width)
    gate.centre.copy_(cohort.features[np.flatnonzero(cohort.splits == 0)].mean(0))
    cases = list(_cases(gate, model, plain, cohort, seed))
    x = torch.cat([case.signs for case in cases])
    y = torch.cat([case.helped for case in cases]).float()
    if not len(x):  # the module never names another class: the gate stays shut
        return gate
    scale = x.std(0, unbiased=False).clamp_min(1e-6)
    scale[-1] = 1.0
    weights = torch.zeros(len(SIGNS), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x / scale @ weights, y)
        loss = loss + _DECAY * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    gate.weights.copy_(weights.detach() / scale)
    if alike := [case for case in cases if case.level == 0]:
        scores = torch.cat([case.signs for case in alike]) @ gate.weights
        helped = torch.cat([case.helped for case in alike])
        gate.weights[-1] -= harmless(scores, helped, HARM * sum(case.targets for case in alike))
    return gate


def harmless(scores: Tensor, helped: Tensor, allowed: float = 0.0) -> float:
    """Return the lowest threshold, 0 or above, for scores (n,) that does little harm.

    Over it at most `allowed` more pictures are harmed than are `helped` (n,).
    """
    order = scores.argsort(descending=True)
    balance = (2 * helped[order].long() - 1).cumsum(0)  # of all whose score is at least this
    open_ones = int((scores > 0).sum())
    kept = max((n for n in range(1, open_ones + 1) if balance[n - 1] >= -allowed), default=0)
    return 0.0 if kept == open_ones else float(scores[order[kept]])


@dataclass(frozen=True, slots=True)
class _Case:
    """Of so many `targets` those where module and backbone differ: signs (n, 4), helped (n,)."""

    level: float
    targets: int
    signs: Tensor
    helped: Tensor


def _cases(gate: Gate, model: Iciia, plain: Tensor, cohort: Cohort, seed: int) -> Iterable[_Case]:
    labels = torch.from_numpy(cohort.labels)
    val: Ints = np.flatnonzero(cohort.splits == 1)
    for level in LEVELS:
        mixed = mixed_clients(cohort.clients, cohort.splits, level, seed)
        for k in LENGTHS:
            met = stream(by_client(mixed, val), k, seed, TARGETS)
            if not len(met.targets):
                continue
            named = answers(model, cohort.features, met).argmax(-1)
            right, before = named == labels[met.targets], plain[met.targets] == labels[met.targets]
            differing = right != before
            signs = answers(_Signs(gate), cohort.features, met)
            yield _Case(level, len(met.targets), signs[differing], right[differing])


class _Signs(nn.Module):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        return self.gate.signs(features, rows)
