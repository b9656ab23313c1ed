"""From labels to a router's folder: predictor, score digest, and what the device must know.

The threshold depends on predicted scores only, so it is calibrated on fresh prompts that no
picture was made for, where there are any.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud_server.errors import ConfigError
from cloud_server.training import critic as critics
from cloud_server.training import predictor
from cloud_server.training.critic import Critic
from cloud_server.training.encoders import TextEncoder
from cloud_server.training.labels import Labels
from cloud_server.training.loop import Budget
from cloud_server.training.router import Learned, Settings, check, learn
from edge_agent.routing.pareto import FLOOR, prs
from edge_agent.routing.policy import score_digest, threshold

Floats = NDArray[np.float64]

HELD_OUT = 0.2
DEFAULT_SHARE = 0.3
SHARES = (0.1, 0.3, 0.5)
FEW = 100  # prompts: a quantile of fewer is off by more than some 4 points
PROBE = "two red apples to the left of a cat"
FACTS = "router.json"


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """What a router is made from: labels, and prompts that only set the threshold.

    `related` is as in `learn`.
    """

    labels: Labels
    calibration: Sequence[str] = ()
    related: Floats | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A router, and PRS of the labelled prompts: predicted, true, and which were `held_out`.

    `critic` is None where no CLIP has made the labels, else `looked` has PRS of every picture of
    the held-out prompts (pictures, 2) after a look at it: predicted, true.
    """

    learned: Learned
    critic: Critic | None
    looked: Floats | None
    digest: list[float]
    predicted: Floats
    true: Floats
    held_out: NDArray[np.int64]


def train_router(
    material: Material,
    encoder: TextEncoder,
    out: Path,
    work: Path,
    budget: Budget,
    seed: int,
    device: str,
    settings: Settings = Settings(),  # noqa: B008  it is frozen
) -> Trained:
    """Train a router and write its folder to `out`, replacing it as a whole.

    A fifth of the prompts is held out to measure on, and to calibrate on where `material` brings
    no prompts for it. State is kept in `work`, so that a killed run resumes.
    """
    labels, weights = material.labels, material.labels.weights
    check(labels)
    count = len(labels.prompts)
    features = encoder.encode([*labels.prompts, *material.calibration], device)
    held_out, training = parted(count, seed)
    known = features.some(np.arange(count))
    learned = learn(
        known,
        labels,
        weights,
        training,
        seed,
        settings=settings,
        work=work,
        budget=budget,
        device=device,
        related=material.related,
    )
    learned.model.half().float()  # as its file keeps it
    d = learned.predict(features)
    predicted = prs(d, weights)
    fresh = predicted[count:] if material.calibration else predicted[held_out]
    critic = critics.train_critic(known, labels, learned, d, training, held_out, seed)
    trained = Trained(
        learned,
        critic,
        critics.looked(critic.head, known, labels, learned, d, held_out) if critic else None,
        score_digest(1.0 - fresh),
        predicted[:count],
        prs(learned.d, weights),
        held_out,
    )
    facts = _facts(trained, material, encoder, seed)
    save_router(learned.model, facts, out, trained.critic)
    return trained


def parted(count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which of `count` labelled prompts a training holds out, and which it learns from."""
    order = np.random.default_rng(seed).permutation(count)
    held_out, training = np.split(order, [max(2, round(HELD_OUT * count))])
    return held_out, training


def held_out_by(facts: Mapping[str, Any], labels: Labels) -> NDArray[np.int64] | None:
    """Return the prompts of labels (ascending) that a router, by its facts, never learnt from.

    None where it learnt from others, or does not say.
    """
    if facts.get("learnt_from") != _learnt_from(labels):
        return None
    return np.sort(parted(len(labels.prompts), int(facts["seed"]))[0])


def report(trained: Trained, material: Material) -> str:
    """Return what was measured on the held-out prompts, as lines of text."""
    held_out, kind = trained.held_out, trained.learned.model.config.kind
    predicted, true = trained.predicted[held_out], trained.true[held_out]
    n = len(held_out)
    value, low, high = correlation(predicted, true)
    numbers = sum(weight.numel() for weight in trained.learned.model.parameters())
    where = (
        f"{len(material.calibration)} calibration prompts, none of them labelled"
        if material.calibration
        else f"the {n} held-out prompts themselves; pass more with --calibration"
    )
    together = (
        f"correlate by {value:.2f} (95 % interval {low:.2f} to {high:.2f}) on {n} held-out prompts"
        if np.isfinite(value)
        else f"cannot be compared: {n} held-out prompts are too few, or all alike"
    )
    fresh = len(material.calibration) or n
    lines = [
        f"{kind} predictor of {numbers} parameters, trained on {len(trained.true) - n} prompts",
        f"prs: predicted and true {together}",
        f"prs: true mean {true.mean():.3f}, spread {true.std():.3f}; predicted mean "
        f"{predicted.mean():.3f}, spread {predicted.std():.3f}",
        f"threshold from {where}" + ("" if fresh >= FEW else "; so few make shares rough"),
    ]
    if trained.looked is not None:
        value, low, high = correlation(trained.looked[:, 0], trained.looked[:, 1], n)
        lines.append(
            f"critic: after a look at the edge's picture by {value:.2f} ({low:.2f} to {high:.2f})"
            if np.isfinite(value)
            else "critic: too few pictures, or all alike, to compare what it says with"
        )
    for share in SHARES:
        capped, free = (threshold(trained.digest, share, capped=cap) for cap in (True, False))
        got, more = (float(np.mean(1.0 - predicted > limit)) for limit in (capped, free))
        line = f"share {share:.0%}: threshold {capped:.3f} sends {got:.0%}"
        if free < capped:
            line += f"; without the cap {free:.3f} sends {more:.0%}"
        lines.append(line)
    return "\n".join(lines)


def correlation(a: Floats, b: Floats, independent: int | None = None) -> tuple[float, float, float]:
    """Return Pearson's correlation with its 95 % interval by Fisher's transform.

    The width is that of so many `independent` values, by default all. All three are NaN where one
    of the two does not vary, or for fewer than four values.
    """
    n = len(a) if independent is None else independent
    if n < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return (float("nan"),) * 3
    r = float(np.corrcoef(a, b)[0, 1])
    z, half = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)), 1.96 / (n - 3) ** 0.5
    return r, float(np.tanh(z - half)), float(np.tanh(z + half))


def _facts(trained: Trained, material: Material, encoder: TextEncoder, seed: int) -> dict[str, Any]:
    learned, labels = trained.learned, material.labels
    return {
        "metrics": [
            {
                "name": metric.name,
                "positive": metric.positive,
                "negative": metric.negative,
                "weight": float(weight),
                "mu_edge": float(mu_edge),
                "mu_cloud": float(mu_cloud),
            }
            for metric, weight, mu_edge, mu_cloud in zip(
                labels.described, labels.weights, *learned.mu, strict=True
            )
        ],
        "gamma": learned.gamma,
        "floor": FLOOR,
        "score_digest": trained.digest,
        "default_share": DEFAULT_SHARE,
        "predictor_kind": learned.model.config.kind,
        "edge_model": _name(labels, "edge"),
        "cloud_model": _name(labels, "cloud"),
        "reads_with": encoder.name,
        "text_probe": {"prompt": PROBE, "state": encoder.state(PROBE)},
        "seed": seed,
        "learnt_from": _learnt_from(labels),
        **({"critic": trained.critic.facts} if trained.critic else {}),
    }


def _learnt_from(labels: Labels) -> dict[str, Any]:
    return {"labels": labels.digest, "prompts": len(labels.prompts)}


def _name(labels: Labels, side: str) -> str:
    """Return what a model of the labels is called, with the start of its digest if it has one."""
    model = labels.origin.get("models", {}).get(side, {})
    name, digest = str(model.get("name", side)), str(model.get("digest", ""))
    return f"{name}@{digest[:12]}" if digest else name


def check_replaceable(out: Path) -> None:
    """Raise ConfigError where a router cannot be written: what is there is not ours to replace."""
    known = {FACTS, predictor.WEIGHTS, predictor.CONFIG, critics.WEIGHTS}
    try:
        strange = sorted(entry.name for entry in out.iterdir() if entry.name not in known)
    except (FileNotFoundError, NotADirectoryError):
        return  # nothing to replace
    if strange:
        raise ConfigError(
            f"{out} holds {strange[0]!r}, which is no part of a router; name a new folder, or one "
            "with a router to replace"
        )


def save_router(
    model: predictor.AnyPredictor,
    facts: dict[str, Any],
    out: Path,
    critic: Critic | None = None,
) -> None:
    """Write predictor.safetensors, config.json and router.json, replacing a router in `out`.

    With a critic there is critic.safetensors too. Raises ConfigError, and writes nothing, where
    `out` holds anything else.
    """
    check_replaceable(out)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        predictor.save(model, fresh)
        if critic:
            critics.save(critic.head, fresh)
        (fresh / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            os.replace(out, old)
        os.replace(fresh, out)
