"""The models that are committed: what the card says of them, on fewer pictures and with slack."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cloud_server.starter import starter_folder
from cloud_server.training.digest import folder_digest
from cloud_server.training.labels import PipelinePainter, read_for_training
from cloud_server.training.starter import clip_model, scenes
from cloud_server.training.starter.evaluate import _psnr, through
from cloud_server.training.starter.judge import Judge
from cloud_server.training.starter.reading import shares

needs_font = pytest.mark.skipif(
    not any(path.exists() for path in scenes.FONT_PATHS),
    reason="drawing scenes needs the Debian package fonts-noto-color-emoji",
)
EDGE, CLOUD = starter_folder() / "edge", starter_folder() / "cloud"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.open(starter_folder().with_name("judge"), "cpu")


@pytest.fixture(scope="module")
def exam() -> list[scenes.Scene]:
    """Twelve scenes of one object, then twelve of three."""
    rng = np.random.default_rng(4321)
    return [scenes.sample_scene(rng, objects) for objects in (1, 3) for _ in range(12)]


def test_they_share_one_text_encoder_and_one_latent_space():
    text = "text_encoder/model.safetensors"
    assert (EDGE / text).read_bytes() == (CLOUD / text).read_bytes()
    edge, cloud = (load_file(m / "vae/diffusion_pytorch_model.safetensors") for m in (EDGE, CLOUD))
    encoder = [name for name in cloud if name.startswith("encoder.")]
    assert encoder
    for name in encoder:
        assert torch.equal(edge[name], cloud[name]), name


def test_the_text_encoder_is_the_first_layers_of_clip(tmp_path):
    clip_model.to_transformers(starter_folder() / "clip").half().save_pretrained(tmp_path)
    ours = clip_model.CLIPTextModel.from_pretrained(tmp_path).state_dict()
    theirs = clip_model.CLIPTextModel.from_pretrained(EDGE / "text_encoder").state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_they_do_not_say_where_they_were_trained():
    configs = list(starter_folder().rglob("*.json"))
    assert configs
    for config in configs:
        assert "_name_or_path" not in config.read_text(encoding="utf-8"), config


def test_the_labels_and_the_router_are_of_these_models():
    names = ("labels.parquet", "labels-wide.parquet", "labels-more.parquet")
    labels = read_for_training(*(starter_folder().with_name(name) for name in names))
    edge, cloud = labels.drawn.sum(2)
    assert (edge[:3000] == 4).all()
    assert (cloud[:3000] == 4).all()
    assert (cloud[3000:] == 1).all()
    assert set(edge[3000:]) == {1, 3}
    assert len(edge) > 30_000
    assert len(labels.metrics) == 11
    digests = {side: folder_digest(starter_folder() / side) for side in ("edge", "cloud", "clip")}
    for side in ("edge", "cloud"):
        assert labels.origin["models"][side]["digest"] == digests[side]
    assert labels.origin["scorer"]["digest"] == digests["clip"]
    facts = json.loads((starter_folder() / "router" / "router.json").read_text(encoding="utf-8"))
    assert facts["edge_model"] == f"edge@{digests['edge'][:12]}"
    assert facts["cloud_model"] == f"cloud@{digests['cloud'][:12]}"
    assert [metric["name"] for metric in facts["metrics"]] == list(labels.metrics)


@needs_font
def test_the_autoencoder_keeps_scenes(exam, judge):
    rng = np.random.default_rng(1)
    truths = np.stack([scenes.draw(scene, rng) for scene in exam])
    decoded = through(CLOUD / "vae", truths, "cpu")
    assert _psnr(truths, decoded).mean() > 29
    assert np.nanmean(shares(exam, judge.read(decoded))["objects"]) > 0.95


# On the card, on more pictures: one object 92 and 100 %, three objects 89 and 100 %.
@pytest.mark.parametrize(
    ("folder", "least"),
    [(EDGE, (0.7, 0.6)), pytest.param(CLOUD, (0.9, 0.8), marks=pytest.mark.slow)],
)
def test_they_draw_what_was_asked_for(exam, judge, folder, least):
    painter = PipelinePainter(folder, "cpu")
    drawn = painter.draw([scene.caption for scene in exam], range(len(exam)))
    right = shares(exam, judge.read(np.stack([np.asarray(one) for one in drawn])))["objects"]
    one, three = np.split(right, 2)
    assert np.nanmean(one) >= least[0]
    assert np.nanmean(three) >= least[1]
