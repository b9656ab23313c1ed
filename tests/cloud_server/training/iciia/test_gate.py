"""From which length of history on the module is asked: where it takes nothing from anybody."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cloud_server.training.iciia.gate import least_history
from cloud_server.training.iciia.learn import Cohort
from cloud_server.training.iciia.module import Iciia, IciiaConfig


class FromFive(Iciia):
    """Names every picture rightly that is a number and its own features, from five others on."""

    def forward(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        assert rows is not None
        own = features.index_select(-2, rows)
        return own if features.shape[-2] > 5 else own.flip(-1)


@pytest.fixture
def model() -> FromFive:
    return FromFive(IciiaConfig(width=32, classes=32, layers=1, groups=2))


@pytest.fixture
def plain_cohort(cohort: Cohort) -> Cohort:
    """The cohort's clients and splits, with features that are the label itself."""
    labels = cohort.labels % 16
    return replace(cohort, features=torch.eye(32)[labels], labels=labels)


def some_right(cohort: Cohort, share: float) -> Tensor:
    """Return names of which a share is right, spread evenly."""
    wrong = np.arange(len(cohort.labels)) % 100 >= 100 * share
    return torch.from_numpy(np.where(wrong, 31, cohort.labels))


def test_it_is_the_shortest_from_which_on_nothing_is_lost(
    model: FromFive, plain_cohort: Cohort
) -> None:
    assert least_history(model, some_right(plain_cohort, 0.5), plain_cohort, 0) == 5
    assert least_history(model, some_right(plain_cohort, 1.0), plain_cohort, 0) == 5


def test_however_good_it_is_not_asked_without_a_history(
    model: FromFive, plain_cohort: Cohort
) -> None:
    assert least_history(model, some_right(plain_cohort, 0.0), plain_cohort, 0) == 1


def test_what_is_never_as_good_is_never_asked(model: FromFive, plain_cohort: Cohort) -> None:
    turned = replace(plain_cohort, features=plain_cohort.features.flip(-1))
    assert least_history(model, some_right(plain_cohort, 1.0), turned, 0) is None


def test_lengths_that_no_client_has_are_not_judged(model: FromFive, plain_cohort: Cohort) -> None:
    few = replace(plain_cohort, clients=np.arange(len(plain_cohort.labels)) // 12)
    assert least_history(model, some_right(few, 0.0), few, 0) == 1  # of three pictures each
    assert least_history(model, some_right(few, 1.0), few, 0) is None
