"""Labels of a made-up pair of models, whose gaps are known functions of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cloud_server.training.labels import Labels

METRICS = ("Sharpness", "Realism", "Layout")
WEIGHTS = np.array([0.5, 0.25, 0.25])


# What the command adds to a report.
EXTRAS = {
    "command": "cloud-server evaluate-router --labels x.parquet",
    "versions": {"numpy": "2"},
    "given_router": False,
    "predictors": "2 gated",
    "judge": {"name": "objects right", "by": "a network"},
}


@dataclass(frozen=True)
class World:
    """The cloud gains 0.03 on average on the first two metrics, by `signal`, and loses on Layout.

    `embeddings` (N, 8) hold the signal in their first column; what a picture adds is noise.
    """

    labels: Labels
    weights: np.ndarray
    embeddings: np.ndarray
    signal: np.ndarray
    nouns: np.ndarray


def make_world(prompts=240, seeds=4, noise=0.02, seed=0) -> World:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(prompts, 8))
    signal = embeddings[:, 0]
    gap = np.stack([0.03 + 0.04 * signal, 0.03 + 0.04 * signal, -0.01 + 0.01 * signal], -1)
    q = np.full((2, prompts, seeds, 3), 0.5)
    q[1] += gap[:, None]
    q += rng.normal(0, noise, q.shape)
    words = tuple(f"thing {i} in a room" for i in range(prompts))
    labels = Labels(q, words, tuple(range(seeds)), METRICS, "made-up")
    nouns = np.clip(np.round(3 + signal), 1, 5)
    return World(labels, WEIGHTS, embeddings, signal, nouns)
