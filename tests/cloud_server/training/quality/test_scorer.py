"""The ten metrics as data, and their scores."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cloud_server.starter import starter_folder
from cloud_server.training.quality import ALIGNMENT, QualityScorer, load_metrics
from cloud_server.training.starter.degradations import degrade
from cloud_server.training.starter.scenes import FONT_PATHS, batches

needs_font = pytest.mark.skipif(
    not any(path.exists() for path in FONT_PATHS),
    reason="drawing scenes needs the Debian package fonts-noto-color-emoji",
)


@pytest.fixture(scope="module")
def scorer() -> QualityScorer:
    return QualityScorer.open(starter_folder() / "clip")


def _picture() -> np.ndarray:
    rows, columns = np.mgrid[0:128, 0:128] / 128
    sky = np.broadcast_to((0.55, 0.75, 0.98), (128, 128, 3)).copy()
    sky[80:] = (0.35, 0.65, 0.25)
    disc = (rows - 0.5) ** 2 + (columns - 0.5) ** 2 < 0.05
    sky[disc] = (0.88, 0.15, 0.12)
    return sky.astype(np.float32)


def _image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def test_the_metrics_are_the_ten_of_the_paper_and_weigh_one():
    metrics = load_metrics()
    assert [m.name for m in metrics] == [
        "Definition", "Detail", "Clarity", "Sharpness", "Harmony",
        "Realism", "Color", "Consistency", "Layout", "Integrity",
    ]  # fmt: skip
    assert sum(m.weight for m in metrics) == pytest.approx(1)
    assert (metrics[0].positive, metrics[0].negative) == (
        "High definition photo",
        "Low definition photo",
    )


def test_metrics_can_come_from_another_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[[metric]]\nname="A"\npositive="good"\nnegative="bad"\nweight=1.0\n')
    assert [m.name for m in load_metrics(file)] == ["A"]


def test_scores_lie_between_zero_and_one_whatever_the_batch(scorer):
    images = [_image(_picture())] * 3
    scores = scorer.score(images, batch=2)
    assert scores.shape == (3, 10)
    assert ((scores > 0) & (scores < 1)).all()
    assert np.allclose(scores, scorer.score(images[:1]), atol=1e-4)


def test_exchanging_the_poles_mirrors_the_score(scorer):
    swapped = [type(m)(m.name, m.negative, m.positive, m.weight) for m in scorer.metrics]
    mirrored = QualityScorer.open(starter_folder() / "clip", metrics=swapped)
    images = [_image(_picture())]
    assert np.allclose(scorer.score(images) + mirrored.score(images), 1, atol=1e-5)


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
def test_alignment_is_how_well_a_picture_shows_its_prompt():
    scorer = QualityScorer.open(starter_folder() / "clip", alignment=0.5)
    pictures, captions, _ = next(batches(seed=5, batch=32))
    images = [Image.fromarray(picture) for picture in pictures]
    assert [m.name for m in scorer.metrics][10:] == [ALIGNMENT]
    assert sum(m.weight for m in scorer.metrics) == pytest.approx(1)
    own = scorer.score(images, captions, batch=5)
    others = scorer.score(images, captions[1:] + captions[:1])
    np.testing.assert_allclose(own[:, :10], others[:, :10], atol=1e-4)
    assert (own[:, 10] > others[:, 10]).mean() > 0.95
    assert others.min() >= 0
