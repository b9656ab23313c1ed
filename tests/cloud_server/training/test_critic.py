"""The critic learns what the cloud would add to a picture that is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cloud_server.training import critic as critics
from cloud_server.training.critic import fit_head, looked, scored, train_critic
from cloud_server.training.encoders import Features
from cloud_server.training.labels import Labels, join
from cloud_server.training.predictor import LinearPredictor, PredictorConfig
from cloud_server.training.quality import Metric
from cloud_server.training.router import Learned, distances
from edge_agent.routing.pareto import prs

WIDTH, NAMES = 6, ("Detail", "Layout", "Alignment")
HALF = np.full((120, 3), 0.5)
SCORER = {"clip": "clip", "digest": "c" * 64, "alignment": {"distractors": 16, "sharpness": 0.25}}


def made_up(count: int = 120, seeds: int = 3, noise: float = 0.02) -> tuple[Features, Labels]:
    """Labels whose cloud is as good as the prompt says, and whose edge is good or bad by chance."""
    rng = np.random.default_rng(0)
    hidden = torch.from_numpy(rng.standard_normal((count, 5, WIDTH))).float()
    mask = torch.zeros(count, 5)
    for row, length in zip(mask, rng.integers(2, 6, count), strict=True):
        row[:length] = 1
    said = (mask[:, :, None] * hidden).sum(1).numpy() / mask.sum(1, keepdim=True).numpy()
    cloud = 0.6 + 0.05 * said[:, : len(NAMES)][:, None] + rng.normal(0, noise, (count, seeds, 3))
    edge = rng.uniform(0.4, 0.7, (count, seeds, len(NAMES)))
    metrics = tuple(Metric(name, "much", "little", 1 / 3) for name in NAMES)
    prompts = tuple(f"prompt {i}" for i in range(count))
    q = np.stack([edge, cloud]).clip(0, 1)
    labels = Labels(q, prompts, tuple(range(seeds)), NAMES, "made-up", metrics, {"scorer": SCORER})
    return Features(hidden, mask), labels


def learned(labels: Labels, rows: np.ndarray) -> Learned:
    """A router that knows nothing: D is 1/2 for every prompt."""
    config = PredictorConfig(width=WIDTH, experts=len(labels.metrics), kind="linear")
    return Learned(LinearPredictor(config), *distances(labels, rows), "cpu")


def test_after_a_look_it_is_known_which_pictures_the_cloud_improves() -> None:
    features, labels = made_up()
    rows = np.arange(120)
    known = learned(labels, rows[:80])
    head = fit_head(features, labels, known.mu, known.gamma, rows[:80])
    predicted, true = looked(head, features, labels, known, HALF, rows[80:]).T
    assert len(predicted) == 40 * 3
    assert np.corrcoef(predicted, true)[0, 1] > 0.7
    # The same where every picture has another's qualities: nothing is known then.
    shuffled = np.random.default_rng(1).permutation(labels.q[0].reshape(-1, 3)).reshape(120, 3, 3)
    blind = replace(labels, q=np.stack([shuffled, labels.q[1]]))
    told = looked(head, features, blind, known, HALF, rows[80:])[:, 0]
    assert abs(np.corrcoef(told, true)[0, 1]) < 0.4


def test_a_picture_as_good_as_expected_leaves_the_router_its_say() -> None:
    features, labels = made_up()
    rows = np.arange(120)
    mu, gamma, _ = distances(labels, rows)
    head = fit_head(features, labels, mu, gamma, rows)
    before = torch.rand(120, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        said = critics.pooled(features.hidden, features.mask)
        expected = said @ head.weight.T + head.bias
        better = expected + 0.1
        same, more = (
            head(before, features.hidden, features.mask, q).numpy() for q in (expected, better)
        )
    np.testing.assert_allclose(same, before, atol=1e-5)
    trust = [critics.LOOKS_TRUST, critics.LOOKS_TRUST, critics.ALIGNMENT_TRUST]
    luck = np.array(trust) * 0.1 / (gamma * np.abs(mu[0] - mu[1]))
    told = before.numpy() / (1 - before.numpy())
    np.testing.assert_allclose(more / (1 - more), told * np.exp(luck), rtol=1e-3)
    scores = scored(head, before.numpy(), features, labels, rows)[:, 0]
    quality = torch.from_numpy(labels.q[0, :, 0]).float()
    with torch.inference_mode():
        d = head(before, features.hidden, features.mask, quality).numpy()
    np.testing.assert_allclose(scores, 1 - prs(d, labels.weights), atol=1e-5)


def test_what_the_edge_is_expected_to_reach_is_learnt_from_the_prompt() -> None:
    features, labels = made_up()
    said = critics.pooled(features.hidden, features.mask).numpy()
    q = labels.q.copy()
    q[0] = (0.5 + 0.05 * said[:, None, :3]) + np.random.default_rng(2).normal(0, 0.01, q[0].shape)
    rows = np.arange(120)
    head = fit_head(
        features, replace(labels, q=q), np.array([[0.4] * 3, [0.6] * 3]), 2.0, rows[:80]
    )
    with torch.inference_mode():
        expected = said[80:] @ head.weight.numpy().T + head.bias.numpy()
    assert np.corrcoef(expected.ravel(), q[0, 80:].mean(1).ravel())[0, 1] > 0.9


def test_seeds_that_a_prompt_lacks_are_no_pictures() -> None:
    features, labels = made_up()
    few = replace(labels, q=labels.q[:, 60:, :1], prompts=labels.prompts[60:], seeds=(7,))
    many = replace(labels, q=labels.q[:, :60], prompts=labels.prompts[:60])
    joined = join([many, few])
    assert joined.prompts == labels.prompts
    rows = np.arange(120)
    known = learned(joined, rows)
    head = fit_head(features, joined, known.mu, known.gamma, rows)
    scores = scored(head, HALF, features, joined, rows)
    assert np.isfinite(scores[:60]).sum(1).tolist() == [3] * 60
    assert np.isfinite(scores[60:]).sum(1).tolist() == [1] * 60
    assert len(looked(head, features, joined, known, HALF, rows)) == 60 * 3 + 60


def test_pictures_that_the_edge_alone_drew_are_looked_at() -> None:
    features, labels = made_up()
    q = labels.q.copy()
    q[1, :, 1:] = np.nan
    more, rows = replace(labels, q=q), np.arange(120)
    known = learned(more, rows)
    head = fit_head(features, more, known.mu, known.gamma, rows)
    assert np.isfinite(scored(head, HALF, features, more, rows)).all()
    _, true = looked(head, features, more, known, HALF, rows).T
    assert len(true) == 120 * 3
    assert np.isfinite(true).all()


def test_one_metric_is_enough() -> None:
    features, labels = made_up()
    one = replace(
        labels, q=labels.q[..., :1], metrics=NAMES[:1], described=(Metric("Detail", "a", "b", 1),)
    )
    rows = np.arange(120)
    mu, gamma, _ = distances(one, rows)
    head = fit_head(features, one, mu, gamma, rows)
    assert head.weight.shape == (1, 2 * WIDTH + 1)
    assert np.isfinite(scored(head, HALF[:, :1], features, one, rows)).all()


def test_a_saved_head_is_the_same(tmp_path) -> None:
    features, labels = made_up()
    rows = np.arange(120)
    mu, gamma, _ = distances(labels, rows)
    head = fit_head(features, labels, mu, gamma, rows)
    critics.save(head, tmp_path)
    again = critics.load(tmp_path)
    np.testing.assert_array_equal(
        scored(head, HALF, features, labels, rows), scored(again, HALF, features, labels, rows)
    )


def test_the_digest_is_of_pictures_that_the_head_did_not_learn_from() -> None:
    features, labels = made_up()
    rows = np.arange(80)
    critic = train_critic(
        features, labels, learned(labels, rows), HALF, rows, np.arange(80, 100), 1
    )
    assert critic is not None
    assert len(critic.digest) == 200
    fresh = scored(critic.head, HALF, features, labels, np.arange(100, 120))
    sent = np.mean(fresh > critic.digest[140])  # the quantile of a share of 30 %
    assert 0.1 < sent < 0.5
    assert critic.facts["clip"] == {"name": "clip", "digest": "c" * 64}
    assert len(set(critic.facts["others"])) == 16
    assert set(critic.facts["others"]) <= set(labels.prompts)


@pytest.mark.parametrize(
    ("alignment", "others"),
    [
        ({"distractors": 0, "sharpness": 0.25}, 0),
        ({"distractors": 1, "sharpness": 0.25}, 2),
        ({"distractors": 500, "sharpness": 0.25}, 120),
        (None, None),
    ],
)
def test_the_device_compares_as_the_labels_did(
    alignment: dict[str, Any] | None, others: int | None
) -> None:
    features, labels = made_up()
    labels = replace(labels, origin={"scorer": {**SCORER, "alignment": alignment}})
    rows = np.arange(120)
    critic = train_critic(features, labels, learned(labels, rows), HALF, rows, rows, 1)
    assert critic is not None
    assert (None if critic.others is None else len(critic.others)) == others


def test_ratings_by_people_teach_no_critic() -> None:
    features, labels = made_up()
    rows = np.arange(120)
    labels = replace(labels, origin={"models": {}})
    assert train_critic(features, labels, learned(labels, rows), HALF, rows, rows, 1) is None
