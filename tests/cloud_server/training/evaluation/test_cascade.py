"""Choosing by picture on a made-up pair, where the edge's pictures of a prompt differ widely."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from cloud_server.training.encoders import Features
from cloud_server.training.evaluation.baselines import Known
from cloud_server.training.evaluation.cascade import after_a_look, cascade, pictures
from cloud_server.training.evaluation.evaluate import evaluate
from cloud_server.training.evaluation.report import page
from cloud_server.training.evaluation.splits import cross_validation, held_out
from cloud_server.training.evaluation.truth import Case, Truth
from cloud_server.training.intervals import resamples
from cloud_server.training.quality import ALIGNMENT, Metric
from tests.made_up import EXTRAS, METRICS, WEIGHTS, make_world

CLIP = {"scorer": {"clip": "a clip", "digest": "c" * 64, "alignment": None}}


@pytest.fixture(scope="module")
def noisy():
    """A world with pictures that differ more than prompts do, labelled by a CLIP."""
    made = make_world(noise=0.06)
    described = tuple(
        Metric(name, "", "", weight) for name, weight in zip(METRICS, WEIGHTS, strict=True)
    )
    return replace(made, labels=replace(made.labels, described=described, origin=CLIP))


@dataclass(frozen=True)
class Told:
    """A router that was told of every prompt what can be known before drawing."""

    features: Features
    signal: Any

    def distances(self, rows, seed):
        """D falls where the cloud gains; trainings by odd seeds see a little less."""
        d = 1 / (1 + np.exp(0.15 * (self.signal - self.signal.mean()) * (1 - 0.1 * (seed % 2))))
        return np.repeat(d[:, None], len(METRICS), axis=1)


@pytest.fixture(scope="module")
def router(noisy):
    hidden = torch.from_numpy(noisy.embeddings[:, None]).float()
    return Told(Features(hidden, torch.ones(hidden.shape[:2])), noisy.signal)


def case(world, judge_pictures=None):
    judge = None if judge_pictures is None else judge_pictures.mean(1)
    return Case(
        world.labels, world.weights, ("a", "b"), world.nouns, "nouns", judge, judge_pictures
    )


def methods(world):
    """Ours knows of every prompt all that can be known before drawing."""
    return [Known("ours", "ours", world.signal), Known("random", "random", np.zeros(240)),
            Known("nouns", "nouns", world.nouns)]  # fmt: skip


@pytest.fixture(scope="module")
def report(noisy, router):
    """The judge sees what CLIP sees of the first metric, by a tenth of it."""
    q = noisy.labels.q[..., 0]
    judged = 0.1 * (q[1].mean(1, keepdims=True) - q[0])
    plan = held_out(noisy.labels.prompts, 160, 2, 0)
    return evaluate(case(noisy, judged), plan, methods(noisy), router=router)


def by_key(cascaded):
    return {row["key"]: row for row in cascaded["rows"]}


def chosen(world, plan, router, ours, seed=0):
    counts = resamples(len(plan.rows), seed)
    return by_key(cascade(case(world), plan, ours, router, counts))


def test_a_look_beats_all_that_can_be_known_before_drawing(report):
    rows = by_key(report["cascade"])
    assert list(rows) == ["before", "after", "quality", "oracle"]
    less = rows["after"]["ours_more"]
    for number in ("delta_p_50", "apgr", "judge_50"):
        assert less[number]["high"] < 0, number
    assert rows["before"]["ours_more"]["delta_p_50"] == {"mean": 0, "low": 0, "high": 0, "n": 160}
    assert report["cascade"]["pictures"] == 4 * 160
    assert len(rows["after"]["runs"]["apgr"]) == 2


def test_no_way_is_better_than_the_oracle(report):
    *ways, oracle = report["cascade"]["rows"]
    for way in ways:
        assert way["numbers"]["gain_area"]["mean"] < oracle["numbers"]["gain_area"]["mean"]
        assert all(
            mine <= best + 1e-9
            for mine, best in zip(
                way["curves"]["delta_p"], oracle["curves"]["delta_p"], strict=True
            )
        )


def test_a_choice_by_prompt_is_worth_the_same_by_picture(report):
    """Also its interval is: the same prompts are resampled, with all of their pictures."""
    by_prompt = report["methods"][0]["numbers"]
    by_picture = by_key(report["cascade"])["before"]["numbers"]
    for number in ("delta_p_25", "delta_p_50", "plain_80", "apgr", "gain_area", "judge_50"):
        assert by_picture[number] == pytest.approx(by_prompt[number]), number


def test_pictures_that_are_copies_narrow_no_interval(noisy, router):
    once = replace(noisy.labels, q=noisy.labels.q[:, :, :1], seeds=(0,))
    copied = replace(noisy.labels, q=once.q.repeat(4, 2))
    plan = held_out(noisy.labels.prompts, 160, 1, 0)
    ours = noisy.signal[plan.rows][None]
    one, four = (
        chosen(replace(noisy, labels=labels), plan, router, ours) for labels in (once, copied)
    )
    for key in ("before", "quality", "oracle"):
        for part in ("numbers", "ours_more"):
            for number in ("delta_p_50", "apgr", "right_50"):
                if number in one[key][part]:
                    expected = pytest.approx(one[key][part][number], abs=1e-9)
                    assert four[key][part][number] == expected, (key, part, number)


def test_the_critic_learns_nothing_from_prompts_that_are_judged(noisy, router):
    plan = held_out(noisy.labels.prompts, 160, 1, 0)
    q = noisy.labels.q.copy()
    q[1, plan.rows] = 1 - q[1, plan.rows]
    changed = replace(noisy.labels, q=q)
    found = after_a_look(router, noisy.labels, plan)
    np.testing.assert_array_equal(after_a_look(router, changed, plan), found)
    training = plan.runs[0][0].training
    q[1, training] = 1 - q[1, training]
    assert (after_a_look(router, changed, plan) != found).any()


def test_every_fold_judges_in_percentiles_of_its_own(noisy, router):
    labels = replace(noisy.labels, q=noisy.labels.q.copy())
    labels.q[:, 7, 1] = np.nan  # as of a prompt that was drawn with fewer seeds
    plan = cross_validation(labels.prompts, 4, 2, 0)
    found = after_a_look(router, labels, plan)
    assert found.shape == (2, 240, 4)
    assert np.argwhere(np.isnan(found)).tolist() == [[0, 7, 1], [1, 7, 1]]
    for run, ranks in zip(plan.runs, found, strict=True):
        for fold in run:
            assert np.nanmean(ranks[fold.judged]) == pytest.approx(0.5)
    assert (found[0] != found[1]).any()
    rows = chosen(replace(noisy, labels=labels), plan, router, noisy.signal[None])
    assert len(rows["after"]["runs"]["apgr"]) == 2


def test_alignment_is_a_way_of_its_own_where_it_was_measured(noisy, router):
    aligned = replace(noisy.labels, metrics=(*METRICS[:2], ALIGNMENT))
    plan = held_out(noisy.labels.prompts, 160, 1, 0)
    ours = noisy.signal[plan.rows][None]
    rows = chosen(replace(noisy, labels=aligned), plan, router, ours)
    assert list(rows) == ["before", "after", "quality", "alignment", "oracle"]
    shown = rows["alignment"]["numbers"]
    best = max(rows, key=lambda key: rows[key]["numbers"][f"metric_50 {ALIGNMENT}"]["mean"])
    assert best == "alignment", "which knows the noise of that metric, and no way else does"
    assert shown["delta_p_50"]["mean"] < rows["after"]["numbers"]["delta_p_50"]["mean"]


def test_pictures_are_counted_in_the_units_of_their_prompts(noisy):
    """So Gamma is that of the prompts, though these pictures differ more and would get a wider."""
    rows = np.arange(40, 240)
    prompt, seed, truth = pictures(noisy.labels, noisy.weights, rows)
    whole = Truth.of(noisy.labels, noisy.weights, rows)
    np.testing.assert_allclose(truth.gaps, whole.gaps)
    np.testing.assert_array_equal(truth.edge[5], noisy.labels.q[0, rows[prompt[5]], seed[5]])
    by_prompt = np.bincount(prompt, truth.gain) / 4
    np.testing.assert_allclose(by_prompt, whole.gain)
    same = replace(truth, edge=whole.edge[prompt])
    np.testing.assert_allclose(same.prs, whole.prs[prompt])
    assert abs(replace(truth, gamma=None).prs - truth.prs).max() > 0.01


def test_ratings_cannot_be_looked_at(noisy, router):
    plan = held_out(noisy.labels.prompts, 160, 1, 0)
    rated = replace(noisy, labels=replace(noisy.labels, origin={}))
    found = evaluate(case(rated), plan, methods(noisy), router=router)
    assert found["cascade"] is None
    assert len(found["verdict"]["sentences"]) == 2
    assert "After a look" not in page(found | EXTRAS | {"judge": None}, {})
    assert evaluate(case(noisy), plan, methods(noisy))["cascade"] is None, "no router"


def test_the_page_shows_it_and_the_verdict_says_it(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    text = page(report | EXTRAS, {})
    assert "<h2>After a look at the edge's picture</h2>" in text
    assert "The judge that is not CLIP is the check." in text
    assert text.count("<svg") == 9
    said = report["verdict"]["sentences"][2]
    gain = -by_key(report["cascade"])["after"]["ours_more"]["delta_p_50"]["mean"]
    assert f"{100 * gain:.1f} points above choosing before drawing (difference +" in said
    assert "by the judge that is not CLIP the difference is +" in said
