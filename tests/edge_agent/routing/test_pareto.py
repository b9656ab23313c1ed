from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_agent.routing.pareto import SPREAD, dataset_gaps, fit_gamma, prs, quality_distance

K = 10
qualities = arrays(np.float64, (K,), elements=st.floats(0, 1))
MU_EDGE, MU_CLOUD = np.linspace(0.4, 0.6, K), np.linspace(0.45, 0.58, K)
UNIFORM = np.full(K, 1 / K)


def of(edge: np.ndarray, cloud: np.ndarray) -> float:
    return float(prs(quality_distance(edge, cloud, MU_EDGE, MU_CLOUD, 8.0), UNIFORM))


@given(qualities, qualities)
def test_swapping_the_models_turns_prs_into_one_minus_prs(edge, cloud):
    assert of(edge, cloud) == pytest.approx(1 - of(cloud, edge), abs=1e-12)


@given(qualities)
def test_equal_pictures_are_worth_one_half(q):
    assert of(q, q) == 0.5


@given(qualities, qualities)
def test_better_on_every_metric_is_above_one_half(a, b):
    best, worst = np.maximum(a, b), np.minimum(a, b)
    assert of(best, worst) >= 0.5


@given(qualities, qualities, st.integers(0, K - 1), st.floats(0, 1))
def test_raising_one_quality_of_the_edge_never_lowers_prs(edge, cloud, i, higher):
    raised = edge.copy()
    raised[i] = max(edge[i], higher)
    assert of(raised, cloud) >= of(edge, cloud) - 1e-12


def test_the_distance_is_the_papers_formula():
    d = quality_distance([0.7], [0.6], [0.62], [0.66], gamma=5.0)
    assert d[0] == pytest.approx(1 / (1 + np.exp(-(0.7 - 0.6) / (5.0 * 0.04))))


def test_metrics_whose_means_coincide_are_divided_by_the_floor():
    assert dataset_gaps([0.5, 0.5], [0.5, 0.7], floor=1e-3) == pytest.approx([1e-3, 0.2])
    d = quality_distance([0.9], [0.1], [0.5], [0.5], gamma=1e-6)
    assert d[0] == 1.0


@pytest.mark.parametrize("weights", [[0.5, 0.4], [1.5, -0.5], [np.nan, 1.0]])
def test_weights_that_do_not_sum_to_one_are_refused(weights):
    with pytest.raises(ValueError, match="sum to 1"):
        prs([0.5, 0.5], weights)


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_a_gamma_that_is_not_positive_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        quality_distance([0.5], [0.5], [0.4], [0.6], gamma)


@pytest.mark.parametrize("scale", [0.001, 0.02, 0.2])
def test_gamma_spreads_the_labels_as_asked(scale):
    rng = np.random.default_rng(0)
    cloud = rng.uniform(0.3, 0.7, (400, K))
    edge = cloud - 0.3 * scale + scale * rng.normal(size=cloud.shape)
    mu_edge, mu_cloud = edge.mean(0), cloud.mean(0)
    gamma = fit_gamma(edge, cloud, mu_edge, mu_cloud)
    d = quality_distance(edge, cloud, mu_edge, mu_cloud, gamma)
    assert d.std(axis=0).mean() == pytest.approx(SPREAD, abs=1e-3)


def test_labels_too_alike_to_spread_still_get_a_gamma():
    same = np.full((5, K), 0.5)
    gamma = fit_gamma(same, same, same.mean(0), same.mean(0))
    assert gamma > 0
    assert np.isfinite(gamma)
