"""The demonstration's parts that need no models: its server, its bundle's age, its sheet."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from cloud_server.training.starter.scenes import NOUNS, PLURALS
from demo.__main__ import PROMPTS, deciding_metrics, ensure_bundle
from demo.server import DemoError, cloud_server
from demo.sheet import Tile, contact_sheet
from edge_agent import Decision, Route

METRICS = {"Detail": 0.62, "Clarity": 0.41, "Color": 0.3, "Layout": 0.55}


def decision(route: Route) -> Decision:
    return Decision(route, "", prs=0.5, score=0.5, threshold=0.5, share=0.3, metrics=METRICS)


def test_a_server_that_cannot_start_is_told_in_one_sentence(tmp_path: Path) -> None:
    missing = tmp_path / "no-model"
    with (
        pytest.raises(DemoError, match=r"ended before it served.*no-model"),
        cloud_server(missing, tmp_path / "log"),
    ):
        pytest.fail("a server without a model served")


def test_a_bundle_newer_than_its_models_is_kept(tmp_path: Path) -> None:
    starter, bundle = tmp_path / "starter", tmp_path / "bundle"
    for file in (starter / "edge" / "weights", bundle / "bundle.json"):
        file.parent.mkdir(parents=True)
        file.touch()
    os.utime(starter / "edge" / "weights", (1, 1))
    (tmp_path / "bundle-of.txt").write_text(str(starter))
    assert ensure_bundle(starter, bundle) == bundle


def test_a_bundle_of_other_models_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However new it is; the export itself, which takes a minute, is seen elsewhere."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    starters = [tmp_path / name for name in ("one", "other", "other")]
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").touch()
    for starter in starters:
        (starter / "edge").mkdir(parents=True, exist_ok=True)
        (starter / "edge" / "weights").touch()
        os.utime(starter / "edge" / "weights", (1, 1))
        ensure_bundle(starter, tmp_path / "bundle")
    assert [command[command.index("--starter") + 1] for command in asked] == [
        str(starters[0]), str(starters[1]),
    ]  # fmt: skip


def test_the_loudest_metrics_are_those_on_the_side_chosen() -> None:
    assert deciding_metrics(decision(Route.CLOUD)) == "Color 0.30, Clarity 0.41"
    assert deciding_metrics(decision(Route.EDGE)) == "Detail 0.62, Layout 0.55"


def test_prompts_go_from_one_noun_to_five_in_the_words_of_the_starter_world() -> None:
    plurals = {noun: PLURALS.get(noun, noun + "s") for noun in NOUNS}
    counts = [
        sum(f" {noun} " in f" {words} " or f" {plurals[noun]} " in f" {words} " for noun in NOUNS)
        for words in (prompt.replace(",", " ") for prompt in PROMPTS)
    ]
    assert len(PROMPTS) >= 12
    assert set(counts) == {1, 2, 3, 4, 5}


def test_the_contact_sheet_has_room_for_every_tile() -> None:
    picture = Image.new("RGB", (128, 128), (200, 30, 30))
    tile = Tile(picture, "a cat, " * 40, "device", (0, 90, 0), "prs 0.51")
    four, five = (contact_sheet([tile] * count, "title", "subtitle") for count in (4, 5))
    assert four.width == five.width
    assert five.height > four.height
    assert five.getpixel((five.width // 8, five.height - 250)) == (200, 30, 30)
