"""`cloud-server evaluate-starter`: from folders to numbers, tables and a card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cloud_server.cli import main
from cloud_server.training.starter import evaluate, judge, scenes
from cloud_server.training.starter.card import MARKERS, card, rewrite
from cloud_server.training.starter.evaluate import Exam, _colours_swapped
from cloud_server.training.starter.judge import Detector, Judge, Vocabulary
from cloud_server.training.starter.scenes import Group
from tests.tiny import make_clip, make_pipeline

needs_font = pytest.mark.skipif(
    not any(path.exists() for path in scenes.FONT_PATHS),
    reason="drawing scenes needs the Debian package fonts-noto-color-emoji",
)
CARD = f"# Models\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nThe end.\n"


def run(*arguments: object) -> object:
    return CliRunner().invoke(main, ["evaluate-starter", *map(str, arguments)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return tiny models and a judge that knows nothing."""
    root = tmp_path_factory.mktemp("evaluate")
    make_clip(root / "models" / "clip")
    make_pipeline(root / "models" / "edge", seed=1, latent_size=16)
    make_pipeline(root / "models" / "cloud", seed=2, latent_size=16, unet_channels=(32, 96))
    Judge(Detector(Vocabulary()), Vocabulary(), "cpu").save(root / "judge")
    return root / "models", root / "judge"


@pytest.fixture(scope="module")
def outcome(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with report.json and CARD.md, by the command."""
    out = tmp_path_factory.mktemp("outcome")
    (out / "CARD.md").write_text(CARD, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "RETRIEVAL", 20)
        patch.setattr(evaluate, "SPOILED", 3)
        patch.setattr(judge, "THRESHOLD", 0.0)
        options = ["--models", folders[0], "--judge", folders[1], "--device", "cpu"]
        ran = run(*options, "--seed", 3, "--pictures", 2, "--compared", 2,
                  "--json", out / "report.json", "--card", out / "CARD.md")  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert ran.stdout == ""
    return out


@pytest.fixture(scope="module")
def report(outcome: Path) -> evaluate.Report:
    return json.loads((outcome / "report.json").read_text(encoding="utf-8"))


def estimates(of: object, path: str = "") -> list[tuple[str, dict[str, float] | None]]:
    """Return every estimate in a report with where it stands."""
    if not isinstance(of, dict):
        return [(path, None)] if of is None else []
    if "mean" in of and "n" in of:
        return [(path, of)]
    return [found for key, value in of.items() for found in estimates(value, f"{path}/{key}")]


@needs_font
def test_every_number_is_finite_and_in_its_interval(report):
    found = estimates(report)
    assert len(found) > 100
    for path, value in found:
        if value:
            assert np.isfinite([*value.values()]).all(), path
            assert value["low"] <= value["mean"] <= value["high"], path
            assert value["n"] > 0, path
    clip = report["clip"]
    across = clip["across"]
    assert across.keys() == across["Detail"].keys() == clip["auroc"].keys() - {"mean"}
    assert across["Detail"]["Detail"] == clip["auroc"]["Detail"]
    known = {path for path, value in found if value}
    for path in ("/autoencoder/psnr", "/clip/wrong_preferred/colour", "/clip/auroc/Realism",
                 "/clip/order/mean", "/clip/across/Detail/Color", "/right/cloud/objects/5",
                 "/right/truth/relations/all", "/gain/objects/all",
                 "/unseen/edge/objects/difference", "/cloud_better/looks/1",
                 "/cloud_better/router/5"):  # fmt: skip
        assert path in known


@needs_font
def test_a_report_says_what_it_is_of(report):
    assert report["command"].startswith("cloud-server evaluate-starter --models ")
    assert (report["seed"], report["pictures"], report["device"]) == (3, 2, "cpu")
    assert report["compared"] == report["cloud_better"]["looks"]["5"]["n"] == 2
    assert {"python", "torch", "routet2i-edge"} <= report["versions"].keys()
    sizes = report["models"]["parameters"]
    assert 0 < sizes["edge"] < sizes["cloud"]
    assert report["models"]["megabytes"] > 0
    assert min(report["seconds"].values()) > 0


@needs_font
def test_the_card_gets_the_numbers_and_keeps_the_rest(outcome, report):
    text = (outcome / "CARD.md").read_text(encoding="utf-8")
    assert text.startswith("# Models\n\n")
    assert text.endswith(f"{MARKERS[1]}\n\nThe end.\n")
    assert "old" not in text
    numbers = card(report)
    assert numbers in text
    assert rewrite(text, numbers) == text
    tables = [block.splitlines() for block in numbers.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_a_card_without_marks_is_refused_before_anything_is_measured(folders, tmp_path):
    file = tmp_path / "CARD.md"
    file.write_text("# Models\n", encoding="utf-8")
    ran = run("--models", folders[0], "--judge", folders[1], "--card", file)
    assert ran.exit_code == 1
    assert f"add the lines {MARKERS[0]} and {MARKERS[1]}" in ran.output
    assert file.read_text(encoding="utf-8") == "# Models\n"


def test_missing_folders_are_refused_in_one_sentence(folders, tmp_path):
    for options in (("--judge", tmp_path), ("--models", tmp_path)):
        ran = run("--models", folders[0], "--judge", folders[1], *options)
        assert ran.exit_code == 1
        assert ran.output.count("\n") == 1
        assert "cloud-server train-starter" in ran.output


def test_a_judge_of_another_world_is_refused(folders, tmp_path):
    small = Vocabulary(nouns=("cat", "dog"))
    Judge(Detector(small), small, "cpu").save(tmp_path / "judge")
    ran = run("--models", folders[0], "--judge", tmp_path / "judge")
    assert ran.exit_code == 1
    assert f"{len(scenes.NOUNS) - 2} of {len(scenes.NOUNS)} nouns" in ran.output


def test_an_exam_asks_for_one_to_five_objects_seen_and_unseen_in_the_same_form():
    exam = Exam.sample(4, seed=1)
    assert [scene.objects for scene in exam.scenes] == [
        k for k in range(1, 6) for _ in range(4)
    ] * 3
    unseen = np.array([scenes.held_out(scene) for scene in exam.scenes])
    assert unseen.tolist() == [False] * 20 + [True] * 20 + [False] * 20
    for scene, twin in zip(exam.scenes[20:40], exam.scenes[40:], strict=True):
        assert (scene.relation is None) == (twin.relation is None)
        assert sorted(g.count for g in scene.groups) == sorted(g.count for g in twin.groups)
    values = np.arange(60.0)
    np.testing.assert_array_equal(exam.usual(values), np.arange(20.0).reshape(5, 4))
    values[25] = np.nan
    pairs = exam.pairs(values)
    assert np.isnan(pairs[:, 5]).all()
    assert np.isnan(pairs).sum() == 2
    assert pairs[:, 0].tolist() == [20.0, 40.0]


def test_colours_are_exchanged_between_groups_that_differ_in_noun_and_colour():
    def caption(*groups: scenes.Group) -> str | None:
        return _colours_swapped(scenes.Scene(groups, None, None, (), ""))

    red, green, cat = Group("apple", 1, "red"), Group("apple", 2, "green"), Group("cat")
    assert caption(red, cat) == "an apple and a red cat"
    assert caption(green, Group("dog", 1, "red")) == "two red apples and a green dog"
    assert caption(red, green) is None
    assert caption(cat, Group("dog")) is None
    assert caption(cat) is None
