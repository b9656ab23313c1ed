from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cloud_server.training.labels import Labels
from cloud_server.training.loop import Budget
from cloud_server.training.predictor import Predictor
from cloud_server.training.router import (
    Features,
    distances,
    encode,
    fit_predictor,
    predict,
    train_router,
)
from edge_agent.routing.pareto import prs
from edge_agent.routing.policy import threshold
from tests.tiny import make_clip, make_pipeline

UNIFORM = np.full(10, 0.1)


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starter")
    make_clip(folder / "clip")
    make_pipeline(folder / "edge", seed=1)
    make_pipeline(folder / "cloud", seed=2, unet_channels=(32, 96))
    return folder


def made_up_labels(prompts=40, seeds=3):
    rng = np.random.default_rng(0)
    q = rng.uniform(0.3, 0.7, (2, prompts, seeds, 10))
    q[1] += 0.05
    return Labels(q, ("",) * prompts, tuple(range(seeds)), ("",) * 10, "made-up")


def test_means_and_gamma_come_from_training_prompts_only():
    labels = made_up_labels()
    training = np.arange(30)
    mu, gamma, d = distances(labels, training)
    changed = labels.q.copy()
    changed[:, 30:] = 0.1
    same = distances(Labels(changed, (), (), (), ""), training)
    np.testing.assert_array_equal(mu, same[0])
    assert gamma == same[1]
    np.testing.assert_array_equal(d[:30], same[2][:30])
    assert d[:30].std(axis=0).mean() == pytest.approx(0.22, abs=1e-3)


def test_swapping_the_models_mirrors_prs():
    labels = made_up_labels()
    *_, d = distances(labels, np.arange(40))
    *_, mirrored = distances(
        Labels(labels.q[::-1], labels.prompts, labels.seeds, labels.metrics, ""), np.arange(40)
    )
    np.testing.assert_allclose(prs(mirrored, UNIFORM), 1 - prs(d, UNIFORM))


def test_prompts_are_encoded_with_a_mask_over_their_own_tokens(starter):
    features = encode(starter / "edge", ["a cat", "", "<|endoftext|> cat", "a " * 50], "cpu")
    assert features.hidden.shape == (4, 32, 32)
    assert features.mask.shape == (4, 32)
    assert features.mask[0].tolist() == [0, 1, 1] + [0] * 29
    assert features.mask[1].sum() == 0
    assert features.mask[2].sum() > 2, "a control token that was typed is text"
    assert features.mask[3].tolist() == [0, *[1] * 30, 0]


def test_the_device_masks_and_numbers_tokens_as_training_does(starter):
    from transformers import CLIPTextModel

    from edge_agent.routing.encoder import Tokenizer

    prompts = ["a cat", "Two red apples!", "<|endoftext|> cat", "a " * 50, "!"]
    features = encode(starter / "edge", prompts, "cpu")
    model = CLIPTextModel.from_pretrained(starter / "edge" / "text_encoder").eval()
    tokenizer = Tokenizer(starter / "edge" / "tokenizer" / "tokenizer.json", 32, 0)
    for row, prompt in enumerate(prompts):
        tokens = tokenizer.encode(prompt)
        np.testing.assert_array_equal(tokens.mask[0], features.mask[row].numpy())
        with torch.inference_mode():
            hidden = model(torch.from_numpy(tokens.input_ids)).last_hidden_state[0]
        torch.testing.assert_close(hidden, features.hidden[row])


def test_the_predictor_learns_what_a_word_does_to_quality(tmp_path):
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(12, 16, generator=generator)
    chosen = torch.randint(12, (80, 6), generator=generator)
    mask = torch.ones(80, 6)
    costly = (chosen == 3).any(1).numpy()  # word 3 makes the edge's picture worse
    d = np.where(costly[:, None], 0.25, 0.7) * np.ones((80, 10))
    model = fit_predictor(
        Features(words[chosen], mask),
        d,
        UNIFORM,
        np.arange(60),
        "words",
        tmp_path,
        Budget(steps=200),
        0,
        "cpu",
    )
    predicted = prs(predict(model, Features(words[chosen], mask), "cpu"), UNIFORM)[60:]
    assert predicted[costly[60:]].mean() < predicted[~costly[60:]].mean() - 0.15


def test_a_router_is_trained_from_two_model_folders(starter, tmp_path, capsys):
    out, work = tmp_path / "router", tmp_path / "work"

    def train():
        train_router(
            starter, out, work, Budget(steps=3), 0, "cpu", prompts=10, seeds=1, calibration=30
        )

    train()
    router = json.loads((out / "router.json").read_text(encoding="utf-8"))
    assert [len(router[key]) for key in ("metrics", "score_digest")] == [11, 200]
    assert router["metrics"][-1]["name"] == "Alignment"
    assert router["metrics"][0].keys() == {
        "name",
        "positive",
        "negative",
        "weight",
        "mu_edge",
        "mu_cloud",
    }
    assert sum(metric["weight"] for metric in router["metrics"]) == pytest.approx(1.0)
    assert router["gamma"] > 0
    assert (router["floor"], router["default_share"], router["seed"]) == (1e-3, 0.3, 0)
    assert router["edge_model"].startswith("edge@")
    assert len(router["text_probe"]["state"]) == 32
    assert str(tmp_path) not in json.dumps(router)
    assert 0.5 <= threshold(router["score_digest"], 0.3) <= 1.0
    assert Predictor.load(out).config.top_k == router["top_k"]
    assert "5 object(s): the cloud is better on" in capsys.readouterr().out

    labels = {store: store.read_bytes() for store in work.glob("labels-*.jsonl")}
    assert len(labels) == 2
    train()
    assert {store: store.read_bytes() for store in work.glob("labels-*.jsonl")} == labels
    assert not list(tmp_path.glob("*.partial"))
    assert json.loads((out / "router.json").read_text(encoding="utf-8")) == router
