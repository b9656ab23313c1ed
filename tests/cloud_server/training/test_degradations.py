"""Degradations: one for each metric, graded, seeded, harmless at strength zero."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_server.training.quality import load_metrics
from cloud_server.training.starter.degradations import DEGRADATIONS, degrade


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    rows, columns = np.mgrid[0:128, 0:128] / 128
    base = np.stack([rows, columns, 1 - rows], -1) * 0.5 + 0.25
    disc = (rows - 0.5) ** 2 + (columns - 0.45) ** 2 < 0.06
    base[disc] = (0.9, 0.2, 0.1)
    base[disc & ((np.mgrid[0:128, 0:128].sum(0) // 4) % 2 == 0)] = (0.95, 0.9, 0.2)
    return base.astype(np.float32)


def test_there_is_one_for_every_metric():
    assert set(DEGRADATIONS) == {metric.name for metric in load_metrics()}


@pytest.mark.parametrize("metric", DEGRADATIONS)
def test_strength_zero_changes_nothing(picture, metric):
    assert np.array_equal(degrade(picture, metric, 0.0, np.random.default_rng(0)), picture)


@pytest.mark.parametrize("metric", DEGRADATIONS)
def test_more_strength_means_more_change(picture, metric):
    change = [
        np.mean(
            [
                np.abs(degrade(picture, metric, s, np.random.default_rng(i)) - picture).mean()
                for i in range(6)
            ]
        )
        for s in (0.1, 0.5, 1.0)
    ]
    assert 0 < change[0] < change[1] < change[2]


@pytest.mark.parametrize("metric", DEGRADATIONS)
def test_results_are_seeded_pictures_and_the_input_is_kept(picture, metric):
    before = picture.copy()
    first, second = (degrade(picture, metric, 0.7, np.random.default_rng(4)) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == picture.shape
    assert first.dtype == np.float32
    assert 0 <= first.min() <= first.max() <= 1
    assert np.array_equal(picture, before)


def test_an_unknown_metric_is_an_error(picture):
    with pytest.raises(KeyError, match="Beauty"):
        degrade(picture, "Beauty", 0.5, np.random.default_rng(0))
