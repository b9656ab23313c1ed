"""The whole field: ours among everything that it has to beat."""

from __future__ import annotations

import numpy as np

from cloud_server.training.evaluation.baselines import (
    Known,
    Material,
    Method,
    learned_baselines,
)
from cloud_server.training.evaluation.learned import Network
from cloud_server.training.evaluation.nouns import count_words
from cloud_server.training.evaluation.truth import Case


def all_methods(case: Case, network: Network, ours: Method) -> list[Method]:
    """Return `ours` and the others; `network` is how ours is trained, for a single metric."""
    prompts = case.labels.prompts
    embeddings = network.features.pooled.double().numpy()
    single = [network.single_metric()] if len(case.labels.metrics) > 1 else []
    return [
        ours,
        Known("random", "random", np.zeros(len(prompts))),
        Known("length", "prompt length", count_words(prompts)),
        Known("nouns", f"number of {case.counted}", case.nouns),
        *learned_baselines(Material(case.labels, case.weights, embeddings)),
        *single,
    ]
