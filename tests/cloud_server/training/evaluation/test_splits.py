"""Every prompt is judged by a router that never saw it, nor a near-duplicate of it."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_server.errors import ConfigError
from cloud_server.training.evaluation.splits import cross_validation, groups, held_out, normalised

PROMPTS = [f"thing {i % 40}" + ("!" if i % 2 else "") for i in range(100)]


def test_near_duplicates_are_alike_but_for_case_articles_and_punctuation():
    assert normalised("A red  Apple, on THE beach!") == normalised("red apple on a beach")
    assert normalised("two cats") != normalised("two cat")
    assert normalised("...") == "..."
    assert groups(["A cat", "a dog", "cat."]).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "plan", [cross_validation(PROMPTS, 5, 3, 0), held_out(PROMPTS, 31, 3, 0)], ids=["cv", "held"]
)
def test_no_prompt_is_learnt_and_judged(plan):
    alike = groups(PROMPTS)
    assert len(plan.runs) == 3
    for run in plan.runs:
        judged = np.concatenate([fold.judged for fold in run])
        assert sorted(judged) == plan.rows.tolist()
        for fold in run:
            assert not set(alike[fold.training]) & set(alike[fold.judged])
            assert len(fold.training) + len(fold.judged) == len(PROMPTS)
    assert len({fold.seed for run in plan.runs for fold in run}) == 3


def test_repeats_are_cut_differently_and_seeded():
    one, other = (cross_validation(PROMPTS, 5, 2, 7) for _ in range(2))
    cut = [[fold.judged.tolist() for fold in run] for run in one.runs]
    assert cut == [[fold.judged.tolist() for fold in run] for run in other.runs]
    assert cut[0] != cut[1]


def test_as_many_are_held_out_as_asked_for_or_a_few_less():
    assert len(held_out([f"p{i}" for i in range(50)], 20, 1, 0).rows) == 20
    assert 26 <= len(held_out(PROMPTS, 30, 1, 0).rows) <= 30


@pytest.mark.parametrize("judged", [0, 1, 99, 200])
def test_both_sides_need_prompts(judged):
    with pytest.raises(ConfigError, match="takes a number from 2 to 92, as 8 must be left"):
        held_out(PROMPTS, judged, 1, 0)


def test_folds_need_different_prompts():
    with pytest.raises(ConfigError, match="5 folds need at least as many different prompts"):
        cross_validation(["a cat", "A cat!", "a dog"], 5, 1, 0)


def test_every_training_needs_some_prompts():
    alike = [f"a cat {i}" for i in range(4)] + ["a dog", "A dog!", "the dog", "dog", "a dog."] * 2
    with pytest.raises(ConfigError, match=r"2 folds only [1-7] prompts are left to learn from"):
        cross_validation(alike, 2, 1, 0)
    with pytest.raises(ConfigError, match="of 9 prompts 3 cannot be held out; label more"):
        held_out(PROMPTS[:9], 3, 1, 0)


@pytest.mark.parametrize("make", [cross_validation, held_out], ids=["cv", "held"])
def test_only_those_among_which_is_chosen_are_judged_and_the_others_learnt_from(make):
    alike, among = groups(PROMPTS), np.arange(0, 60, 2)
    plan = make(PROMPTS, 10, 2, 0, among)
    assert set(plan.rows) <= set(among)
    for fold in (fold for run in plan.runs for fold in run):
        left = ~np.isin(alike, alike[fold.judged])
        np.testing.assert_array_equal(fold.training, np.flatnonzero(left))
        assert len(set(fold.training) - set(among))
