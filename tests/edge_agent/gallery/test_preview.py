"""The preview's file: whole at any time, never another's, gone at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from edge_agent.errors import Cancelled
from edge_agent.gallery.preview import PreviewFile

RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))


def test_each_picture_replaces_the_one_before_and_the_last_goes(tmp_path: Path) -> None:
    with PreviewFile(tmp_path / "a.preview.png") as file:
        assert os.listdir(tmp_path) == []
        assert file.show(RED) == f"see {tmp_path / 'a.preview.png'} while it is drawn"
        for picture in (BLUE, RED):
            assert file.show(picture) is None
            with Image.open(tmp_path / "a.preview.png") as shown:
                assert shown.tobytes() == picture.tobytes()
        assert os.listdir(tmp_path) == ["a.preview.png"]
    assert os.listdir(tmp_path) == []


def test_it_goes_also_when_drawing_fails(tmp_path: Path) -> None:
    def draw() -> None:
        with PreviewFile(tmp_path / "a.preview.png") as file:
            file.show(RED)
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        draw()
    assert os.listdir(tmp_path) == []


def test_two_at_once_take_two_names(tmp_path: Path) -> None:
    wanted = tmp_path / "a.preview.png"
    with PreviewFile(wanted) as first, PreviewFile(wanted) as second:
        first.show(RED)
        second.show(BLUE)
        assert sorted(os.listdir(tmp_path)) == ["a-2.preview.png", "a.preview.png"]


def test_a_folder_that_is_gone_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    with PreviewFile(tmp_path / "gone" / "a.preview.png") as file:
        told = file.show(RED)
        assert told is not None
        assert told.startswith("no more previews: cannot write")
        assert file.show(BLUE) is None
