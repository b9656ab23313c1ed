"""What the starter CLIP learns from: scenes, some with their sides exchanged, some spoiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloud_server.torchvision_guard import guard
from cloud_server.training.quality import load_metrics
from cloud_server.training.starter.degradations import degrade
from cloud_server.training.starter.scenes import (
    NOUNS,
    OPPOSITE,
    RELATIONS,
    Scene,
    caption_negatives,
    describe,
    draw,
    held_out,
    sample_scene,
    turned_round,
)
from cloud_server.training.starter.tokenizer import encode

guard()
from transformers import CLIPTokenizer  # noqa: E402  the guard must come first

METRICS = load_metrics()
# How much more often than others a picture is spoiled in what is hard to see.
HARD_TO_SEE = {"Integrity": 12.0, "Detail": 2.0, "Realism": 3.0}


class Batch(NamedTuple):
    """B scenes: as they should be, and the same spoiled in one metric each; right captions, wrong.

    At strength s of what spoils it, the goodness of a picture is 1 - s or so.
    """

    pictures: Tensor  # (2B, H, W, 3) bytes
    tokens: Tensor  # (2B, n), of captions, then of captions with one thing wrong
    goodness: Tensor  # (2B, k) in 0..1
    spoiled: Tensor  # (B,), in which metric


def make_batch(tokenizer: CLIPTokenizer, seed: int, step: int, scenes: int) -> Batch:
    """Return the batch of a training step, the same for the same seed and step."""
    rng = np.random.default_rng([seed, step, 1])
    drawn = _scenes(rng, scenes)
    pictures = np.stack([draw(scene, rng) for scene in drawn])
    captions = [scene.caption for scene in drawn]
    wrong = [str(rng.choice(caption_negatives(scene, rng))) for scene in drawn]
    goodness = np.full((2 * scenes, len(METRICS)), 0.97, np.float32)
    odds = np.array([HARD_TO_SEE.get(metric.name, 1.0) for metric in METRICS])
    metrics = rng.choice(len(METRICS), size=scenes, p=odds / odds.sum())
    spoiled = []
    for i, (metric, strength) in enumerate(zip(metrics, rng.random(scenes).tolist(), strict=True)):
        picture = degrade(pictures[i].astype(np.float32) / 255, METRICS[metric].name, strength, rng)
        spoiled.append((picture * 255).round().astype(np.uint8))
        goodness[scenes + i, metric] = 0.03 + 0.94 * (1 - strength) ** 1.5
    both = np.concatenate([pictures, np.stack(spoiled)])
    return Batch(
        torch.from_numpy(both),
        encode(tokenizer, captions + wrong),
        torch.from_numpy(goodness),
        torch.from_numpy(metrics),
    )


def make_pairs(
    tokenizer: CLIPTokenizer, seed: int, step: int, count: int, nouns: int, objects: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pictures (2N, H, W, 3), tokens (2N, n) and sides (2N, nouns) of `count` pairs.

    Only so many nouns are in them, and so many objects in each if not any number. Sides are indices
    of RELATIONS, -1 where a caption tells none.
    """
    rng = np.random.default_rng([seed, step, 3])
    known = np.random.default_rng(seed).permutation(NOUNS)[:nouns]
    drawn = [scene for _ in range(count) for scene in _pair(rng, known, objects)]
    pictures = np.stack([draw(scene, rng) for scene in drawn])
    sides = np.stack([_sides(scene) for scene in drawn])
    tokens = encode(tokenizer, [scene.caption for scene in drawn])
    return torch.from_numpy(pictures), tokens, torch.from_numpy(sides)


def _scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Return scenes, half of them in pairs."""
    scenes = [sample_scene(rng) for _ in range(count // 2)]
    while len(scenes) < count:
        scenes += _pair(rng)
    return scenes[:count]


def _pair(
    rng: np.random.Generator,
    nouns: Sequence[str] | NDArray[np.str_] = NOUNS,
    objects: int | None = None,
) -> tuple[Scene, Scene]:
    """Return a scene with a relation, and the same with its sides exchanged; none is held out."""
    while True:
        scene = sample_scene(rng, objects)
        names = rng.choice(nouns, len(scene.groups), replace=False)
        groups = tuple(
            replace(group, noun=str(name)) for group, name in zip(scene.groups, names, strict=True)
        )
        scene = replace(scene, groups=groups)
        scene = replace(scene, caption=describe(scene))
        turned = turned_round(scene, rng)
        if scene.relation and not held_out(scene) and not held_out(turned):
            return scene, turned


def _sides(scene: Scene) -> NDArray[np.int64]:
    """Return for every noun the relation, as an index, in which its things stand; -1 if none."""
    sides = np.full(len(NOUNS), -1)
    if scene.relation:
        first, *rest = scene.groups
        sides[NOUNS.index(first.noun)] = RELATIONS.index(scene.relation)
        for group in rest:
            sides[NOUNS.index(group.noun)] = RELATIONS.index(OPPOSITE[scene.relation])
    return sides
