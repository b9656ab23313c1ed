"""Which sizes a network was compiled for is kept, and found again by what is known of a request."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.runtime.sizes import MOST, remember, remembered

PLAIN = {"sample": (1, 4, 8, 8), "timestep": (), "states": (1, 77, 32)}
GUIDED = {"sample": (2, 4, 8, 8), "timestep": (), "states": (2, 77, 32)}


def test_the_last_that_agrees_with_what_is_known_is_found(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "unet.sizes.json"
    assert remembered(file, {}) is None
    remember(file, PLAIN)
    remember(file, GUIDED)
    assert remembered(file, {}) == GUIDED
    assert remembered(file, {"sample": (1, 4, 8, 8)}) == PLAIN
    assert remembered(file, {"sample": (1, 4, 8, 16)}) is None
    remember(file, PLAIN)
    assert remembered(file, {}) == PLAIN
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_only_the_last_few_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "unet.sizes.json"
    for side in range(MOST + 1):
        remember(file, {"sample": (1, 4, 8, side)})
    found = [remembered(file, {"sample": (1, 4, 8, side)}) is not None for side in range(MOST + 1)]
    assert found == [False] + MOST * [True]


@pytest.mark.parametrize("content", ["", "[1]", "{", "[[1, 2]]", '[{"sample": 1}]', "null"])
def test_a_damaged_file_says_nothing_and_is_replaced(tmp_path: Path, content: str) -> None:
    file = tmp_path / "unet.sizes.json"
    file.write_text(content)
    assert remembered(file, {}) is None
    remember(file, PLAIN)
    assert remembered(file, {}) == PLAIN


def test_where_nothing_can_be_written_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    file = tmp_path / "cache" / "unet.sizes.json"
    remember(file, PLAIN)
    assert remembered(file, {}) is None
