"""The whole evaluation on a made-up pair: who wins is known beforehand."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import numpy as np
import pytest

from cloud_server.training.evaluation import details
from cloud_server.training.evaluation.baselines import Known
from cloud_server.training.evaluation.curves import Ranking
from cloud_server.training.evaluation.evaluate import evaluate, train
from cloud_server.training.evaluation.report import page
from cloud_server.training.evaluation.splits import cross_validation, held_out
from cloud_server.training.evaluation.truth import Case, Truth
from cloud_server.training.evaluation.verdict import interval, verdict
from tests.made_up import EXTRAS


@dataclass(frozen=True, eq=False)
class Noisy:
    """A router that knows the signal but for noise, another noise in every training."""

    key: str
    name: str
    signal: np.ndarray
    noise: float = 0.3
    learns: bool = True

    def fit(self, rows, seed):
        rng = np.random.default_rng([seed, len(rows)])
        return 0.5 + 0.1 * (self.signal + self.noise * rng.normal(size=len(self.signal)))


@dataclass(frozen=True, eq=False)
class Mean:
    """A router that learns nothing but the mean of its training prompts."""

    signal: np.ndarray
    key: str = "ours"
    name: str = "ours"
    learns: bool = True

    def fit(self, rows, seed):
        return np.full(len(self.signal), self.signal[rows].mean())


def methods(world, ours_noise=0.3, other_noise=3.0):
    n = len(world.signal)
    return [
        Noisy("ours", "ours", world.signal, ours_noise),
        Known("random", "random", np.zeros(n)),
        Known("nouns", "number of nouns", world.nouns),
        Noisy("other", "another & <other> way", world.signal, other_noise),
    ]


def case(world, judge=True):
    gain = 0.1 * world.signal + 0.05 if judge else None
    return Case(world.labels, world.weights, ("edge@1", "cloud@2"), world.nouns, "nouns", gain)


@pytest.fixture(scope="module")
def report(world):
    plan = held_out(world.labels.prompts, 160, 2, 0)
    ablations = [
        Noisy("gated", "the gated network", world.signal),
        Noisy("no_selection", "without token selection", world.signal, 1.5),
    ]
    return evaluate(case(world), plan, methods(world), ablations)


def by_key(report):
    return {row["key"]: row for row in report["methods"]}


def test_the_report_is_plain_data(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_random_is_a_half_and_the_better_router_wins(report):
    rows = by_key(report)
    assert rows["random"]["numbers"]["apgr"]["mean"] == 0.5
    assert rows["random"]["numbers"]["delta_w_50"]["mean"] == pytest.approx(0, abs=1e-9)
    assert rows["other"]["ours_more"]["apgr"]["low"] > 0
    assert rows["random"]["ours_more"]["judge_50"]["low"] > 0
    assert rows["ours"]["numbers"]["saved_40"]["low"] > 0.2
    assert len(set(rows["ours"]["runs"]["apgr"])) == 2
    assert rows["ours"]["numbers"]["apgr"]["mean"] == pytest.approx(
        np.mean(rows["ours"]["runs"]["apgr"])
    )


@pytest.mark.parametrize("gain", [0.0, -0.03], ids=["equal", "worse"])
def test_a_cloud_that_is_no_better_has_no_gap_to_recover(world, gain):
    q = world.labels.q.copy()
    q[1] += gain - (q[1] - q[0]).mean((0, 1))  # every metric's mean gain
    labels = replace(world.labels, q=q)
    plan = held_out(labels.prompts, 160, 1, 0)
    found = evaluate(case(replace(world, labels=labels)), plan, methods(world))
    json.dumps(found, allow_nan=False)
    ours = by_key(found)["ours"]
    if gain:
        assert ours["numbers"]["apgr"] == {"mean": None, "low": None, "high": None, "n": 160}
        assert ours["runs"]["apgr"] == [None]
        assert "gains nothing, so there is no gap to recover" in found["verdict"]["sentences"][1]
    assert ours["numbers"]["gain_area"]["low"] > 0, "good routing is worth something all the same"
    assert "nan" not in page(found | EXTRAS, {})


def test_oracles_hold_what_is_possible_between_them(report, world):
    naive, split = report["oracles"]
    rows = np.arange(240)
    assert naive["numbers"]["efficiency"]["mean"] == pytest.approx(1)
    assert split["numbers"]["apgr"]["mean"] < naive["numbers"]["apgr"]["mean"]
    perfect = Ranking(world.signal).curve(Truth.of(world.labels, world.weights, rows).gain)
    assert split["numbers"]["apgr"]["mean"] < perfect.apgr()[0] + 0.1


def test_numbers_agree_with_the_curve_that_is_drawn(report):
    for row in report["methods"] + report["oracles"]:
        at = dict(zip(report["grid"], row["curves"]["delta_p"], strict=True))
        assert at[0.5] == pytest.approx(row["numbers"]["delta_p_50"]["mean"])
        assert at[0.0] == 0
        assert at[1.0] == pytest.approx(report["pair"]["cloud_delta_p"]["mean"])
        by_metric = [row["numbers"][f"metric_50 {m['name']}"]["mean"] for m in weights(report)]
        mean = np.dot([m["weight"] for m in weights(report)], by_metric)
        assert mean == pytest.approx(row["numbers"]["delta_p_50"]["mean"])
        assert row["numbers"]["worst_metric_50"]["mean"] <= min(by_metric) + 1e-9


def weights(report):
    return report["pair"]["metrics"]


def test_ablations_are_held_against_their_first(report):
    full, less = report["ablations"]
    assert full["ours_more"]["delta_w_50"]["mean"] == 0
    assert less["ours_more"]["delta_w_50"]["low"] > 0


def test_shares_are_got_and_the_cap_only_lowers_them(report):
    for row in report["shares"]:
        assert row["got"]["low"] <= row["asked"] <= row["got"]["high"]
        assert row["capped"]["mean"] <= row["got"]["mean"] + 1e-9


def test_more_nouns_more_cloud(report, world):
    rows = report["nouns"]["rows"]
    assert sum(row["prompts"] for row in rows) == len(world.nouns)
    assert rows[0]["cloud_wins"]["high"] < rows[-1]["cloud_wins"]["low"]


def test_rare_numbers_of_nouns_stand_together(world):
    truth = Truth.of(world.labels, world.weights, np.arange(240))
    nouns = np.repeat([0, 1, 2, 3, 7, 9], [2, 11, 100, 110, 12, 5])
    rows = details.by_nouns(truth, nouns, 0)
    said = [(row["nouns"].replace("\N{EN DASH}", "-"), row["prompts"]) for row in rows]
    assert said == [("0-1", 13), ("2", 100), ("3", 110), ("7-9", 17)]
    assert len(details.by_nouns(truth, np.full(240, 4), 0)) == 1


def test_the_worst_regret_is_the_most_that_was_given_away(report):
    lost = [one["lost"] for one in report["regrets"]]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] > 0
    for one in report["regrets"]:
        assert (one["true_prs"] > 0.5) == (one["route"] == "cloud")


def test_cross_validation_judges_every_prompt_in_percentiles_of_its_fold(world):
    plan = cross_validation(world.labels.prompts, 4, 2, 0)
    trained = train(Noisy("ours", "ours", world.signal), plan)
    assert trained.ranks.shape == (2, 240)
    for run, ranks in zip(plan.runs, trained.ranks, strict=True):
        for fold in run:
            assert ranks[fold.judged].mean() == pytest.approx(0.5)
    unlearnt = train(Mean(world.signal), plan).raw
    np.testing.assert_allclose(unlearnt, unlearnt[:, :1].repeat(240, 1), atol=1e-12)
    found = evaluate(case(world, judge=False), plan, methods(world))
    assert by_key(found)["ours"]["numbers"]["apgr"]["low"] > 0.5
    assert "judge_apgr" not in by_key(found)["ours"]["numbers"]


def test_the_same_seed_gives_the_same_report(world):
    plan = held_out(world.labels.prompts, 100, 1, 0)
    one, other = (evaluate(case(world), plan, methods(world), seed=3) for _ in range(2))
    assert one == other


def test_a_single_picture_and_metric_are_enough(world):
    labels = replace(world.labels, q=world.labels.q[:, :, :1, :1], seeds=(0,), metrics=("Sharp",))
    alone = Case(labels, np.ones(1), ("a", "b"), world.nouns, "nouns")
    found = evaluate(alone, held_out(labels.prompts, 100, 1, 0), methods(world))
    assert [row["key"] for row in found["oracles"]] == ["oracle"]
    assert found["pair"]["reliability"] is None
    assert found["pair"]["cloud_delta_p"]["mean"] == pytest.approx(1)
    drawn = page(found | EXTRAS | {"judge": None}, {})
    assert "Another judge" not in drawn


def test_the_fixed_quantile_drifts_and_the_paced_threshold_does_not():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.51, 0.9, 3000)
    found = details.drift(scores, scores, 0)["score"]["capped"]
    assert found["paced"]["worst"] <= 0.03
    assert found["fixed"]["worst"] >= 0.5
    assert len(found["paced"]["windows"]) == 4


def test_predictions_that_are_right_lie_on_the_line():
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0.3, 0.7, 2000)
    found = details.calibration(predicted, predicted + rng.normal(0, 0.05, 2000), 0)
    assert found["slope"]["low"] <= 1 <= found["slope"]["high"]
    for one in found["bins"]:
        assert one["true"]["mean"] == pytest.approx(one["predicted"], abs=0.02)
    constant = details.calibration(np.full(50, 0.5), predicted[:50], 0)
    assert constant["correlation"]["mean"] is None


class Names(HTMLParser):
    """What a page holds: tags opened and closed, and every address."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "img", "path", "use", "rect"):
            self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_is_whole(report, tmp_path):
    from PIL import Image

    picture = tmp_path / "edge.png"
    Image.new("RGB", (8, 8)).save(picture)
    row = report["regrets"][0]["row"]
    text = page(report | EXTRAS, {row: (picture, None)})
    names = Names()
    names.feed(text)
    assert names.open == []
    assert all(address.startswith(("data:", "#")) for address in names.addresses)
    assert text.count("data:image/png;base64,") == 1
    assert "another &amp; &lt;other&gt; way" in text
    assert report["verdict"]["sentences"][0].replace("<", "&lt;").replace("&", "&amp;")[:40] in text
    assert text.count("<svg") == 8
    assert "None" not in text
    assert "nan" not in text.lower().replace("finance", "")


@pytest.mark.parametrize(
    ("ours", "other", "said"),
    [(0.3, 4.0, "points above"), (4.0, 0.1, "points below"), (0.3, 0.31, "not told apart from")],
)
def test_the_verdict_is_honest_either_way(world, ours, other, said):
    plan = held_out(world.labels.prompts, 200, 1, 0)
    found = evaluate(case(world), plan, methods(world, ours, other))
    assert said in found["verdict"]["sentences"][0]


def test_the_verdict_says_never(report):
    worse = json.loads(json.dumps(report))
    for row in worse["methods"]:
        row["numbers"]["calls_50"] = {"mean": None, "low": None, "high": None, "never": True}
    assert "never reached" in verdict(worse)["sentences"][1]


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (
            {"mean": -0.1234, "low": -0.2, "high": 0.3},
            "\N{MINUS SIGN}12.3 [\N{MINUS SIGN}20.0, 30.0]",
        ),
        ({"mean": 0.5, "low": 0.5, "high": 0.5}, "50.0"),
        ({"mean": 0.5, "low": 0.4, "high": None}, "50.0 [40.0, never]"),
        ({"mean": None, "low": None, "high": None, "never": True}, "never"),
        ({"mean": None, "low": None, "high": None}, "\N{EN DASH}"),
        (None, "\N{EN DASH}"),
    ],
)
def test_numbers_are_said_with_their_intervals(estimate, text):
    assert interval(estimate, 100, 1) == text
