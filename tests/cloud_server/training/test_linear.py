from __future__ import annotations

import numpy as np
import pytest

from cloud_server.training.linear import GRID, PRIOR, fit_columns, ridge_by_evidence


def world(prompts, noise, columns=8, width=60, seed=0):
    """Return features (N, width + 1) and qualities (N, columns) that share two directions.

    What distinguishes the first column from the second is in both directions, so that all the
    others help to learn it.
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(prompts, width + 1))
    shared = features[:, :width] @ rng.normal(size=(width, 2)) / width**0.5
    truth = shared @ rng.normal(size=(2, columns))
    return features, truth, truth + noise * rng.normal(size=truth.shape)


def predicted_gap(train, held_out, columns):
    fit = fit_columns(train, columns)
    predicted = held_out @ fit.weight + fit.bias
    return predicted[:, 1] - predicted[:, 0]


def ridge(train, held_out, target, strength):
    center = train.mean(0)
    gram = (train - center).T @ (train - center) + strength * np.eye(train.shape[1])
    weight = np.linalg.solve(gram, (train - center).T @ (target - target.mean()))
    return (held_out - center) @ weight + target.mean()


def test_without_noise_the_truth_is_found():
    features, truth, columns = world(600, noise=0.0)
    gap = truth[:, 1] - truth[:, 0]
    predicted = predicted_gap(features[:500], features[500:], columns[:500])
    assert np.corrcoef(predicted, gap[500:])[0, 1] > 0.98


def test_what_other_columns_share_beats_the_best_ridge_on_the_gap_alone():
    better = []
    for seed in range(12):
        features, truth, columns = world(220, noise=3.0, columns=24, width=30, seed=seed)
        gap, noisy = truth[120:, 1] - truth[120:, 0], columns[:120, 1] - columns[:120, 0]
        ours = predicted_gap(features[:120], features[120:], columns[:120])
        alone = [ridge(features[:120], features[120:], noisy, s) for s in np.geomspace(1, 3000, 12)]
        found = [np.corrcoef(predicted, gap)[0, 1] for predicted in (ours, *alone)]
        better.append(found[0] - max(found[1:]))  # the best strength in hindsight
    assert np.mean(better) > 0.1
    assert np.mean(better) > 2 * np.std(better) / len(better) ** 0.5


def test_pure_noise_is_shrunk_to_almost_nothing():
    rng = np.random.default_rng(0)
    features, columns = rng.normal(size=(200, 61)), rng.normal(size=(200, 2))
    predicted = predicted_gap(features, rng.normal(size=(200, 61)), columns)
    assert predicted.std() < 0.1 * (columns[:, 1] - columns[:, 0]).std()


def test_a_missing_score_is_taken_for_average():
    features, _, columns = world(200, noise=0.1)
    holes = columns.copy()
    holes[::7, 3] = np.nan
    filled = holes.copy()
    filled[::7, 3] = np.nanmean(holes[:, 3])
    a, b = fit_columns(features, holes), fit_columns(features, filled)
    np.testing.assert_allclose(a.weight, b.weight, atol=1e-9)


def test_a_feature_that_never_varies_gets_no_weight():
    features, _, columns = world(100, noise=0.1)
    features[:, -1] = 3.0
    fit = fit_columns(features, columns)
    assert (fit.weight[-1] == 0).all()
    assert np.isfinite(fit.weight).all()


def test_fewer_prompts_than_features_are_enough():
    features, _, columns = world(20, noise=0.1)
    fit = fit_columns(features, columns)
    assert np.isfinite(fit.weight).all()
    assert np.isfinite(fit.bias).all()


@pytest.mark.parametrize(("signal", "low", "high"), [(0.0, PRIOR, GRID[-1]), (30.0, GRID[0], 20.0)])
def test_the_ridge_follows_the_evidence(signal, low, high):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 40)) / 40**0.5
    y = signal * x @ rng.normal(size=40) / 40**0.5 + rng.normal(size=400)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    assert low <= ridge_by_evidence(s**2, u.T @ y, y @ y, 400) <= high
