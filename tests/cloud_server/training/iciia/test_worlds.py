"""Both worlds: every class is there, clients hold what they say, pictures repeat."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cloud_server.errors import ModelError
from cloud_server.training.iciia.backbone import Backbone, small_network
from cloud_server.training.iciia.train import open_source
from cloud_server.training.iciia.worlds import (
    DRAWERS,
    EMOJI_TEST,
    SIDE,
    VIEWS,
    EmojiWorld,
    named_emoji,
    omniglot,
)
from cloud_server.training.starter.scenes import FONT_PATHS

has_emoji = pytest.mark.skipif(
    not (EMOJI_TEST.is_file() and any(path.is_file() for path in FONT_PATHS)),
    reason="needs the Debian packages unicode-data and fonts-noto-color-emoji",
)


def test_emoji_of_one_code_point_are_read_with_their_subgroup(tmp_path: Path) -> None:
    file = tmp_path / "emoji-test.txt"
    file.write_text(
        "# subgroup: face-smiling\n"
        "1F600  ; fully-qualified     # 😀 E1.0 grinning face\n"
        "263A FE0F  ; fully-qualified     # ☺️ E0.6 smiling face\n"
        "263A  ; unqualified         # ☺ E0.6 smiling face\n"
        "# subgroup: family\n"
        "1F468 200D 1F469  ; fully-qualified     # 👨‍👩 E2.0 a family\n"
        "1F46A  ; fully-qualified     # 👪 E0.6 family\n",
        encoding="utf-8",
    )
    read = [(one.name, one.subgroup) for one in named_emoji(file)]
    assert read == [
        ("grinning face", "face-smiling"),
        ("smiling face", "face-smiling"),
        ("family", "family"),
    ]
    with pytest.raises(ModelError, match="install the Debian package unicode-data"):
        named_emoji(tmp_path / "none.txt")


@has_emoji
@pytest.mark.slow
def test_the_emoji_world() -> None:
    world = EmojiWorld()
    samples = world.samples()
    assert 1200 < len(samples.classes) == len(set(samples.classes))
    for name, most in (("subgroup", 70), ("random", 15)):
        clients = samples.clients[name]
        pairs = np.unique(np.stack([clients, samples.labels]), axis=1)
        assert np.bincount(pairs[0]).max() <= most
    random = samples.clients["random"]
    parts = [set(random[samples.of(split)]) for split in ("train", "val", "test")]
    assert not parts[0] & parts[1] | parts[1] & parts[2] | parts[0] & parts[2]
    one, again = samples.draw(np.array([3, 700, 5])), samples.draw(np.array([5]))
    assert one.shape == (3, SIDE, SIDE, 3)
    assert (one[2] == again[0]).all()
    assert not (one[0] == one[1]).all()
    (a, labels), (b, _), (c, _) = (samples.lesson(step, 8) for step in (1, 1, 2))
    assert (a == b).all()
    assert not (a == c).all()
    assert labels.max() < len(samples.classes)


def draw_alphabets(folder: Path, ink_of: Callable[[int, int], slice]) -> Path:
    """Write two alphabets of two characters, one of them in both files, inked in these rows."""
    for number, alphabets in ((1, ("Greek", "Latin")), (2, ("Latin",))):
        with zipfile.ZipFile(folder / f"images_background_small{number}.zip", "w") as archive:
            for alphabet, character, drawer in product(alphabets, (1, 2), range(1, 21)):
                paper = np.full((105, 105), 255, np.uint8)
                paper[ink_of(character, drawer)] = 0
                stream = io.BytesIO()
                Image.fromarray(paper).save(stream, "PNG")
                name = f"{alphabet}/character0{character}/0001_{drawer:02}.png"
                archive.writestr(f"images_background_small{number}/{name}", stream.getvalue())
    return folder


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """Drawings of which a drawer's number says how many rows are ink."""
    return draw_alphabets(tmp_path, lambda character, drawer: slice(5 * character, 4 * drawer))


def test_omniglot_is_split_by_drawer_and_met_by_alphabet_or_person(drawings: Path) -> None:
    samples = omniglot(drawings)
    assert len(samples.classes) == 4
    for split, drawers in DRAWERS.items():
        chosen = samples.of(split)
        once = np.unique(np.stack([samples.labels, samples.clients["drawer"]])[:, chosen], axis=1)
        assert len(chosen) == once.shape[1] * VIEWS[split] == 4 * len(drawers) * VIEWS[split]
    alphabet, drawer = samples.clients["alphabet"], samples.clients["drawer"]
    assert (alphabet == samples.labels // 2).all()
    parts = [set(drawer[samples.of(split)]) for split in DRAWERS]
    assert len(set.union(*parts)) == sum(map(len, parts))  # nobody drew for two of them


def test_a_drawing_has_several_pictures_that_can_be_drawn_again(drawings: Path) -> None:
    samples = omniglot(drawings)
    test = samples.of("test")
    pairs = np.stack([samples.labels, samples.clients["drawer"]])
    views = test[(pairs[:, test] == pairs[:, test[:1]]).all(0)]
    assert len(views) == VIEWS["test"]
    pictures = samples.draw(views)
    assert pictures.shape == (VIEWS["test"], SIDE, SIDE, 3)
    assert not (pictures[0] == pictures[1]).all()
    assert (pictures[1] == samples.draw(views[1:2])[0]).all()


def test_ink_is_darker_than_its_paper(drawings: Path) -> None:
    samples = omniglot(drawings)
    drawer = samples.clients["drawer"] % 100
    # A drawer's number is how many rows of ink it drew in here.
    light = [samples.draw(np.flatnonzero(drawer == who)).mean() for who in (1, 13)]
    assert light[0] > light[1] + 15


def test_omniglots_lessons_are_by_those_who_drew_for_training(tmp_path: Path) -> None:
    learnt = DRAWERS["train"]
    blank_or_black = draw_alphabets(
        tmp_path, lambda _, who: slice(0 if who in learnt else 105, 105)
    )
    samples = omniglot(blank_or_black)
    (lesson, labels), (again, _) = samples.lesson(0, 64), samples.lesson(0, 64)
    assert (lesson == again).all()
    assert set(labels) == set(range(4))
    others = samples.draw(samples.of("test"))
    assert np.median(lesson[:, 48, 48]) < 100 < np.median(others[:, 48, 48])


def test_omniglot_missing_says_where_it_is_from(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is missing; fetch it from github brendenlake/omniglot"):
        omniglot(tmp_path)


def test_a_world_is_not_read_by_a_backbone_for_another_size(drawings: Path) -> None:
    with pytest.raises(ModelError, match="takes pictures of 32 pixels, and those of omniglot have"):
        open_source("omniglot", drawings, Backbone(small_network(4, 32)))
    assert open_source("omniglot", drawings, Backbone(small_network(4, SIDE))).side == SIDE
