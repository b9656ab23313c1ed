"""The gate's threshold: over it the module harms no more pictures than it helps."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cloud_server.training.iciia.gate import harmless


def over(scores: torch.Tensor, helped: torch.Tensor, threshold: float) -> int:
    """Return how many more are helped than harmed over a threshold."""
    return int((2 * helped.long() - 1)[scores > threshold].sum())


def test_stays_where_it_does_no_harm() -> None:
    scores, helped = torch.tensor([2.0, 1.0, -1.0]), torch.tensor([True, False, False])
    assert harmless(scores, helped) == 0.0


def test_rises_over_what_it_would_spoil() -> None:
    scores = torch.tensor([1.0, 4.0, 3.0, 2.0])
    helped = torch.tensor([False, True, False, False])
    assert harmless(scores, helped) == 2.0


def test_rises_over_everything_where_nothing_is_helped() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0])
    assert harmless(scores, torch.zeros(3, dtype=torch.bool)) == 3.0


def test_a_little_harm_may_be_allowed() -> None:
    scores = torch.tensor([1.0, 4.0, 3.0, 2.0])
    helped = torch.tensor([False, True, False, False])
    assert harmless(scores, helped, allowed=1) == 1.0
    assert harmless(scores, helped, allowed=2) == 0.0


@given(st.lists(st.tuples(st.integers(-20, 20), st.booleans()), unique_by=lambda one: one[0]))
def test_is_the_lowest_harmless_threshold(cases: list[tuple[int, bool]]) -> None:
    scores = torch.tensor([float(score) for score, _ in cases])
    helped = torch.tensor([good for _, good in cases], dtype=torch.bool)
    found = harmless(scores, helped)
    assert over(scores, helped, found) >= 0
    lower = [0.0, *(s for s in scores.tolist() if s > 0)]
    assert all(over(scores, helped, other) < 0 for other in lower if other < found)
