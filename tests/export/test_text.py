"""A router that reads prompts with a text encoder of its own, from training to the device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cloud_server.training import predictor
from cloud_server.training.encoders import open_encoder
from cloud_server.training.labels import Labels
from cloud_server.training.loop import Budget
from cloud_server.training.quality import Metric
from cloud_server.training.router import Settings
from cloud_server.training.router_folder import Material, train_router
from edge_agent import EdgeAgent, Request, Route, open_bundle
from edge_agent.routing.pareto import prs
from export.build import export_bundle
from export.errors import ExportError
from export.sources import open_router
from export.text import are_one, gives, open_text
from tests import tiny

PROMPTS = ("a cat", "two red apples on the beach", "cat " * 60)


def train(encoder, folder, kind):
    rng = np.random.default_rng(0)
    prompts = tuple(f"{' '.join(rng.choice(tiny.WORDS, 3))} {i}" for i in range(20))
    metrics = tuple(Metric(name, "", "", 0.5) for name in ("Detail", "Layout"))
    q = rng.uniform(0.4, 0.6, (2, 20, 1, 2))
    labels = Labels(q, prompts, (0,), ("Detail", "Layout"), "made-up", metrics)
    trained = train_router(
        Material(labels), open_encoder(encoder), folder, folder.with_name("work"),
        Budget(steps=3), 0, "cpu", Settings(kind),
    )  # fmt: skip
    return labels.weights, trained


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tiny.make_bert, "gated"),
        pytest.param(tiny.make_t5, "linear", marks=pytest.mark.slow),
    ],
)
def test_the_device_decides_as_training_does(copied, tmp_path, make, kind):
    encoder = make(tmp_path / "encoder")
    weights, trained = train(encoder, tmp_path / "router", kind)
    job = replace(copied, router=open_router(tmp_path / "router"), text_encoder=encoder)
    path, rows = export_bundle(job)
    assert [row.component.name for row in rows] == [
        "text_encoder", "text_encoder_diffusion", "predictor", "unet", "vae_decoder"
    ]  # fmt: skip
    wanted = prs(trained.learned.predict(open_encoder(encoder).encode(PROMPTS)), weights)
    bundle = open_bundle(path)
    assert bundle.tokenizers["text_encoder"].pad_id is None
    assert bundle.tokenizers["text_encoder_diffusion"].pad_id == 0
    with EdgeAgent(bundle, offline=True, threads=1) as agent:
        got = [agent.route(prompt) for prompt in PROMPTS]
        picture = agent.generate(Request("a cat", seed=1, route=Route.EDGE)).picture
    np.testing.assert_allclose([decision.prs for decision in got], wanted, atol=1e-4)
    assert got[-1].ignored_tokens == 60 - (20 - (2 if make is tiny.make_bert else 1))
    assert picture.image.size == (64, 64)


def test_a_router_of_another_make_of_text_encoder_is_refused(copied, tmp_path):
    train(tiny.make_bert(tmp_path / "bert", width=32), tmp_path / "router", "linear")
    job = replace(copied, router=open_router(tmp_path / "router"))
    with pytest.raises(ExportError, match=r"was trained on another text encoder than"):
        export_bundle(job)
    other = tiny.make_bert(tmp_path / "other", seed=1, width=32)
    with pytest.raises(ExportError, match=r"another text encoder than '.*other' has; pass --text"):
        export_bundle(replace(job, text_encoder=other))


def test_the_exported_predictor_is_the_saved_one(copied, tmp_path):
    train(tiny.make_bert(tmp_path / "bert"), tmp_path / "router", "linear")
    assert predictor.load(tmp_path / "router").config.kind == "linear"
    assert open_router(tmp_path / "router").width == 24


def test_one_text_encoder_is_recognised_in_two_formats_and_another_is_not(tmp_path):
    pipeline = open_text(tiny.make_pipeline(tmp_path / "pipeline"))
    folders = []
    for seed in (0, 9):
        tokenizer = tiny.make_tokenizer(tmp_path / f"text-{seed}")
        folders.append(tmp_path / f"text-{seed}")
        tiny.make_text_encoder(len(tokenizer), seed).save_pretrained(folders[-1])
    same, other = map(open_text, folders)
    assert (pipeline.tower.pad_id, same.tower.pad_id) == (0, None)
    assert are_one(pipeline, same)
    assert are_one(same, pipeline)
    assert not are_one(pipeline, other)
    assert not are_one(pipeline, open_text(tiny.make_bert(tmp_path / "bert", width=32)))
    state = pipeline.state("two red apples")
    assert gives(same, "two red apples", state)
    assert not gives(other, "two red apples", state)
