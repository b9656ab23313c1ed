from __future__ import annotations

import numpy as np
import pytest
import torch

from cloud_server.errors import DataError
from cloud_server.training import gated, router
from cloud_server.training.encoders import Features
from cloud_server.training.labels import Labels
from cloud_server.training.loop import Budget
from cloud_server.training.router import MEMBERS, Settings, check, distances, learn
from edge_agent.routing.pareto import SPREAD, prs

UNIFORM = np.full(10, 0.1)
STEPS = Budget(steps=120)


def labels_of(q):
    prompts, seeds, metrics = q.shape[1:]
    names = tuple(f"metric {i}" for i in range(metrics))
    return Labels(
        q, tuple(f"prompt {i}" for i in range(prompts)), tuple(range(seeds)), names, "made-up"
    )


def made_up_labels(prompts=40, seeds=3):
    rng = np.random.default_rng(0)
    q = rng.uniform(0.3, 0.7, (2, prompts, seeds, 10))
    q[1] += 0.05
    return labels_of(q)


def a_world_of_words(prompts=120, width=16, mixed=False, noise=0.02, seed=0):
    """Return features and labels; word 3 makes the edge's picture worse, wherever it stands.

    Where `mixed`, it does so only beside word 5, which a sum over words cannot say.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(8, width, generator=generator)
    chosen = torch.randint(8, (prompts, 6), generator=generator)
    has = [(chosen == word).any(1).numpy() for word in range(8)]
    costly = has[3] ^ has[5] if mixed else has[3]
    rng = np.random.default_rng(seed)
    q = 0.6 + noise * rng.normal(size=(2, prompts, 1, 2))
    q[0, costly] -= 0.2
    return Features(words[chosen], torch.ones(prompts, 6)), labels_of(q.clip(0, 1)), costly


def test_means_and_gamma_come_from_training_prompts_only():
    labels = made_up_labels()
    training = np.arange(30)
    mu, gamma, d = distances(labels, training)
    changed = labels.q.copy()
    changed[:, 30:] = 0.1
    same = distances(labels_of(changed), training)
    np.testing.assert_array_equal(mu, same[0])
    assert gamma == same[1]
    np.testing.assert_array_equal(d[:30], same[2][:30])
    assert d[:30].std(axis=0).mean() == pytest.approx(SPREAD, abs=1e-3)


def test_swapping_the_models_mirrors_prs():
    labels = made_up_labels()
    *_, d = distances(labels, np.arange(40))
    *_, mirrored = distances(labels_of(labels.q[::-1]), np.arange(40))
    np.testing.assert_allclose(prs(mirrored, UNIFORM), 1 - prs(d, UNIFORM))


@pytest.mark.parametrize("predictor", ["gated", "linear", "mixed"])
def test_it_learns_what_a_word_does_to_quality(tmp_path, predictor):
    features, labels, costly = a_world_of_words()
    learned = learn(
        features, labels, labels.weights, np.arange(90), 0,
        settings=Settings(predictor), work=tmp_path, budget=Budget(steps=250), device="cpu",
    )  # fmt: skip
    assert learned.model.config.kind == predictor
    assert learned.d.shape == learned.predict(features).shape == (120, 2)
    predicted = prs(learned.predict(features), labels.weights)[90:]
    assert predicted[costly[90:]].mean() < predicted[~costly[90:]].mean() - 0.15


def test_the_mixed_one_says_the_mean_of_the_linear_one_and_of_gated_ones(tmp_path):
    features, labels, _ = a_world_of_words(prompts=40)

    def predict(predictor, seed):
        return learn(
            features, labels, labels.weights, np.arange(30), seed,
            settings=Settings(predictor), work=tmp_path, budget=Budget(steps=5), device="cpu",
        ).predict(features)  # fmt: skip

    members = [predict("gated", 2 * MEMBERS + i) for i in range(MEMBERS)]
    expected = np.mean([*members, predict("linear", 2)], axis=0)
    np.testing.assert_allclose(predict("mixed", 2), expected, atol=1e-6)


@pytest.mark.parametrize("ablation", ["single_gate", "all_tokens", "single_metric"])
def test_each_ablation_can_be_learnt(tmp_path, ablation):
    features, labels, _ = a_world_of_words(prompts=40)
    learned = learn(
        features, labels, labels.weights, np.arange(30), 0,
        settings=Settings("gated", **{ablation: True}), work=tmp_path, budget=Budget(steps=5),
        device="cpu",
    )  # fmt: skip
    assert getattr(learned.model.config, ablation)
    d = learned.predict(features)
    assert d.shape == (40, 2)
    assert (d[:, 0] == d[:, 1]).all() == (ablation == "single_metric")


def test_the_same_seed_gives_the_same_router_also_after_an_interruption(tmp_path, monkeypatch):
    features, labels, _ = a_world_of_words(prompts=40)

    def run(work, stop_at=None):
        fit = gated.fit

        def interrupted(name, model, loss_fn, **settings):
            def loss(step):
                if step == stop_at:
                    raise KeyboardInterrupt
                return loss_fn(step)

            return fit(name, model, loss, **settings)

        with monkeypatch.context() as patch:
            patch.setattr("cloud_server.training.loop.CHECKPOINT_EVERY_S", 0.0)
            patch.setattr(gated, "fit", interrupted)
            return learn(
                features, labels, labels.weights, np.arange(30), 7,
                settings=Settings("gated"), work=work, budget=Budget(steps=8), device="cpu",
            ).predict(features)  # fmt: skip

    before = torch.random.get_rng_state()
    whole = run(tmp_path / "whole")
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=5)
    np.testing.assert_array_equal(run(tmp_path / "killed"), whole)


def test_few_prompts_are_seen_often_and_many_several_times():
    asked = [40, 500, 3000, 8000, 16_000]
    assert [gated.most_steps(prompts) for prompts in asked] == [200, 312, 1250, 1250, 2000]


def test_state_of_other_labels_or_settings_is_not_taken_up(tmp_path):
    features, labels, _ = a_world_of_words(prompts=40)

    def run(labels, seed=0, **settings):
        learn(
            features, labels, labels.weights, np.arange(30), seed,
            settings=Settings("gated", **settings), work=tmp_path, budget=Budget(steps=2),
            device="cpu",
        )  # fmt: skip
        return len(list(tmp_path.glob("*.pt")))

    other = a_world_of_words(prompts=40, seed=1)[1]
    assert [run(labels), run(labels)] == [1, 1]
    assert [run(labels, seed=1), run(labels, top_k=2), run(other)] == [2, 3, 4]


def test_auto_takes_the_linear_one_where_a_sum_over_words_says_it_all(tmp_path):
    features, labels, _ = a_world_of_words(prompts=60, noise=0.1)
    learned = learn(
        features, labels, labels.weights, np.arange(50), 0,
        settings=Settings("auto"), work=tmp_path, budget=Budget(steps=20), device="cpu",
    )  # fmt: skip
    assert learned.model.config.kind == "linear"


@pytest.mark.slow
def test_auto_takes_the_mixed_one_where_words_count_together(tmp_path):
    features, labels, _ = a_world_of_words(prompts=400, mixed=True, noise=0.01)
    learned = learn(
        features, labels, labels.weights, np.arange(360), 0,
        settings=Settings("auto"), work=tmp_path, budget=Budget(steps=400), device="cpu",
    )  # fmt: skip
    assert learned.model.config.kind == "mixed"


def test_auto_never_sees_prompts_outside_the_training(tmp_path, monkeypatch):
    features, labels, _ = a_world_of_words(prompts=40)
    seen = []

    def spy(features, labels, mu, gamma, rows, related):
        seen.append(rows)
        return fit(features, labels, mu, gamma, rows, related)

    fit = router._fit_linear
    monkeypatch.setattr(router, "_fit_linear", spy)
    learn(
        features, labels, labels.weights, np.arange(30), 0,
        settings=Settings("auto"), work=tmp_path, budget=Budget(steps=1), device="cpu",
    )  # fmt: skip
    assert len(seen) >= router.INNER_FOLDS
    assert all(rows.max() < 30 for rows in seen)


def test_what_is_predicted_of_noisy_gaps_is_the_mean_and_no_extreme(tmp_path):
    features, labels, _ = a_world_of_words(prompts=1000, noise=0.2, seed=4)
    labels = labels_of(np.clip(labels.q - np.array([0.2, 0.0])[:, None, None, None], 0, 1))
    learned = learn(
        features, labels, np.full(2, 0.5), np.arange(500), 0,
        settings=Settings("linear"), work=tmp_path, budget=STEPS, device="cpu",
    )  # fmt: skip
    predicted, true = learned.predict(features)[500:].mean(0), learned.d[500:].mean(0)
    assert (true < 0.35).all()  # far enough from 1/2 for the mean of D not to be D of the mean
    np.testing.assert_allclose(predicted, true, atol=0.02)


def test_other_models_of_a_table_help_to_learn_a_noisy_pair(tmp_path):
    """The pair is rated with much noise; ten others suffer from the same prompts."""
    gains = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        hidden = torch.from_numpy(rng.normal(size=(200, 1, 24))).float()
        hard = (hidden[:, 0].numpy() @ rng.normal(size=24)) / 24**0.5
        weak = 0.5 - 0.08 * hard[:, None] + 0.15 * rng.normal(size=(200, 6))
        strong = 0.6 - 0.01 * hard[:, None] + 0.15 * rng.normal(size=(200, 6))
        table = np.concatenate([weak, strong], 1).clip(0, 1)
        labels = labels_of(np.stack([table[:, :1], table[:, 6:7]])[:, :, None])
        features = Features(hidden, torch.ones(200, 1))
        others = np.delete(table, [0, 6], axis=1)
        found = []
        for related in (None, others):
            learned = learn(
                features, labels, labels.weights, np.arange(120), seed,
                settings=Settings("linear"), work=tmp_path, budget=STEPS, device="cpu",
                related=related,
            )  # fmt: skip
            score = 1 - prs(learned.predict(features), labels.weights)
            found.append(np.corrcoef(score[120:], hard[120:])[0, 1])
        gains.append(found[1] - found[0])
    assert np.mean(gains) > 2 * np.std(gains) / len(gains) ** 0.5 > 0


def spoilt(change):
    labels = made_up_labels(12)
    change(labels.q)
    return labels


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q: q.__setitem__((1, 3, 0, 2), np.nan), "the cloud's picture of 'prompt 3' on"),
        (lambda q: q.__setitem__((0, 0, 0, 4), 87.0), "metric 4 has the value 87, but qualities"),
        (lambda q: q.__setitem__((0, 0, 0, 4), -0.5), "metric 4 has the value -0.5"),
        (lambda q: q.__setitem__((..., 1), 0.25), "'metric 1' is 0.25 for every picture"),
    ],
)
def test_labels_that_nothing_can_be_learnt_from_are_one_sentence(change, sentence):
    with pytest.raises(DataError, match=sentence):
        check(spoilt(change))


@pytest.mark.parametrize("prompts", [1, 9])
def test_too_few_prompts_are_refused_with_their_number(prompts):
    with pytest.raises(DataError, match=rf"labels of {prompts} prompts? only, and training needs"):
        check(made_up_labels(prompts))
