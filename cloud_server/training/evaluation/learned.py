"""Our router as one of the ways to choose: learnt from the training prompts, or given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from cloud_server.errors import ModelError
from cloud_server.training import predictor
from cloud_server.training.encoders import Features
from cloud_server.training.labels import Labels
from cloud_server.training.loop import Budget
from cloud_server.training.router import Learned, Settings, learn
from cloud_server.training.router_folder import FACTS
from edge_agent.routing.pareto import prs

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

ABLATIONS: Final[Sequence[tuple[str, str, dict[str, Any]]]] = (
    ("gated", "the gated network", {}),
    ("no_metrics", "without multi-metric (one head, on PRS)", {"single_metric": True}),
    ("no_selection", "without token selection", {"all_tokens": True}),
    ("no_dual_gate", "without dual gate (positive gate only)", {"single_gate": True}),
)


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A router of ours, trained anew for every fold; the fields below `settings` are as in `learn`.

    `kinds`, when given, takes down which kind of predictor each training chose.
    """

    key: str
    name: str
    features: Features
    labels: Labels
    weights: Floats
    settings: Settings
    work: Path
    budget: Budget
    device: str
    related: Floats | None = None
    kinds: list[str] | None = None
    learns: bool = True
    known: dict[tuple[bytes, int], Floats] = field(default_factory=dict)

    def fit(self, rows: Rows, seed: int) -> Floats:
        """Return 1 - prs, predicted for every prompt (N,)."""
        return 1.0 - prs(self.distances(rows, seed), self.weights)

    def distances(self, rows: Rows, seed: int) -> Floats:
        """Return D, predicted for every prompt (N, k); what was learnt before is remembered."""
        key = rows.tobytes(), seed
        if key not in self.known:
            learned = learn(
                self.features,
                self.labels,
                self.weights,
                rows,
                seed,
                settings=self.settings,
                work=self.work,
                budget=self.budget,
                device=self.device,
                related=self.related,
            )
            if self.kinds is not None:
                self.kinds.append(learned.model.config.kind)
            self.known[key] = learned.predict(self.features)
        return self.known[key]

    def single_metric(self) -> Network:
        """Return the same router learnt on the metric of most weight alone."""
        one = int(np.argmax(self.weights))
        name = self.labels.metrics[one]
        labels = replace(
            self.labels,
            q=self.labels.q[..., [one]],
            metrics=(name,),
            digest=f"{self.labels.digest}-{name}",
            described=self.labels.described[one : one + 1],
        )
        return replace(
            self,
            key="single",
            name=f"single-metric router ({name})",
            labels=labels,
            weights=np.ones(1),
            kinds=None,
            known={},
        )

    def ablations(self) -> list[Network]:
        """Return the gated network, and that without each of its ideas."""
        gated = replace(self.settings, predictor="gated")
        return [
            replace(
                self, key=key, name=name, settings=replace(gated, **without), kinds=None, known={}
            )
            for key, name, without in ABLATIONS
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """The router in a folder, as it is. Raises ModelError where there is none that fits."""

    folder: Path
    features: Features
    device: str
    key: str = "ours"
    name: str = "ours"
    learns: bool = False

    def fit(self, rows: Rows, seed: int) -> Floats:
        """Return 1 - prs, predicted for every prompt (N,)."""
        try:
            model = predictor.load(self.folder)
            facts = facts_of(self.folder)
            weights = np.array([metric["weight"] for metric in facts["metrics"]])
            if len(weights) != model.config.experts:
                raise ValueError(
                    f"it predicts {model.config.experts} metrics and names {len(weights)}"
                )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise _no_router(self.folder, error) from error
        width = self.features.hidden.shape[-1]
        if model.config.width != width:
            raise ModelError(
                f"the router in '{self.folder}' reads states of {model.config.width} numbers and "
                f"the text encoder gives {width}; pass the --text-encoder that it was trained with"
            )
        nothing = np.empty((0, 0))
        learned = Learned(model, nothing, 1.0, nothing, self.device)
        return 1.0 - prs(learned.predict(self.features), weights / weights.sum())


def facts_of(folder: Path) -> dict[str, Any]:
    """Return what a router's folder says of it; raises ModelError."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_router(folder, error) from error
    if not isinstance(facts, dict):
        raise _no_router(folder, TypeError(f"{FACTS} is no object"))
    return facts


def _no_router(folder: Path, error: Exception) -> ModelError:
    line = str(error).strip().partition("\n")[0]
    return ModelError(
        f"there is no router in '{folder}' ({line}); cloud-server train-router writes one"
    )


def kinds_said(kinds: Sequence[str]) -> str:
    """Return how many of the trainings chose which predictor."""
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
