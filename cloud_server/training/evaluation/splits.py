"""Which prompts are learnt from and which are judged; near-duplicates stay on one side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

from cloud_server.errors import ConfigError

Rows = NDArray[np.int64]

SMALL = 1500  # up to so many prompts every one is judged, by cross-validation
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True, slots=True)
class Fold:
    """One training: rows learnt from, rows judged, and the seed of the training."""

    training: Rows
    judged: Rows
    seed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Runs of an evaluation; the folds of each judge the same `rows` (ascending), once each."""

    runs: tuple[tuple[Fold, ...], ...]
    rows: Rows
    description: str


def normalised(prompt: str) -> str:
    """Return a prompt without case, punctuation, articles and extra blanks."""
    words = re.findall(r"\w+", prompt.casefold())
    return " ".join(word for word in words if word not in _ARTICLES) or prompt


def groups(prompts: Sequence[str]) -> Rows:
    """Return a number per prompt (N,), the same for prompts that are alike when normalised."""
    numbers: dict[str, int] = {}
    alike = [numbers.setdefault(normalised(p), len(numbers)) for p in prompts]
    return np.array(alike, np.int64)


def cross_validation(prompts: Sequence[str], folds: int, repeats: int, seed: int) -> Plan:
    """Return a plan that judges every prompt by a router that never saw it, `repeats` times."""
    alike = groups(prompts)
    if len(set(alike.tolist())) < folds:
        raise ConfigError(
            f"{folds} folds need at least as many different prompts, and there are "
            f"{len(set(alike.tolist()))}; pass a smaller --folds or label more prompts"
        )
    rows = np.arange(len(prompts))
    runs = []
    for repeat in range(repeats):
        splitter = GroupKFold(folds, shuffle=True, random_state=seed + repeat)
        parts = splitter.split(rows, groups=alike)
        runs.append(tuple(Fold(a, b, seed + repeat) for a, b in parts))
    text = f"{folds}-fold cross-validation over prompts, {repeats} repeats"
    return Plan(tuple(runs), rows, text)


def held_out(prompts: Sequence[str], judged: int, seeds: int, seed: int) -> Plan:
    """Return a plan that keeps `judged` prompts (or a few less) from `seeds` trainings."""
    alike = groups(prompts)
    if not 2 <= judged <= len(prompts) - 2:
        raise ConfigError(
            f"of {len(prompts)} prompts {judged} cannot be held out; --held-out takes a number "
            f"from 2 to {len(prompts) - 2}, and some prompts must be left to learn from"
        )
    order = np.random.default_rng(seed).permutation(alike.max() + 1)
    sizes = np.bincount(alike)[order].cumsum()
    rows = np.flatnonzero(np.isin(alike, order[sizes <= judged]))
    training = np.setdiff1d(np.arange(len(prompts)), rows)
    runs = tuple((Fold(training, rows, seed + i),) for i in range(seeds))
    again = f", {seeds} training seeds" if seeds > 1 else ""
    text = f"{len(rows)} held-out prompts, {len(training)} to learn from{again}"
    return Plan(runs, rows, text)
