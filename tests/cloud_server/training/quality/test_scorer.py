"""Scores of a CLIP model, and what it can be opened from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cloud_server.errors import DataError, ModelError
from cloud_server.starter import starter_folder
from cloud_server.training.digest import folder_digest
from cloud_server.training.quality import (
    ALIGNMENT,
    Alignment,
    Clip,
    Metric,
    QualityScorer,
    load_metrics,
)
from cloud_server.training.quality.alignment import SHARPNESS
from cloud_server.training.starter.degradations import degrade
from cloud_server.training.starter.scenes import FONT_PATHS, batches
from tests.tiny import make_clip

needs_font = pytest.mark.skipif(
    not any(path.exists() for path in FONT_PATHS),
    reason="drawing scenes needs the Debian package fonts-noto-color-emoji",
)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(starter_folder() / "clip")


@pytest.fixture(scope="module")
def scorer(clip: Clip) -> QualityScorer:
    return QualityScorer(clip)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(make_clip(tmp_path_factory.mktemp("models") / "clip"))


def _picture() -> np.ndarray:
    rows, columns = np.mgrid[0:128, 0:128] / 128
    sky = np.broadcast_to((0.55, 0.75, 0.98), (128, 128, 3)).copy()
    sky[80:] = (0.35, 0.65, 0.25)
    disc = (rows - 0.5) ** 2 + (columns - 0.5) ** 2 < 0.05
    sky[disc] = (0.88, 0.15, 0.12)
    return sky.astype(np.float32)


def _image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def test_scores_lie_between_zero_and_one_whatever_the_batch(scorer):
    images = [_image(_picture())] * 3
    scores = scorer.score(images, batch=2)
    assert scores.shape == (3, 10)
    assert ((scores > 0) & (scores < 1)).all()
    assert np.allclose(scores, scorer.score(images[:1]), atol=1e-4)


def test_a_score_is_the_softmax_of_the_two_logits(clip, scorer):
    images, metric = [_image(_picture())], scorer.metrics[2]
    texts = clip.texts([metric.positive, metric.negative])
    with torch.inference_mode():
        logits = clip.network.logit_scale.exp() * clip.pictures(images) @ texts.T
    expected = logits.softmax(-1)[0, 0].item()
    assert scorer.score(images)[0, 2] == pytest.approx(expected, abs=1e-5)


def test_exchanging_the_poles_mirrors_the_score(clip, scorer):
    swapped = [Metric(m.name, m.negative, m.positive, m.weight) for m in scorer.metrics]
    images = [_image(_picture())]
    mirrored = QualityScorer(clip, swapped).score(images)
    assert np.allclose(scorer.score(images) + mirrored, 1, atol=1e-5)


def test_weights_sum_to_one_with_alignment_and_without(tiny):
    metrics = (Metric("A", "a", "b", 3.0), Metric("B", "c", "d", 1.0))
    assert [m.weight for m in QualityScorer(tiny, metrics).metrics] == [0.75, 0.25]
    aligned = QualityScorer(tiny, metrics, Alignment(0.2, ("a cat", "a dog"))).metrics
    assert [m.name for m in aligned] == ["A", "B", ALIGNMENT]
    assert [m.weight for m in aligned] == pytest.approx([0.6, 0.2, 0.2])


def test_a_scorer_is_known_by_its_clip_and_texts_and_not_by_its_weights(tiny, tmp_path):
    metrics = (Metric("A", "a", "b", 3.0), Metric("B", "c", "d", 1.0))
    own = QualityScorer(tiny, metrics).digest
    light = (Metric("A", "a", "b", 1.0), Metric("B", "c", "d", 1.0))
    assert QualityScorer(tiny, light).digest == own
    others = [
        QualityScorer(tiny, metrics[:1]),
        QualityScorer(tiny, metrics, Alignment(0.5, ("a cat", "a dog"))),
        QualityScorer(tiny, metrics, Alignment(0.5, ("a cat", "a cow"))),
        QualityScorer(Clip(make_clip(tmp_path, seed=1)), metrics),
    ]
    assert len({own, *(other.digest for other in others)}) == 5


@needs_font
@pytest.mark.parametrize("metric", ["Clarity", "Sharpness", "Harmony", "Color", "Consistency"])
def test_spoiled_scenes_score_lower_on_their_metric(scorer, metric):
    index = [m.name for m in scorer.metrics].index(metric)
    rng = np.random.default_rng(7)
    clean = [p.astype(np.float32) / 255 for p in next(batches(seed=777, batch=24))[0]]
    spoiled = [degrade(picture, metric, 0.8, rng) for picture in clean]
    good = scorer.score([_image(p) for p in clean])[:, index]
    bad = scorer.score([_image(p) for p in spoiled])[:, index]
    assert bad.mean() < good.mean()
    assert np.mean(bad < good) > 0.6


@needs_font
def test_alignment_is_how_well_a_picture_shows_its_prompt(clip):
    pictures, captions, _ = next(batches(seed=5, batch=32))
    scorer = QualityScorer(clip, alignment=Alignment(0.5, tuple(captions)))
    images = [Image.fromarray(picture) for picture in pictures]
    own = scorer.score(images, captions, batch=5)
    others = scorer.score(images, captions[1:] + captions[:1])
    np.testing.assert_allclose(own[:, :10], others[:, :10], atol=1e-4)
    assert (own[:, 10] > others[:, 10]).mean() > 0.95
    assert ((own[:, 10] >= 0) & (own[:, 10] <= 1)).all()
    one = scorer.score(images[3:4], captions[3:4])
    np.testing.assert_allclose(one[0], own[3], atol=1e-4)


def test_alignment_is_a_probability_among_the_prompts_or_else_the_cosine(tiny):
    prompts = ("a cat", "two red apples", "the beach")
    images = [_image(_picture()), _image(1 - _picture())]
    cosines = (tiny.pictures(images) @ tiny.texts(prompts).T).numpy()
    logits = np.exp(SHARPNESS * tiny.scale * cosines)
    expected = (logits / logits.sum(1, keepdims=True))[[0, 1], [0, 2]]
    asked = [prompts[0], prompts[2]]
    aligned = QualityScorer(tiny, alignment=Alignment(0.5, prompts)).score(images, asked)[:, -1]
    np.testing.assert_allclose(aligned, expected, rtol=1e-5)
    plain = QualityScorer(tiny, alignment=Alignment(0.5, prompts, count=0)).score(images, asked)
    np.testing.assert_allclose(plain[:, -1], cosines[[0, 1], [0, 2]].clip(0), atol=1e-6)


def test_distractors_are_drawn_by_seed_and_prompt_and_are_never_the_prompt():
    prompts = tuple(f"prompt {i}" for i in range(50))
    alignment = Alignment(0.5, prompts, count=8)
    drawn = [alignment.distractors(prompt) for prompt in prompts]
    assert all(len(set(d)) == 8 and i not in d for i, d in enumerate(drawn))
    assert len({tuple(d) for d in drawn}) == 50
    assert drawn == [alignment.distractors(prompt) for prompt in prompts]
    assert drawn[0] != Alignment(0.5, prompts, count=8, seed=1).distractors(prompts[0])
    assert sorted(Alignment(0.5, prompts[:3]).distractors(prompts[1])) == [0, 2]


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.5, float("nan")])
def test_alignment_takes_a_share_of_the_weight_and_not_all(weight):
    with pytest.raises(DataError, match="give one between 0 and 1"):
        Alignment(weight, ("a cat", "a dog"))


def test_alignment_needs_others_to_compare_with():
    with pytest.raises(DataError, match="two different prompts or more"):
        Alignment(0.5, ("a cat",))


def test_a_folder_is_known_by_its_files_and_called_by_its_name(tiny):
    assert tiny.name == "clip"
    assert tiny.digest == folder_digest(tiny._folder)


def test_a_name_with_a_file_of_weights_is_opened_and_known_by_them(tmp_path):
    import open_clip

    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "Tiny-16.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "Tiny-16.json")
    torch.manual_seed(0)
    network = open_clip.CLIP(**config)
    for name in ("one.pt", "other.pt"):
        torch.save(network.state_dict(), tmp_path / name)
        network.logit_scale.data += 1
    one, other = (Clip("Tiny-16", str(tmp_path / name)) for name in ("one.pt", "other.pt"))
    assert QualityScorer(one, load_metrics()[:2]).score([_image(_picture())]).shape == (1, 2)
    assert one.name == "Tiny-16/one.pt"
    assert one.digest == Clip("Tiny-16", str(tmp_path / "one.pt")).digest != other.digest


@pytest.mark.parametrize(
    ("model", "pretrained", "told"),
    [
        ("ViT-Z", None, "there is no CLIP model 'ViT-Z'"),
        ("ViT-B-32", None, "no pretrained weights None; choose of openai"),
        ("ViT-B-32", "my-tag", "no pretrained weights 'my-tag'"),
        ("FOLDER", None, "holds no open_clip_config.json"),
        ("CLIP", "openai", "has its own weights"),
    ],
)
def test_what_is_no_clip_is_one_sentence_before_anything_is_loaded(
    tmp_path, tiny, model, pretrained, told
):
    model = {"FOLDER": str(tmp_path), "CLIP": tiny.model}.get(model, model)
    with pytest.raises(ModelError, match=told):
        Clip(model, pretrained)


def test_a_folder_without_its_weights_is_one_sentence(tmp_path):
    make_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot load the CLIP model"):
        Clip(tmp_path).texts(["a cat"])
