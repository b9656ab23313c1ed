from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cloud_server.training import predictor
from cloud_server.training.encoders import open_encoder
from cloud_server.training.labels import Labels
from cloud_server.training.loop import Budget
from cloud_server.training.quality import Metric
from cloud_server.training.router import Settings
from cloud_server.training.router_folder import Material, correlation, report, train_router
from edge_agent.routing.policy import threshold
from tests.tiny import WORDS, make_bert


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return open_encoder(make_bert(tmp_path_factory.mktemp("encoder") / "bert"))


def sentences(count, seed):
    rng = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        found[" ".join(rng.choice(WORDS, rng.integers(2, 7)))] = None
    return list(found)


@pytest.fixture(scope="module")
def material():
    rng = np.random.default_rng(0)
    prompts = sentences(60, 1)
    q = rng.uniform(0.5, 0.7, (2, 60, 2, 2))
    q[0] -= 0.02 * np.array([len(prompt.split()) for prompt in prompts])[:, None, None]
    metrics = (Metric("Detail", "much", "little", 3.0), Metric("Layout", "fine", "poor", 1.0))
    origin = {"models": {"edge": {"name": "small", "digest": "0123456789abcdef"}, "cloud": {}}}
    labels = Labels(q, tuple(prompts), (0, 1), ("Detail", "Layout"), "made-up", metrics, origin)
    return Material(labels, sentences(200, 2))


def train(material, encoder, out, kind="linear"):
    return train_router(
        material, encoder, out, out.with_name("work"), Budget(steps=3), 5, "cpu", Settings(kind)
    )


@pytest.mark.parametrize("kind", ["linear", "gated", "mixed"])
def test_the_folder_holds_what_an_export_needs(material, encoder, tmp_path, kind):
    out = tmp_path / "router"
    trained = train(material, encoder, out, kind)
    assert {file.name for file in out.iterdir()} == {
        "router.json", "config.json", "predictor.safetensors"
    }  # fmt: skip
    facts = json.loads((out / "router.json").read_text())
    assert [metric["weight"] for metric in facts["metrics"]] == [0.75, 0.25]
    assert facts["metrics"][0]["positive"] == "much"
    training = np.setdiff1d(np.arange(60), trained.held_out)
    mu = material.labels.q[:, training].mean((1, 2))
    assert [m["mu_edge"] for m in facts["metrics"]] == pytest.approx(mu[0].tolist())
    assert [m["mu_cloud"] for m in facts["metrics"]] == pytest.approx(mu[1].tolist())
    assert facts["gamma"] == trained.learned.gamma > 0
    assert (facts["edge_model"], facts["cloud_model"]) == ("small@0123456789ab", "cloud")
    assert (facts["reads_with"], facts["predictor_kind"], facts["seed"]) == ("bert", kind, 5)
    assert len(facts["text_probe"]["state"]) == 24
    assert len(facts["score_digest"]) == 200
    assert str(tmp_path) not in json.dumps(facts)
    model = predictor.load(out)
    features = encoder.encode(material.labels.prompts)
    np.testing.assert_allclose(
        model(features.hidden, features.mask).detach().numpy(),
        trained.learned.predict(features),
        atol=1e-6,
    )


def test_at_most_the_share_of_calibration_prompts_goes_to_the_cloud(material, encoder, tmp_path):
    trained = train(material, encoder, tmp_path / "router")
    features = encoder.encode(material.calibration)
    scores = 1 - trained.learned.predict(features) @ material.labels.weights
    for share in (0.1, 0.3, 0.7):
        assert np.mean(scores > threshold(trained.digest, share)) <= share


def test_training_again_gives_the_same_folder_and_leaves_nothing_half_written(
    material, encoder, tmp_path
):
    out = tmp_path / "router"
    train(material, encoder, out, "gated")
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    train(material, encoder, out, "gated")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == first
    assert not list(tmp_path.glob("*.partial"))


def test_held_out_prompts_are_a_fifth_and_calibrate_where_no_others_are_given(
    material, encoder, tmp_path
):
    alone = Material(material.labels)
    trained = train(alone, encoder, tmp_path / "router")
    assert len(trained.held_out) == 12
    scores = 1 - trained.predicted[trained.held_out]
    assert (trained.digest[0], trained.digest[-1]) == (scores.min(), scores.max())
    assert "the 12 held-out prompts themselves; pass more with --calibration" in report(
        trained, alone
    )


def test_the_report_says_what_was_measured(material, encoder, tmp_path):
    trained = train(material, encoder, tmp_path / "router")
    text = report(trained, material)
    assert text.startswith("linear predictor of 100 parameters, trained on 48 prompts\n")
    held_out = trained.held_out
    r = np.corrcoef(trained.predicted[held_out], trained.true[held_out])[0, 1]
    assert f"correlate by {r:.2f} (95 % interval " in text
    assert "on 12 held-out prompts" in text
    assert "threshold from 200 calibration prompts, none of them labelled" in text
    for share in (0.1, 0.3, 0.5):
        limit = threshold(trained.digest, share)
        got = np.mean(1 - trained.predicted[held_out] > limit)
        assert f"share {share:.0%}: threshold {limit:.3f} sends {got:.0%}" in text


def test_correlation_has_fishers_interval():
    rng = np.random.default_rng(0)
    a = rng.normal(size=103)
    b = a + rng.normal(size=103)
    value, low, high = correlation(a, b)
    assert value == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert np.arctanh(high) - np.arctanh(value) == pytest.approx(0.196)
    assert np.arctanh(value) - np.arctanh(low) == pytest.approx(0.196)
    assert correlation(a, a)[2] <= 1


def test_what_does_not_vary_correlates_with_nothing():
    assert np.isnan(correlation(np.ones(9), np.arange(9.0))).all()
    assert np.isnan(correlation(np.arange(3.0), np.arange(3.0))).all()


def test_labels_by_a_clip_train_a_critic_too(material, encoder, tmp_path):
    out = tmp_path / "router"
    scorer = {"clip": "clip", "digest": "c" * 64}
    labels = replace(material.labels, origin={**material.labels.origin, "scorer": scorer})
    trained = train(replace(material, labels=labels), encoder, out)
    assert (out / "critic.safetensors").is_file()
    facts = json.loads((out / "router.json").read_text())["critic"]
    assert facts["clip"] == {"name": "clip", "digest": "c" * 64}
    assert facts["score_digest"] == trained.critic.digest
    assert "critic: after a look at the edge's picture by 0." in report(trained, material)
    few = replace(trained, looked=trained.looked[:2], held_out=trained.held_out[:2])
    assert "critic: too few pictures" in report(few, material)
    assert len(trained.looked) == 2 * len(trained.held_out)
    train(material, encoder, out)  # by labels of another kind: no critic of before is left
    assert not (out / "critic.safetensors").exists()
    assert "critic" not in json.loads((out / "router.json").read_text())
