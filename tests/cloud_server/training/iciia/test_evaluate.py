"""The whole comparison on a small cohort, its page, and both commands end to end."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from cloud_server.cli import main
from cloud_server.training.iciia.evaluate import Subject, evaluate, summary
from cloud_server.training.iciia.learn import Cohort, Schedule
from cloud_server.training.iciia.module import IciiaConfig, tiny_groups
from cloud_server.training.iciia.recognizer import Recognizer
from cloud_server.training.iciia.report import page


@pytest.fixture(scope="module")
def subject(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    classifier = nn.Linear(32, 40)  # knows pairs of classes, and takes every other for the even one
    centres = [cohort.features[cohort.labels // 2 == i].mean(0) for i in range(20)]
    with torch.no_grad():
        classifier.weight.copy_(torch.stack(centres).repeat_interleave(2, 0))
        classifier.weight[1::2] += 0.05 * torch.randn(20, 32, generator=torch.manual_seed(0))
        classifier.bias.copy_(-classifier.weight.square().sum(1) / 2)
    few = cohort.clients < 30
    small = Cohort(
        cohort.features[few], cohort.labels[few], cohort.splits[few], cohort.clients[few] // 2
    )
    schedule = Schedule(learning_rate=0.05, clients=1, epochs=2)
    work = tmp_path_factory.mktemp("work")
    tiny = IciiaConfig(32, 40, layers=1, groups=tiny_groups(32))
    return Subject(small, classifier, tiny, schedule, (0, 1), work, sweep=True)


@pytest.fixture(scope="module")
def report(subject: Subject) -> dict:
    return evaluate(subject)


def test_every_method_is_measured_with_every_seed(report: dict) -> None:
    table = report["accuracy"]
    assert list(table) == [
        "backbone",
        "backbone's head trained on, no client",
        "fine-tuned head per client, by all of its labels",
        "prompt tuning per client, by all of its labels",
        "ICIIA-B",
        "ICIIA-T",
        "ICIIA-T, no shuffle",
        "ICIIA-B, convolution for attention",
        "ICIIA-B, no attention",
    ]
    assert [len(row["values"]) for row in table.values()] == [1] + [2] * 8
    assert all(0 <= value <= 100 for row in table.values() for value in row["values"])
    assert all(row["mean"] > 10 for row in table.values()), table  # a guess is at 2.5


def test_a_baseline_is_measured_once(subject: Subject, report: dict) -> None:
    name = "fine-tuned head per client, by all of its labels"

    def never(*_: object) -> float:
        raise AssertionError("it was measured before")

    again = [100 * subject.kept(name, never, seed) for seed in subject.seeds]
    assert again == report["accuracy"][name]["values"]


def test_without_history_the_gated_answer_is_the_backbones(report: dict) -> None:
    assert report["history"]["gated"]["0"] == report["history"]["backbone"]["0"]
    assert list(report["history"]["ICIIA-T"]) == ["0", "1", "2", "3", "5", "8", "15"]  # 24 a client
    assert list(report["heterogeneity"]["trained at 1, gated"]) == ["0", "0.25", "0.5", "0.75", "1"]


def test_brief_is_the_small_form_alone_and_the_same(subject: Subject, report: dict) -> None:
    brief = evaluate(replace(subject, brief=True, sweep=False))
    assert list(brief["accuracy"]) == ["backbone", "ICIIA-T"]
    assert brief["accuracy"]["ICIIA-T"] == report["accuracy"]["ICIIA-T"]
    assert list(brief["heterogeneity"]) == ["trained at 1, gated", "backbone"]
    assert "ICIIA-T" in page({"title": "brief", "command": "", **brief})


def test_layers_and_groups_are_swept(report: dict) -> None:
    sweep = report["sweep"]
    assert {name: list(row) for name, row in sweep.items()} == {
        "N = 1": ["1", "4", "16"],
        "N = 2": ["1", "4", "16"],
        "N = 3": ["1", "4", "16"],
        "no shuffle": ["4", "16"],
    }
    table = report["accuracy"]
    assert sweep["N = 1"]["16"]["values"] == table["ICIIA-T"]["values"]
    assert sweep["no shuffle"]["16"]["values"] == table["ICIIA-T, no shuffle"]["values"]


def test_a_mean_comes_with_its_standard_error() -> None:
    assert summary([1.0, 3.0]) == {"mean": 2.0, "error": pytest.approx(1.0), "values": [1.0, 3.0]}
    assert summary([1.0])["error"] is None


def test_the_page_holds_the_numbers_and_needs_nothing_else(report: dict) -> None:
    text = page({"title": "a <test>", "command": "x", **report})
    assert "a &lt;test&gt;" in text
    assert f"{report['accuracy']['ICIIA-T']['mean']:.2f} ±" in text
    assert text.count("<svg") == 3
    assert not re.search(r"(src|href)=\"http", text)


@pytest.mark.slow
def test_the_commands_from_a_manifest_to_a_report(manifest: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    train = ["train-recognizer", str(manifest), "-o", str(out), "--work", str(work)]
    train += ["--steps", "12", "--epochs", "2", "--dropout", "0.2"]
    train += ["--threads", "1", "--device", "cpu"]
    ran = CliRunner().invoke(main, train)
    assert ran.exit_code == 0, ran.output
    model = Recognizer.load(out)
    assert model.classes == ("colour 0", "colour 1", "colour 2", "colour 3")
    assert model.iciia.config.dropout == 0.2
    again = CliRunner().invoke(main, train)  # all is there already
    assert again.exit_code == 0, again.output
    measure = ["evaluate-recognizer", str(manifest), "--recognizer", str(out), "-o"]
    measure += [str(tmp_path / "report"), "--work", str(work), "--epochs", "2", "--seeds", "1"]
    ran = CliRunner().invoke(main, [*measure, "--threads", "1", "--device", "cpu"])
    assert ran.exit_code == 0, ran.output
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["settings"]["test pictures"] == 24
    assert "<svg" in (tmp_path / "report/report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.csv"], "the manifest nothing.csv cannot be read"),
        (["omniglot", "--omniglot", "nowhere"], "is missing; fetch it from github"),
        (["omniglot", "--backbone", "no_such_net"], "neither a backbone's folder nor a model"),
        (["omniglot", "--omniglot", "damaged"], "small1.zip cannot be opened (File is not a zip"),
    ],
)
def test_what_cannot_be_trained_on_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "images_background_small1.zip").write_bytes(b"PK")
    ran = CliRunner().invoke(main, ["train-recognizer", *arguments, "-o", "out"])
    assert ran.exit_code == 1
    assert words in ran.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "code", "words"),
    [
        ("", ["--clients", "drawer"], 1, "there are no clients by 'drawer' here; choose manifest"),
        ("", ["--groups", "7"], 2, "groups is 7, which does not divide the width 256"),
        ("", ["--device", "cuda:99"], 1, "device 'cuda:99' is not here"),
        (",val", [], 1, "no client has two pictures of the split 'val'"),
    ],
)
def test_what_will_not_do_is_said_before_anything_is_trained(
    manifest: Path, tmp_path: Path, change: str, arguments: list[str], code: int, words: str
) -> None:
    if change:  # all but one picture of the split are learnt from
        head, _, rest = manifest.read_text().partition(change)
        manifest.write_text(head + change + rest.replace(change, ",train"))
    work = ["-o", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    ran = CliRunner().invoke(main, ["train-recognizer", str(manifest), *work, *arguments])
    assert ran.exit_code == code
    assert words in ran.output
    assert not (tmp_path / "work").exists()


def test_groups_that_do_not_divide_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    known = Path(__file__).parents[4] / "models" / "recognizer" / "omniglot"
    measure = ["evaluate-recognizer", "omniglot", "--omniglot", "nowhere", "--groups", "7"]
    measure += ["--recognizer", str(known), "--work", str(tmp_path / "work")]
    ran = CliRunner().invoke(main, [*measure, "-o", str(tmp_path / "report")])
    assert ran.exit_code == 2
    assert "groups is 7, which does not divide the width 256" in ran.output
