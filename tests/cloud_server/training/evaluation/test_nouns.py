"""Nouns are counted by the grammar of the starter world, elsewhere by a tagger."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_server.training.evaluation.nouns import count_nouns, count_words
from cloud_server.training.starter.captions import read_groups, read_scene
from cloud_server.training.starter.scenes import sample_scene


def test_every_caption_is_read_back():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scene = sample_scene(rng)
        assert read_groups(scene.caption) == scene.groups
        assert read_scene(scene.caption).objects == scene.objects


def test_text_of_another_world_has_no_scene():
    assert read_groups("an astronaut riding a unicycle") == ()
    assert read_scene("") is None


def test_objects_of_the_starter_world_are_counted():
    counts, what = count_nouns(["two red apples above a cat", "a palm tree"])
    assert (counts.tolist(), what) == ([3, 1], "objects")


@pytest.mark.parametrize(
    ("prompt", "nouns"),
    [
        ("A baker pulling freshly baked bread out of an oven in a bakery.", 4),
        ("slowly running away", 0),
        ("two dogs and a cat", 2),
    ],
)
def test_nouns_of_other_text_are_counted(prompt, nouns):
    counts, what = count_nouns([prompt, "something of another world"])
    assert (counts[0], what) == (nouns, "nouns")


def test_words_are_counted():
    assert count_words(["a cat", "", " two  red apples "]).tolist() == [2, 0, 3]
