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
from edge_agent.routing.pareto import prs, quality_distance

WIDTH, NAMES = 6, ("Detail", "Layout", "Alignment")
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
    config = PredictorConfig(width=WIDTH, experts=len(labels.metrics), kind="linear")
    return Learned(LinearPredictor(config), *distances(labels, rows), "cpu")


def test_after_a_look_it_is_known_which_pictures_the_cloud_improves() -> None:
    features, labels = made_up()
    rows = np.arange(120)
    known = learned(labels, rows[:80])
    head = fit_head(features, labels, known.mu, known.gamma, rows[:80])
    predicted, true = looked(head, features, labels, known, rows[80:]).T
    assert len(predicted) == 40 * 3
    assert np.corrcoef(predicted, true)[0, 1] > 0.9
    # The same where every picture has another's qualities: nothing is known then.
    shuffled = np.random.default_rng(1).permutation(labels.q[0].reshape(-1, 3)).reshape(120, 3, 3)
    blind = replace(labels, q=np.stack([shuffled, labels.q[1]]))
    told = 1 - scored(head, features, blind, rows[80:]).ravel()
    assert abs(np.corrcoef(told, true)[0, 1]) < 0.4


def test_the_head_is_prs_with_the_measured_quality_and_a_linear_cloud() -> None:
    features, labels = made_up()
    rows = np.arange(120)
    mu, gamma, _ = distances(labels, rows)
    head = fit_head(features, labels, mu, gamma, rows)
    quality = torch.from_numpy(labels.q[0, :, 0]).float()
    with torch.inference_mode():
        d = head(features.hidden, features.mask, quality).numpy()
        inputs = torch.cat([critics.pooled(features.hidden, features.mask), quality], 1)
        cloud = (inputs @ head.weight.T + head.bias).numpy()
    assert np.corrcoef(cloud.ravel(), labels.mean[1].ravel())[0, 1] > 0.9
    wanted = quality_distance(quality.numpy(), cloud, *mu, gamma=gamma)
    np.testing.assert_allclose(d, wanted, atol=1e-4)
    scores = scored(head, features, labels, rows)[:, 0]
    np.testing.assert_allclose(scores, 1 - prs(d, labels.weights), atol=1e-5)


def test_seeds_that_a_prompt_lacks_are_no_pictures() -> None:
    features, labels = made_up()
    few = replace(labels, q=labels.q[:, 60:, :1], prompts=labels.prompts[60:], seeds=(7,))
    many = replace(labels, q=labels.q[:, :60], prompts=labels.prompts[:60])
    joined = join([many, few])
    assert joined.prompts == labels.prompts
    rows = np.arange(120)
    known = learned(joined, rows)
    head = fit_head(features, joined, known.mu, known.gamma, rows)
    scores = scored(head, features, joined, rows)
    assert np.isfinite(scores[:60]).sum(1).tolist() == [3] * 60
    assert np.isfinite(scores[60:]).sum(1).tolist() == [1] * 60
    assert len(looked(head, features, joined, known, rows)) == 60 * 3 + 60


def test_what_never_varies_weighs_nothing() -> None:
    features, labels = made_up()
    still = features.hidden.clone()
    still[..., 0] = 0.25
    q = labels.q.copy()
    q[0, ..., 1] = 0.5
    head = fit_head(
        Features(still, features.mask), replace(labels, q=q), np.array([[0.4] * 3, [0.6] * 3]), 2.0,
        np.arange(120),
    )  # fmt: skip
    assert torch.isfinite(head.weight).all()
    assert not head.weight[:, 0].any()
    assert not head.weight[:, 2 * WIDTH + 1 + 1].any()


def test_one_metric_is_enough() -> None:
    features, labels = made_up()
    one = replace(
        labels, q=labels.q[..., :1], metrics=NAMES[:1], described=(Metric("Detail", "a", "b", 1),)
    )
    rows = np.arange(120)
    mu, gamma, _ = distances(one, rows)
    head = fit_head(features, one, mu, gamma, rows)
    assert head.weight.shape == (1, 2 * WIDTH + 2)
    assert np.isfinite(scored(head, features, one, rows)).all()


def test_a_saved_head_is_the_same(tmp_path) -> None:
    features, labels = made_up()
    rows = np.arange(120)
    mu, gamma, _ = distances(labels, rows)
    head = fit_head(features, labels, mu, gamma, rows)
    critics.save(head, tmp_path)
    again = critics.load(tmp_path)
    np.testing.assert_array_equal(
        scored(head, features, labels, rows), scored(again, features, labels, rows)
    )


def test_the_digest_is_of_pictures_that_the_head_did_not_learn_from() -> None:
    features, labels = made_up()
    rows = np.arange(100)
    critic = train_critic(features, labels, learned(labels, rows), rows, seed=1)
    assert critic is not None
    assert len(critic.digest) == 200
    fresh = scored(critic.head, features, labels, np.arange(100, 120))
    sent = np.mean(fresh > critic.digest[140])  # the quantile of a share of 30 %
    assert 0.1 < sent < 0.5
    assert critic.facts["clip"] == {"name": "clip", "digest": "c" * 64}
    assert len(set(critic.facts["others"])) == 16
    assert set(critic.facts["others"]) <= set(labels.prompts)


@pytest.mark.parametrize(
    ("alignment", "others"), [({"distractors": 0, "sharpness": 0.25}, ()), (None, None)]
)
def test_the_device_compares_as_the_labels_did(
    alignment: dict[str, Any] | None, others: tuple[str, ...] | None
) -> None:
    features, labels = made_up()
    labels = replace(labels, origin={"scorer": {**SCORER, "alignment": alignment}})
    rows = np.arange(120)
    critic = train_critic(features, labels, learned(labels, rows), rows, seed=1)
    assert critic is not None
    assert critic.others == others


def test_ratings_by_people_teach_no_critic() -> None:
    features, labels = made_up()
    rows = np.arange(120)
    labels = replace(labels, origin={"models": {}})
    assert train_critic(features, labels, learned(labels, rows), rows, seed=1) is None
