"""The other ways to choose: each finds a signal that is there, on prompts that it did not see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cloud_server.training.evaluation.baselines import (
    Known,
    MarginClassifier,
    Material,
    WinClassifier,
    learned_baselines,
)
from cloud_server.training.evaluation.curves import Ranking
from cloud_server.training.evaluation.truth import Truth

TRAINING, JUDGED = np.arange(120), np.arange(120, 240)


@pytest.fixture(scope="module")
def material(world) -> Material:
    return Material(world.labels, world.weights, world.embeddings)


@pytest.mark.parametrize("index", range(5), ids=["knn", "ridge", "routellm", "hybrid", "zooter"])
def test_what_learns_finds_the_signal(world, material, index):
    method = learned_baselines(material)[index]
    scores = method.fit(TRAINING, 0)
    assert scores.shape == (240,)
    gain = Truth.of(world.labels, world.weights, JUDGED).gain
    assert Ranking(scores[JUDGED]).curve(gain).apgr()[0] > 0.65
    assert method.learns


@pytest.mark.parametrize("index", range(5), ids=["knn", "ridge", "routellm", "hybrid", "zooter"])
def test_labels_of_judged_prompts_are_not_looked_at(world, material, index):
    scores = learned_baselines(material)[index].fit(TRAINING, 0)
    q = world.labels.q.copy()
    q[:, JUDGED] = 0.1
    blind = Material(replace(world.labels, q=q), world.weights, world.embeddings)
    np.testing.assert_array_equal(learned_baselines(blind)[index].fit(TRAINING, 0), scores)


def test_a_classifier_with_one_class_says_nothing(world):
    q = world.labels.q.copy()
    q[1] = q[0] + 0.1
    material = Material(replace(world.labels, q=q), world.weights, world.embeddings)
    assert len(set(WinClassifier(material).fit(TRAINING, 0))) == 1
    same = Material(replace(world.labels, q=np.full_like(q, 0.5)), world.weights, world.embeddings)
    assert len(set(MarginClassifier(same).fit(TRAINING, 0))) == 1


def test_embeddings_that_are_all_alike_break_nothing(world):
    material = Material(world.labels, world.weights, np.ones((240, 4)))
    for method in learned_baselines(material):
        assert np.isfinite(method.fit(TRAINING, 0)).all()


def test_what_is_known_needs_no_training():
    known = Known("random", "random", np.zeros(3))
    assert known.fit(np.arange(2), 0).tolist() == [0, 0, 0]
    assert not known.learns
