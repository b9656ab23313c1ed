from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from cloud_server.training.label import PipelinePainter, folder_digest, label, sample_prompts
from PIL import Image

from cloud_server.training.quality import Metric
from tests.tiny import make_pipeline

PROMPTS = ["a cat", "two dogs", "a red house"]
SEEDS = [0, 1]


class BrightnessScorer:
    """Scores how red and how green a picture is."""

    metrics = (Metric("Red", "a", "b", 0.5), Metric("Green", "a", "b", 0.5))

    def score(self, pictures, prompts):
        return np.stack([np.asarray(p, np.float64)[..., :2].mean((0, 1)) / 255 for p in pictures])


class PlainPainter:
    """Paints one colour: red by the prompt's length, green by model; stops after `patience`."""

    def __init__(self, digest, patience=1000):
        self.digest, self.patience, self.drawn = digest, patience, []

    def draw(self, prompts, seeds):
        if self.patience < len(prompts):
            raise KeyboardInterrupt
        self.patience -= len(prompts)
        self.drawn += zip(prompts, seeds, strict=True)
        green = 51 if self.digest == "edge" else 204
        return [Image.new("RGB", (4, 4), (10 * len(p), green, 0)) for p in prompts]


def run(out, edge=None, cloud=None, prompts=PROMPTS, batch=2):
    edge, cloud = edge or PlainPainter("edge"), cloud or PlainPainter("cloud")
    scorer = BrightnessScorer()
    return label(edge, cloud, scorer, prompts, SEEDS, out, judge="clip", batch=batch)


def store_of(folder, model):
    """Return the file of labels of a model."""
    (store,) = [s for s in folder.iterdir() if f'"model": "{model}"' in s.read_text()]
    return store


def test_qualities_come_by_model_prompt_seed_and_metric(tmp_path):
    labels = run(tmp_path)
    assert labels.q.shape == (2, 3, 2, 2)
    assert labels.metrics == ("Red", "Green")
    np.testing.assert_allclose(labels.q[0, ..., 1], 0.2, atol=1e-6)
    np.testing.assert_allclose(labels.q[1, ..., 1], 0.8, atol=1e-6)
    for p, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(labels.q[:, p, :, 0], 10 * len(prompt) / 255, atol=1e-6)


def test_both_models_start_from_the_same_noise_and_no_two_pictures_share_it(tmp_path):
    edge, cloud = PlainPainter("edge"), PlainPainter("cloud")
    run(tmp_path, edge, cloud)
    assert edge.drawn == cloud.drawn
    assert len({seed for _, seed in edge.drawn}) == len(PROMPTS) * len(SEEDS)


@pytest.mark.parametrize("patience", [0, 2, 4, 6])
def test_a_killed_run_goes_on_with_the_missing_pictures(tmp_path, patience):
    edge, cloud = PlainPainter("edge", patience), PlainPainter("cloud", 0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, edge, cloud)
    again, cloud = PlainPainter("edge"), PlainPainter("cloud")
    labels = run(tmp_path, again, cloud)
    assert not set(again.drawn) & set(edge.drawn)
    assert len(again.drawn) + len(edge.drawn) == len(cloud.drawn) == 6
    np.testing.assert_array_equal(labels.q, run(tmp_path / "whole").q)


def test_a_finished_store_draws_nothing(tmp_path):
    first = run(tmp_path)
    idle = PlainPainter("edge", 0), PlainPainter("cloud", 0)
    np.testing.assert_array_equal(run(tmp_path, *idle).q, first.q)


@pytest.mark.parametrize("cut", [1, 9, 36])
def test_a_line_that_was_half_written_is_drawn_again(tmp_path, cut):
    first = run(tmp_path)
    store = store_of(tmp_path, "cloud")
    store.write_bytes(store.read_bytes()[:-cut])
    edge, cloud = PlainPainter("edge"), PlainPainter("cloud")
    np.testing.assert_array_equal(run(tmp_path, edge, cloud).q, first.q)
    assert (len(edge.drawn), len(cloud.drawn)) == (0, 1)
    lines = store.read_text(encoding="utf-8").splitlines()
    assert len([json.loads(line) for line in lines]) == 1 + 6


def test_a_store_cut_within_its_first_line_starts_again(tmp_path):
    first = run(tmp_path)
    store = store_of(tmp_path, "cloud")
    store.write_bytes(store.read_bytes()[:20])
    np.testing.assert_array_equal(run(tmp_path).q, first.q)


def test_other_models_or_prompts_get_a_store_of_their_own(tmp_path):
    digests = {
        run(tmp_path).digest,
        run(tmp_path, edge=PlainPainter("better edge")).digest,
        run(tmp_path, prompts=PROMPTS[:2]).digest,
    }
    assert len(digests) == 3
    assert len(list(tmp_path.iterdir())) == 5


def test_a_new_edge_model_leaves_the_labels_of_the_cloud_as_they_are(tmp_path):
    first = run(tmp_path)
    cloud = PlainPainter("cloud", 0)
    labels = run(tmp_path, edge=PlainPainter("better edge"), cloud=cloud)
    np.testing.assert_array_equal(labels.q[1], first.q[1])
    assert labels.q[0, ..., 1].max() > first.q[0, ..., 1].max()


def test_sampled_prompts_differ_and_ask_for_one_to_five_objects_evenly():
    prompts = sample_prompts(100, seed=1)
    assert len({prompt.text for prompt in prompts}) == 100
    assert [prompt.objects for prompt in prompts] == [1, 2, 3, 4, 5] * 20
    assert prompts == sample_prompts(100, seed=1)
    assert prompts[:10] == sample_prompts(10, seed=1)
    assert prompts != sample_prompts(100, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("models") / "edge")


def test_a_painter_draws_what_the_pipeline_draws_in_any_batch(folder):
    painter = PipelinePainter(folder, "cpu")
    together = painter.draw(["a cat", "two dogs", "a cat"], [1, 2, 3])
    alone = painter.draw(["two dogs"], [2])
    assert [picture.size for picture in together] == [(64, 64)] * 3
    np.testing.assert_allclose(np.asarray(alone[0], int), np.asarray(together[1], int), atol=1)
    assert np.asarray(together[0]).tolist() != np.asarray(together[2]).tolist()


def test_a_painter_is_known_by_weights_and_settings_and_not_by_its_place(folder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert folder_digest(copy) == folder_digest(folder)
    (copy / "defaults.json").write_text('{"width":64,"height":64,"steps":3,"guidance":4.0}')
    assert folder_digest(copy) != folder_digest(folder)
