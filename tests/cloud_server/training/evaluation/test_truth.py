"""The numbers that routing is judged by: Delta P, who wins, who is dominated, what is noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cloud_server.training.evaluation.truth import Truth, halves, reliability
from cloud_server.training.labels import Labels
from tests.made_up import make_world

TEN = np.full(10, 0.1)


def one_seed(edge, cloud):
    q = np.stack([edge, cloud])[:, :, None].astype(float)
    names = tuple(f"m{i}" for i in range(q.shape[-1]))
    return Labels(q, ("p",) * q.shape[1], (0,), names, "")


def test_a_cloud_that_is_worse_on_one_of_ten_metrics_scores_80():
    """The paper's table: random routing at 50 % reaches 40.00, so all-cloud scores 80."""
    rng = np.random.default_rng(0)
    edge = rng.uniform(0.3, 0.6, (50, 10))
    shift = np.where(np.arange(10) == 3, -0.05, 0.05)
    truth = Truth.of(one_seed(edge, edge + shift), TEN, np.arange(50))
    assert truth.gain.mean() == pytest.approx(0.8)
    assert truth.gain.mean() / 2 == pytest.approx(0.4)


def test_delta_p_of_a_choice_is_the_formula_of_the_sheet(world):
    rows = np.arange(len(world.nouns))
    truth = Truth.of(world.labels, world.weights, rows)
    sent = world.signal > 0.3
    routed = np.where(sent[:, None], truth.cloud, truth.edge).mean(0)
    edge, cloud = truth.edge.mean(0), truth.cloud.mean(0)
    formula = (world.weights * (routed - edge) / np.abs(cloud - edge)).sum()
    assert (truth.gain * sent).mean() == pytest.approx(formula)
    plain = world.weights @ (routed - edge)
    assert (truth.plain_gain * sent).mean() == pytest.approx(plain)


def test_models_that_are_equal_on_a_metric_do_not_divide_by_zero():
    labels = one_seed([[0.5], [0.7]], [[0.5], [0.7]])
    truth = Truth.of(labels, np.ones(1), np.arange(2))
    assert truth.gain.tolist() == [0, 0]
    assert truth.cloud_wins.tolist() == [0.5, 0.5]


def test_who_wins_and_who_is_dominated():
    edge = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    cloud = [[0.6, 0.5], [0.6, 0.45], [0.5, 0.4], [0.5, 0.5]]
    truth = Truth.of(one_seed(edge, cloud), np.array([0.5, 0.5]), np.arange(4))
    assert [part.tolist() for part in truth.dominated] == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert truth.cloud_wins[[0, 2, 3]].tolist() == [1, 0, 0.5]


def test_swapping_the_models_swaps_who_wins(world):
    rows = np.arange(len(world.nouns))
    turned = replace(world.labels, q=world.labels.q[::-1])
    ours, theirs = (Truth.of(labels, world.weights, rows) for labels in (world.labels, turned))
    np.testing.assert_allclose(ours.cloud_wins, 1 - theirs.cloud_wins)
    np.testing.assert_allclose(ours.gain, -theirs.gain)


@pytest.mark.parametrize(("seeds", "ways"), [(1, 0), (2, 2), (3, 3), (4, 6)])
def test_half_of_the_seeds_choose_and_the_others_score(seeds, ways):
    world = make_world(prompts=12, seeds=seeds)
    rows = np.arange(3, 9)
    pairs = halves(world.labels, world.weights, rows)
    assert len(pairs) == ways
    whole = Truth.of(world.labels, world.weights, rows)
    for one, other in pairs:
        few = seeds // 2
        np.testing.assert_allclose(
            (few * one.edge + (seeds - few) * other.edge) / seeds, whole.edge
        )
        assert not np.allclose(one.edge, other.edge)
        np.testing.assert_array_equal(one.gaps, whole.gaps)


def test_reliability_is_the_part_of_the_differences_that_is_signal():
    rows = np.arange(4000)
    world = make_world(prompts=4000, seeds=4, noise=0.1)
    found = reliability(world.labels, world.weights, rows)
    gain = Truth.of(world.labels, world.weights, rows).gain
    perfect = make_world(prompts=4000, seeds=4, noise=0.0)
    signal = Truth.of(perfect.labels, perfect.weights, rows).gain
    assert found == pytest.approx(np.corrcoef(gain, signal)[0, 1] ** 2, abs=0.05)
    assert reliability(perfect.labels, perfect.weights, rows) == pytest.approx(1)
    single = make_world(prompts=10, seeds=1)
    assert reliability(single.labels, single.weights, np.arange(10)) is None
