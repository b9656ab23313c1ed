"""Metrics as data: read, checked, and refused in one sentence."""

from __future__ import annotations

import pytest

from cloud_server.errors import DataError
from cloud_server.training.quality import Metric, load_metrics

GOOD = '[[metric]]\nname="A"\npositive="good"\nnegative="bad"\nweight=2\n'


def test_the_metrics_are_the_ten_of_the_paper_and_weigh_one():
    metrics = load_metrics()
    assert [m.name for m in metrics] == [
        "Definition", "Detail", "Clarity", "Sharpness", "Harmony",
        "Realism", "Color", "Consistency", "Layout", "Integrity",
    ]  # fmt: skip
    assert sum(m.weight for m in metrics) == pytest.approx(1)
    assert (metrics[0].positive, metrics[0].negative) == (
        "High definition photo",
        "Low definition photo",
    )


def test_metrics_can_come_from_another_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    assert load_metrics(file) == (Metric("A", "good", "bad", 2.0),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no metric"),
        ("metric = []", "holds no metric"),
        ("metric = 3", "holds no metric"),
        ("metric = [3]", "metric 1 is 3"),
        ("[[metric", "cannot read the metrics"),
        (GOOD + "[[metrics]]\n", "sets unknown 'metrics'"),
        (GOOD.replace('negative="bad"\n', ""), r"metric 1 \(A\) has no negative"),
        (GOOD.replace('name="A"\n', ""), "metric 1 has no name"),
        (GOOD.replace("weight=2", "weight=0"), r"metric 1 \(A\) has weight = 0"),
        (GOOD.replace("weight=2", "weight=-0.1"), "has weight = -0.1"),
        (GOOD.replace("weight=2", "weight=nan"), "has weight = nan"),
        (GOOD.replace("weight=2", 'weight="2"'), "has weight = '2'"),
        (GOOD.replace("weight=2", "weight=true"), "has weight = True"),
        (GOOD.replace('"bad"', '" "'), "has negative = ' '"),
        (GOOD.replace('"bad"', '"good"'), "the same text twice"),
        (GOOD.replace('"A"', '"Alignment"'), "means something else here"),
        (GOOD + 'colour="red"\n', r"metric 1 \(A\) sets unknown 'colour'"),
        (GOOD + GOOD, "metric 2 is a second 'A'"),
    ],
)
def test_bad_metrics_are_one_sentence_that_names_file_and_entry(tmp_path, text, told):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(DataError, match=told) as caught:
        load_metrics(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="cannot read the metrics"):
        load_metrics(tmp_path / "none.toml")
