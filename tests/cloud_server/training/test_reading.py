"""How much of a scene is in what was read, on scenes made by hand and by chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_server.training.starter.reading import (
    MEASURES,
    Found,
    Reading,
    colours_right,
    counts_right,
    match,
    objects_right,
    place_right,
    relation_right,
)
from cloud_server.training.starter.scenes import RELATIONS, Group, Scene, sample_scene


def scene(*groups: Group, relation: str | None = None, place: str | None = None) -> Scene:
    return Scene(groups, relation, place, (), "")


def at(x: float, y: float, noun: str, colour: str | None = None) -> Found:
    return Found(noun, colour, (x - 0.1, y - 0.1, x + 0.1, y + 0.1))


def reading(*objects: Found, place: str = "on grass") -> Reading:
    return Reading(objects, place)


def truth(of: Scene) -> Reading:
    """Return what a judge without a fault reads."""
    groups = [group for group in of.groups for _ in range(group.count)]
    objects = [Found(g.noun, g.colour, box) for g, box in zip(groups, of.boxes, strict=True)]
    return Reading(tuple(objects), of.place or "in space")


@given(st.integers(0, 10_000), st.booleans())
def test_a_faultless_reading_is_right_in_all_that_is_asked(seed, backwards):
    of = sample_scene(np.random.default_rng(seed))
    read = truth(of)
    if backwards:
        read = Reading(read.objects[::-1], read.place)
    shares = {name: measure(of, read) for name, measure in MEASURES.items()}
    assert set(shares.values()) <= {1.0, None}
    assert shares["objects"] == shares["counts"] == 1.0
    assert (shares["relations"] is None) == (of.relation is None)
    assert (shares["places"] is None) == (of.place is None)
    assert (shares["colours"] is None) == (not any(group.colour for group in of.groups))


@given(st.integers(0, 10_000), st.integers(0, 4))
def test_one_object_less_costs_its_share_and_its_count(seed, which):
    of = sample_scene(np.random.default_rng(seed))
    objects = list(truth(of).objects)
    del objects[which % len(objects)]
    read = Reading(tuple(objects), "on grass")
    assert objects_right(of, read) == pytest.approx(1 - 1 / of.objects)
    nouns = len({group.noun for group in of.groups})
    assert counts_right(of, read) == pytest.approx(1 - 1 / nouns)


@given(st.integers(0, 10_000))
def test_every_share_lies_between_nothing_and_all(seed):
    of, other = (sample_scene(np.random.default_rng([seed, k])) for k in range(2))
    for measure in MEASURES.values():
        share = measure(of, truth(other))
        assert share is None or 0.0 <= share <= 1.0


def test_nothing_found_is_nothing_right():
    of = scene(Group("cat"), Group("dog", 2, "red"), relation="above", place="in space")
    nothing = reading()
    assert [measure(of, nothing) for measure in MEASURES.values()] == [0.0, None, 0.0, 0.0, 0.0]


def test_every_object_of_a_group_counts_by_itself():
    of = scene(Group("apple", 3), Group("cat"))
    assert objects_right(of, reading(at(0.2, 0.5, "apple"), at(0.5, 0.5, "cat"))) == 0.5
    crowd = reading(*(at(0.1 * k, 0.5, "apple") for k in range(5)))
    assert objects_right(of, crowd) == 0.75, "more than asked for does not make up for the cat"


def test_counts_are_exact_over_all_groups_of_a_noun():
    of = scene(Group("apple", 2, "red"), Group("apple", 1, "green"), Group("cat"))
    apples = [at(0.2 * k, 0.5, "apple", "red") for k in range(3)]
    assert counts_right(of, reading(*apples, at(0.9, 0.9, "cat"))) == 1.0
    assert counts_right(of, reading(*apples[:2], at(0.9, 0.9, "cat"))) == 0.5
    assert counts_right(of, reading(*apples, at(0.5, 0.1, "apple"), at(0.9, 0.9, "cat"))) == 0.5


def test_groups_of_one_noun_take_their_own_colour_first():
    of = scene(Group("apple", 2, "red"), Group("apple", 1, "green"))
    objects = (at(0.1, 0.5, "apple", "green"), at(0.5, 0.5, "apple"), at(0.9, 0.5, "apple", "red"))
    first, second = match(of, reading(*objects))
    assert first == [objects[2], objects[1]]
    assert second == [objects[0]]
    assert colours_right(of, reading(*objects)) == pytest.approx(2 / 3)


def test_colours_are_asked_of_found_objects_only():
    of = scene(Group("apple", 2, "red"), Group("cat"))
    assert colours_right(of, reading(at(0.1, 0.5, "apple", "red"), at(0.5, 0.5, "cat"))) == 1.0
    assert colours_right(of, reading(at(0.1, 0.5, "apple"), at(0.5, 0.5, "cat", "red"))) == 0.0
    assert colours_right(of, reading(at(0.5, 0.5, "cat"))) is None
    assert colours_right(scene(Group("cat")), reading(at(0.5, 0.5, "cat", "red"))) is None


def test_a_relation_holds_for_every_pair_of_centres():
    of = scene(Group("cat"), Group("dog", 2), relation="to the left of")
    dogs = at(0.6, 0.2, "dog"), at(0.8, 0.7, "dog")
    assert relation_right(of, reading(at(0.3, 0.5, "cat"), *dogs)) == 1.0
    assert relation_right(of, reading(at(0.7, 0.5, "cat"), *dogs)) == 0.0
    assert relation_right(of, reading(at(0.3, 0.5, "cat"), dogs[0])) == 1.0
    assert relation_right(of, reading(at(0.3, 0.5, "cat"))) == 0.0, "there is no dog"
    assert relation_right(of, reading(*dogs)) == 0.0, "there is no cat"
    assert relation_right(replace(of, relation=None), reading()) is None


@pytest.mark.parametrize(
    ("relation", "x", "y"), [(RELATIONS[0], -1, 0), (RELATIONS[1], 1, 0), ("above", 0, -1),
                             ("below", 0, 1)],
)  # fmt: skip
def test_each_relation_has_one_direction(relation, x, y):
    of = scene(Group("cat"), Group("dog"), relation=relation)
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        read = reading(at(0.5 + 0.3 * dx, 0.5 + 0.3 * dy, "cat"), at(0.5, 0.5, "dog"))
        assert relation_right(of, read) == float((dx, dy) == (x, y))


def test_a_place_is_right_where_one_is_asked():
    assert place_right(scene(Group("cat"), place="on grass"), reading()) == 1.0
    assert place_right(scene(Group("cat"), place="in space"), reading()) == 0.0
    assert place_right(scene(Group("cat")), reading()) is None
