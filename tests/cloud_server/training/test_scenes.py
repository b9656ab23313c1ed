"""The starter world: what captions say is what scenes hold and pictures show."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from cloud_server.training.starter import scenes
from cloud_server.training.starter.scenes import (
    COLOURS,
    COUNTS,
    NOUNS,
    PLACES,
    VARIANTS,
    FontMissing,
    Group,
    Scene,
    batches,
    caption_negatives,
    describe,
    draw,
    held_out,
    sample_scene,
    write_sheet,
)

needs_font = pytest.mark.skipif(
    not any(path.exists() for path in scenes.FONT_PATHS),
    reason="drawing scenes needs the Debian package fonts-noto-color-emoji",
)


@pytest.fixture
def many() -> list[scenes.Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(500)]


def test_the_same_seed_gives_the_same_scenes():
    first, second = (sample_scene(np.random.default_rng(3)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("objects", [1, 2, 3, 4, 5])
def test_a_scene_has_as_many_objects_and_boxes_as_asked(objects):
    rng = np.random.default_rng(objects)
    for _ in range(50):
        scene = sample_scene(rng, objects)
        assert scene.objects == objects == len(scene.boxes)


def said(words: str, scene: scenes.Scene) -> bool:
    """Whether the caption holds these words or others that mean the same."""
    articles = ("an",) if words == "a" else ()
    padded = f" {scene.caption.replace(',', ' ')} "
    return any(f" {one} " in padded for one in (words, *VARIANTS[words], *articles))


def test_captions_name_everything_in_the_scene(many):
    for scene in many:
        for group in scene.groups:
            stem = group.noun[:4]  # plurals keep it
            assert stem in scene.caption
            assert (group.colour or "") in scene.caption
            assert said(COUNTS[group.count], scene)
            assert not group.size or said(group.size, scene)
        assert not scene.relation or said(scene.relation, scene)
        assert not scene.place or said(scene.place, scene)


def test_relations_are_true_of_the_boxes(many):
    related = [scene for scene in many if scene.relation]
    assert len(related) > 20
    for scene in related:
        first = scene.groups[0].count
        centres = np.array([((a + c) / 2, (b + d) / 2) for a, b, c, d in scene.boxes])
        ours, theirs = centres[:first].mean(0), centres[first:].mean(0)
        smaller, larger = {
            "to the left of": (ours[0], theirs[0]),
            "to the right of": (theirs[0], ours[0]),
            "above": (ours[1], theirs[1]),
            "below": (theirs[1], ours[1]),
        }[scene.relation]
        assert smaller < larger, scene.caption


def test_boxes_stay_inside_the_frame(many):
    boxes = np.array([box for scene in many for box in scene.boxes])
    assert boxes.min() >= 0
    assert boxes.max() <= 1


def test_wrong_captions_differ_from_the_right_one(many):
    rng = np.random.default_rng(1)
    for scene in many[:100]:
        wrong = caption_negatives(scene, rng)
        assert wrong
        assert scene.caption not in wrong


def test_every_noun_and_place_turns_up(many):
    captions = " ".join(scene.caption for scene in many)
    assert all(noun[:4] in captions for noun in NOUNS)
    assert all(place in captions for place in PLACES)
    assert all(variant in captions for words in VARIANTS.values() for variant in words)


@pytest.mark.parametrize("objects", [1, 2, 3, 4, 5])
def test_training_never_sees_what_is_held_out(objects):
    rng = np.random.default_rng(0)
    assert not any(held_out(sample_scene(rng, objects)) for _ in range(100))
    unseen = [sample_scene(rng, objects, unseen=True) for _ in range(20)]
    assert all(held_out(scene) for scene in unseen)
    assert all(scene.objects == objects for scene in unseen)


def test_about_one_pairing_in_twelve_is_held_out():
    pairs = [Scene((Group(n, colour=c),), None, None, (), "") for n in NOUNS for c in COLOURS]
    assert 1 / 18 < np.mean([held_out(scene) for scene in pairs]) < 1 / 8


def test_the_plainest_wording_says_things_as_they_are_named():
    groups = (Group("owl"), Group("apple", 2, "red", "small"))
    assert describe(Scene(groups, "above", "at night", (), "")) == (
        "an owl above two small red apples at night"
    )


@needs_font
def test_batches_repeat_by_seed():
    first, second = (list(islice(batches(5, 4), 2)) for _ in range(2))
    for (a, captions, _), (b, again, _) in zip(first, second, strict=True):
        assert np.array_equal(a, b)
        assert captions == again
        assert a.shape == (4, 128, 128, 3)


@needs_font
def test_objects_are_drawn_where_their_boxes_are():
    rng = np.random.default_rng(2)
    scene = next(s for s in iter(lambda: sample_scene(rng, 1), None) if s.place is not None)
    one = draw(scene, np.random.default_rng(0)).astype(int)
    x0, y0, x1, y1 = (round(128 * edge) for edge in scene.boxes[0])
    inside = one[y0:y1, x0:x1].reshape(-1, 3).std(0).mean()
    assert inside > 15


@needs_font
def test_the_sheet_is_written(tmp_path):
    write_sheet(tmp_path / "sheet.png", 0)
    assert (tmp_path / "sheet.png").stat().st_size > 50_000


def test_a_missing_font_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(scenes, "FONT_PATHS", (tmp_path / "none.ttf",))
    scenes._font.cache_clear()
    with pytest.raises(FontMissing, match="fonts-noto-color-emoji"):
        scenes._font()
    scenes._font.cache_clear()
