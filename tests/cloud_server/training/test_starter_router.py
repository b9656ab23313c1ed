"""The stage `router` of train-starter: labels of the starter pair, then the router of them."""

from __future__ import annotations

import json

import pytest

from cloud_server.training import predictor
from cloud_server.training.loop import Budget
from cloud_server.training.starter.router import train_starter_router
from edge_agent.routing.policy import threshold
from tests.tiny import make_clip, make_pipeline


def test_a_router_is_trained_from_the_starter_models(tmp_path, capsys):
    starter, out, work = tmp_path / "starter", tmp_path / "router", tmp_path / "work"
    make_clip(starter / "clip")
    make_pipeline(starter / "edge", seed=1)
    make_pipeline(starter / "cloud", seed=2, unet_channels=(32, 96))

    def train():
        train_starter_router(
            starter, out, work, Budget(steps=3), 0, "cpu", prompts=10, seeds=1, calibration=30
        )

    train()
    facts = json.loads((out / "router.json").read_text(encoding="utf-8"))
    assert [len(facts[key]) for key in ("metrics", "score_digest")] == [11, 200]
    assert facts["metrics"][-1]["name"] == "Alignment"
    assert sum(metric["weight"] for metric in facts["metrics"]) == pytest.approx(1.0)
    assert facts["edge_model"].startswith("edge@")
    assert len(facts["text_probe"]["state"]) == 32
    assert str(tmp_path) not in json.dumps(facts)
    assert 0.5 <= threshold(facts["score_digest"], 0.3) <= 1.0
    assert predictor.load(out).config.kind == "gated"
    assert "5 object(s): the cloud is better on" in capsys.readouterr().out

    kept = {file: file.read_bytes() for file in work.glob("*.jsonl")}
    train()
    assert {file: file.read_bytes() for file in work.glob("*.jsonl")} == kept
    assert json.loads((out / "router.json").read_text(encoding="utf-8")) == facts
