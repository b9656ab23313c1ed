"""`cloud-server label`: from its flags to the file, and every wrong use in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cloud_server.cli import main
from cloud_server.training.labels import read
from tests.tiny import make_clip, make_pipeline
from tests.wire import HeldEngine, running_server

METRICS = (
    '[[metric]]\nname="A"\npositive="a cat"\nnegative="a dog"\nweight=3\n'
    '[[metric]]\nname="B"\npositive="two"\nnegative="red"\nweight=1\n'
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_clip(folder / "clip")
    make_pipeline(folder / "edge", seed=1)
    make_pipeline(folder / "cloud", seed=2, unet_channels=(32, 96))
    return folder


@pytest.fixture
def flags(models: Path, tmp_path: Path) -> list[str]:
    """What labels two prompts with two seeds."""
    (tmp_path / "prompts.txt").write_text("a cat\ntwo red apples\n", encoding="utf-8")
    (tmp_path / "metrics.toml").write_text(METRICS, encoding="utf-8")
    return [
        "--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "labels.parquet"),
        "--edge", str(models / "edge"), "--cloud", str(models / "cloud"),
        "--clip", str(models / "clip"), "--metrics", str(tmp_path / "metrics.toml"),
        "--seeds", "2", "--device", "cpu",
    ]  # fmt: skip


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["label", *arguments])


def test_labels_are_written_with_all_that_made_them(flags, models, tmp_path):
    result = invoke(*flags, "--alignment", "0.2", "--pictures", str(tmp_path / "pictures"))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'labels.parquet'}\n"
    assert "Alignment" in result.stderr
    labels = read(tmp_path / "labels.parquet")
    assert labels.q.shape == (2, 2, 2, 3)
    assert labels.metrics == ("A", "B", "Alignment")
    np.testing.assert_allclose(labels.weights, [0.6, 0.2, 0.2])
    assert labels.origin["models"]["edge"]["name"] == "edge"
    assert labels.origin["models"]["cloud"]["settings"]["steps"] == 2
    assert labels.origin["scorer"]["clip"] == "clip"
    assert len(labels.origin["scorer"]["digest"]) == 64
    assert str(models) not in str(labels.origin)
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 8


def test_the_edge_may_draw_more_than_the_cloud(flags, tmp_path):
    result = invoke(*flags, "--edge-seeds", "3")
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "labels.parquet").drawn.sum(2).tolist() == [[3, 3], [2, 2]]
    assert "of 2 prompts" in result.stderr
    result = invoke(*flags, "--edge-seeds", "1")
    assert result.exit_code != 0
    assert "--edge-seeds 1 is below --seeds 2; give more or leave it out" in result.stderr


def test_other_metrics_and_weights_need_no_new_pictures(flags, models, tmp_path):
    pictures = ["--pictures", str(tmp_path / "pictures")]
    assert invoke(*flags, *pictures).exit_code == 0
    first = read(tmp_path / "labels.parquet")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "pictures").rglob("*.png")}
    (tmp_path / "metrics.toml").write_text(METRICS.replace('"red"', '"a house"'), encoding="utf-8")
    assert invoke(*flags, *pictures, "--alignment", "0").exit_code == 0
    second = read(tmp_path / "labels.parquet")
    assert second.metrics == ("A", "B")
    np.testing.assert_array_equal(first.q[..., 0], second.q[..., 0])
    assert (first.q[..., 1] != second.q[..., 1]).all()
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "pictures").rglob("*.png")} == kept


def test_a_server_can_take_the_place_of_the_cloud_model(flags, tmp_path):
    with running_server(HeldEngine(held=False)) as server:
        place = flags.index("--cloud")
        flags[place : place + 2] = ["--cloud-address", server.address]
        result = invoke(*flags)
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "labels.parquet").origin["models"]["cloud"]["name"] == "held/model"


def test_prompts_can_be_captions_of_the_starter_world(flags, tmp_path):
    result = invoke("--starter-prompts", "3", "--seed", "7", *flags[2:], "--seeds", "1")
    assert result.exit_code == 0, result.output
    labels = read(tmp_path / "labels.parquet")
    assert len(labels.prompts) == 3
    assert labels.origin["scorer"]["alignment"]["seed"] == 7


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ({"--prompts": None}, 2, "give either --prompts FILE or --starter-prompts NUMBER"),
        ({"--starter-prompts": "3"}, 2, "give either --prompts FILE or --starter-prompts NUMBER"),
        ({"--cloud-address": "127.0.0.1:1"}, 2, "--cloud and --cloud-address are both given"),
        ({"--cloud": None, "--cloud-address": "nonsense"}, 2, "'nonsense' is not HOST:PORT"),
        ({"--alignment": "1"}, 2, "1"),
        ({"--workers": "0"}, 2, "0"),
        ({"--device": "tpu"}, 2, "'tpu' is none of auto, cpu, cuda"),
        ({"--edge": "/nowhere"}, 1, "there is no model folder /nowhere"),
        ({"--clip": "ViT-Z"}, 1, "there is no CLIP model 'ViT-Z'"),
        ({"--out": "/nowhere/labels.parquet"}, 1, "the folder /nowhere does not exist"),
    ],
)
def test_wrong_use_is_one_sentence(flags, tmp_path, change, code, told):
    asked = dict(zip(flags[::2], flags[1::2], strict=True)) | change
    if "--out" in change:
        del asked["-o"]
    result = invoke(*(word for key, value in asked.items() if value for word in (key, value)))
    assert result.exit_code == code
    assert told in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "labels.parquet").exists()


def test_alignment_of_one_prompt_alone_is_refused(flags, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    result = invoke(*flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "alignment needs two different prompts" in result.stderr


def test_bad_metrics_name_their_file(flags, tmp_path):
    (tmp_path / "metrics.toml").write_text("", encoding="utf-8")
    result = invoke(*flags)
    assert result.exit_code == 1
    assert f"{tmp_path / 'metrics.toml'} holds no metric" in result.stderr
