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

LEAST = 8  # prompts to learn from: what train-router has of the fewest labels that it takes
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


def cross_validation(
    prompts: Sequence[str], folds: int, repeats: int, seed: int, among: Rows | None = None
) -> Plan:
    """Return a plan that judges prompts by a router that never saw them, `repeats` times.

    Only the rows in `among` (ascending; all, if None) are judged; the others are learnt from.
    """
    alike = groups(prompts)
    among = np.arange(len(prompts)) if among is None else among
    several = len(np.unique(alike[among]))
    if several < folds:
        raise ConfigError(
            f"{folds} folds need at least as many different prompts, and there are "
            f"{several}; pass a smaller --folds or label more prompts"
        )
    runs = []
    for repeat in range(repeats):
        splitter = GroupKFold(folds, shuffle=True, random_state=seed + repeat)
        parts = splitter.split(among, groups=alike[among])
        judged = [among[b] for _, b in parts]
        runs.append(tuple(Fold(_others(alike, rows), rows, seed + repeat) for rows in judged))
    fewest = min(len(fold.training) for run in runs for fold in run)
    if fewest < LEAST:
        raise ConfigError(
            f"with {folds} folds only {fewest} prompts are left to learn from, near-duplicates of "
            f"judged ones not counted, and {LEAST} are needed; label more prompts"
        )
    text = f"{folds}-fold cross-validation over prompts, {repeats} repeats"
    return Plan(tuple(runs), among, text)


def held_out(
    prompts: Sequence[str], judged: int, seeds: int, seed: int, among: Rows | None = None
) -> Plan:
    """Return a plan that keeps `judged` prompts (or a few less) from `seeds` trainings.

    They are of the rows in `among` (ascending; all, if None).
    """
    alike = groups(prompts)
    among = np.arange(len(prompts)) if among is None else among
    most = min(len(among), len(prompts) - LEAST)
    if not 2 <= judged <= most:
        raise ConfigError(
            f"of {len(prompts)} prompts {judged} cannot be held out; "
            + (
                f"--held-out takes a number from 2 to {most}, as {LEAST} must be left to learn from"
                if most >= 2
                else "label more"
            )
        )
    kinds, sizes = np.unique(alike[among], return_counts=True)
    order = np.random.default_rng(seed).permutation(len(kinds))
    chosen = kinds[order[sizes[order].cumsum() <= judged]]
    rows = among[np.isin(alike[among], chosen)]
    return these(prompts, rows, seeds, seed)


def these(prompts: Sequence[str], rows: Rows, seeds: int, seed: int) -> Plan:
    """Return a plan that keeps the prompts in `rows` (ascending) from `seeds` trainings."""
    training = _others(groups(prompts), rows)
    runs = tuple((Fold(training, rows, seed + i),) for i in range(seeds))
    again = f", {seeds} training seeds" if seeds > 1 else ""
    text = f"{len(rows)} held-out prompts, {len(training)} to learn from{again}"
    return Plan(runs, rows, text)


def _others(alike: Rows, rows: Rows) -> Rows:
    """Return the rows of prompts that are like none in `rows`."""
    return np.flatnonzero(~np.isin(alike, alike[rows]))
