"""The critic in the bundle: the device measures pictures as labelling does, and judges by them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cloud_server.training import critic as critics
from cloud_server.training.critic import CriticHead
from cloud_server.training.encoders import open_encoder
from cloud_server.training.quality import ALIGNMENT, Alignment, Clip, Metric, QualityScorer
from edge_agent.bundle import CriticSpec, open_bundle
from edge_agent.edge import Edge
from edge_agent.routing.pareto import prs
from edge_agent.runtime.networks import Networks
from edge_agent.types import Provider
from export.build import Job, export_bundle
from export.critic import CriticSource, Looking, open_critic
from export.errors import ExportError
from export.sources import RouterFolder, open_router
from export.text import read_texts
from tests import tiny
from tests.export.conftest import Exported
from tests.export.test_cli import call

PROMPTS = ("two red apples on the beach", "a cat", "the dog above a cat and two apples")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_clip(tmp_path_factory.mktemp("critic") / "clip", width=48)


def with_critic(
    folder: Path, clip: Path, others: Sequence[str] | None = PROMPTS[1:], digest: str | None = None
) -> RouterFolder:
    """Give a tiny router a random critic whose last metric is the alignment, unless without."""
    tiny.make_router(folder)
    torch.manual_seed(5)
    head = CriticHead(32, len(tiny.METRICS))
    with torch.no_grad():
        head.weight.normal_(std=0.1)
        head.scale.uniform_(0.1, 0.3)
    critics.save(head, folder)
    facts = json.loads((folder / "router.json").read_text())
    if others is not None:
        facts["metrics"][-1]["name"] = ALIGNMENT
    facts["critic"] = {
        "clip": {"name": "clip", "digest": digest or Clip(clip).digest},
        "sharpness": 0.25,
        "others": None if others is None else list(others),
        "score_digest": [0.2 + 0.6 * i / 199 for i in range(200)],
    }
    (folder / "router.json").write_text(json.dumps(facts))
    return open_router(folder)


@pytest.fixture(scope="module")
def made(exported: Exported, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with a critic, whose bundle is there already.

    None of its distractors is one of `PROMPTS`: labelling would leave that one out.
    """
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(exported.path, folder / "bundle")
    router = with_critic(folder / "router", clip, ("two dogs", "grass and apples"))
    job = replace(
        exported.job, out=folder / "bundle", router=router, critic=open_critic(str(clip), router)
    )
    export_bundle(job)
    return job


@pytest.fixture
def with_clip(made: Job, clip: Path, tmp_path: Path) -> Job:
    """A copy of it, for tests that change it."""
    shutil.copytree(made.out, tmp_path / "bundle")
    shutil.copytree(made.router.folder, tmp_path / "router")
    router = open_router(tmp_path / "router")
    return replace(
        made, out=tmp_path / "bundle", router=router, critic=open_critic(str(clip), router)
    )


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(4)
    return [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        for side in (32, 64, 20)
    ]


def measured(source: CriticSource) -> np.ndarray:
    """Return what labelling makes of each picture with the prompt beside it."""
    others = source.facts["others"]
    metrics = [
        Metric(m["name"], m["positive"], m["negative"], m["weight"])
        for m in source.router.spec["metrics"]
    ]
    alignment = None if others is None else Alignment(0.5, tuple(others), len(others))
    looks = metrics if others is None else metrics[:-1]
    return QualityScorer(Clip(source.clip.model), looks, alignment).score(pictures(), PROMPTS)


def test_the_device_measures_and_judges_as_training_does(made: Job) -> None:
    job, router = made, made.router
    assert job.critic is not None
    path, rows = export_bundle(job)
    assert all(row.kept for row in rows)
    assert [row.component.name for row in rows] == [
        "text_encoder", "text_encoder_critic", "predictor", "critic", "unet", "vae_decoder"
    ]  # fmt: skip
    bundle = open_bundle(path)
    edge = Edge(Networks(bundle, provider=Provider.CPU, threads=1))
    wanted, head = measured(job.critic), critics.load(router.folder)
    encoder = open_encoder(job.pipeline.folder)
    weights = [metric.weight for metric in bundle.router.metrics]
    for picture, prompt, q in zip(pictures(), PROMPTS, wanted, strict=True):
        told, encoded = edge.router(0.3).decide(prompt)
        decision = edge.critic(0.3).judge(picture, prompt, encoded, told.metrics)
        assert list(decision.quality.values()) == pytest.approx(q, abs=1e-4)
        features = encoder.encode([prompt])
        before = torch.tensor([list(told.metrics.values())])
        with torch.inference_mode():
            d = head(before, features.hidden, features.mask, torch.from_numpy(q)[None]).numpy()[0]
        assert decision.prs == pytest.approx(prs(d, weights), abs=1e-4)
    edge.close()


@pytest.mark.parametrize("others", [None, ()])
def test_alignment_may_be_missing_or_a_cosine(
    clip: Path, tmp_path: Path, others: Sequence[str] | None
) -> None:
    source = open_critic(str(clip), with_critic(tmp_path / "router", clip, others))
    looking = source.network(16).module
    assert isinstance(looking, Looking)
    tokenizer = source.text.tokenizer
    for picture, prompt, q in zip(pictures()[:1], PROMPTS, measured(source)[:1], strict=False):
        text = source.text.tower(torch.from_numpy(tokenizer.encode(prompt).input_ids))[1]
        with torch.inference_mode():
            got = looking.quality(torch.from_numpy(np.array(picture))[None], text)[0]
        assert got.tolist() == pytest.approx(q, abs=1e-4)


def test_the_manifest_says_what_looking_needs(made: Job) -> None:
    path = made.out
    spec = open_bundle(path).critic
    digest = tuple(made.router.spec["critic"]["score_digest"])
    assert spec == CriticSpec(32, True, digest, "text_encoder_critic", "critic")
    assert "critic" not in json.loads((path / "bundle.json").read_text())["router"]


def test_another_critic_on_the_same_clip_keeps_the_rest(with_clip: Job, clip: Path) -> None:
    folder = with_clip.router.folder
    head = critics.load(folder)
    with torch.no_grad():
        head.bias.add_(0.1)
    critics.save(head, folder)
    router = open_router(folder)
    job = replace(with_clip, router=router, critic=open_critic(str(clip), router))
    _, rows = export_bundle(job)
    assert [row.component.name for row in rows if not row.kept] == ["critic"]


def test_a_router_that_reads_with_the_critics_clip_shares_it(
    exported: Exported, clip: Path
) -> None:
    pipeline = exported.job.pipeline
    reads, looks = open_encoder(clip), open_encoder(clip)
    shared = read_texts(pipeline.folder, pipeline.family, reads, looks)
    assert shared.critic == "text_encoder"
    assert set(shared.encoders) == {"text_encoder", "text_encoder_diffusion"}
    own = read_texts(pipeline.folder, pipeline.family, open_encoder(pipeline.folder), looks)
    assert own.critic == "text_encoder_critic"
    assert set(own.encoders) == {"text_encoder", "text_encoder_critic"}


def test_a_bundle_without_a_critic_opens_as_before(copied: Job) -> None:
    assert open_bundle(copied.out).critic is None


def test_what_cannot_be_the_critics_clip_is_refused_in_words(
    clip: Path, tmp_path: Path, copied: Job
) -> None:
    with pytest.raises(ExportError, match=r"has no critic: its labels name no CLIP"):
        open_critic(str(clip), copied.router)
    router = with_critic(tmp_path / "router", clip, digest="0" * 64)
    with pytest.raises(ExportError, match=r"taught by the CLIP 'clip' with other weights than"):
        open_critic(str(clip), router)
    with pytest.raises(ExportError, match=r"holds no open_clip_config.json"):
        open_critic(str(tmp_path), router)
    for strange in ("nobody/nothing", "hf-hub:nobody/nothing", str(tmp_path / "clap")):
        with pytest.raises(ExportError, match=f"there is no folder '{strange}', nor MODEL/"):
            open_critic(strange, router)


@pytest.mark.parametrize(
    "change",
    [
        {"clip": {}}, {"clip": None}, {"others": ["abc", 3]}, {"score_digest": None},
        {"sharpness": "much"}, {"score_digest": ["high"]},
    ],
)  # fmt: skip
def test_a_critic_that_is_not_there_whole_is_refused(
    clip: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    folder = with_critic(tmp_path / "router", clip).folder
    facts = json.loads((folder / "router.json").read_text())
    facts["critic"].update(change)
    (folder / "router.json").write_text(json.dumps(facts))
    with pytest.raises(ExportError, match=r"speaks of a critic that is not there whole"):
        open_router(folder)


def test_a_critic_of_another_router_or_none_is_refused(clip: Path, tmp_path: Path) -> None:
    folder = with_critic(tmp_path / "router", clip).folder
    critics.save(CriticHead(16, len(tiny.METRICS)), folder)
    with pytest.raises(ExportError, match=r"or of another router"):
        open_router(folder)
    (folder / critics.WEIGHTS).write_bytes(b"half")
    with pytest.raises(ExportError, match=r"not there whole"):
        open_router(folder)
    (folder / critics.WEIGHTS).unlink()
    with pytest.raises(ExportError, match=r"not there whole"):
        open_router(folder)


def test_a_clip_that_the_device_would_read_otherwise_is_refused(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_critic(str(clip), with_critic(tmp_path / "router", clip))
    seen = source.clip.network.visual.preprocess_cfg
    monkeypatch.setitem(seen, "mean", (0.9, 0.1, 0.4))  # not what open_clip itself goes by
    with pytest.raises(ExportError, match=r"would see pictures otherwise than the CLIP 'clip'"):
        source.network(16)
    monkeypatch.setitem(seen, "size", (32, 48))
    with pytest.raises(ExportError, match=r"sees pictures of 48x32, resized by squash and bicu"):
        source.manifest("text_encoder")
    monkeypatch.setitem(seen, "size", 32)
    monkeypatch.setitem(seen, "interpolation", "bilinear")
    with pytest.raises(ExportError, match=r"resized by squash and bilinear; the device can"):
        source.manifest("text_encoder")


def test_the_command_takes_a_critic_and_tells_of_one_left_out(with_clip: Job, clip: Path) -> None:
    made_from = (
        "--edge-model", with_clip.pipeline.folder, "--router", with_clip.router.folder,
        "-o", with_clip.out,
    )  # fmt: skip
    result = call(*made_from, "--critic", clip)
    assert result.exit_code == 0, result.stderr
    assert open_bundle(with_clip.out).critic is not None
    result = call(*made_from)
    assert result.exit_code == 0, result.stderr
    assert "there will be no cascade; pass --critic with the CLIP 'clip'" in result.stderr
    assert open_bundle(with_clip.out).critic is None
