"""Training the starter models: every stage ends with files that the ecosystem opens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from cloud_server.starter import starter_folder
from cloud_server.torchvision_guard import guard
from cloud_server.training.starter import (
    autoencoder,
    clip,
    decoder,
    diffusion,
    judge,
    router,
    scenes,
)
from cloud_server.training.starter.cli import _alone_in, train_starter
from edge_agent import EdgeAgent, Request, open_bundle

guard()
from diffusers import StableDiffusionPipeline  # noqa: E402  the guard must come first

needs_font = pytest.mark.skipif(
    not any(path.exists() for path in scenes.FONT_PATHS),
    reason="drawing scenes needs the Debian package fonts-noto-color-emoji",
)


EYES = starter_folder().with_name("recognizer") / "emoji" / "backbone"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with out/ and work/ after three steps of every stage."""
    root = tmp_path_factory.mktemp("starter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(diffusion.SCENES, "cpu", 64)
        patch.setitem(diffusion.BATCH, "cpu", 8)
        patch.setitem(diffusion.DISTIL_BATCH, "cpu", 2)
        patch.setitem(clip.BATCH, "cpu", 8)
        patch.setitem(autoencoder.SCENES, "cpu", 2)
        patch.setitem(decoder.BATCH, "cpu", 3)
        patch.setitem(judge.BATCH, "cpu", 8)
        patch.setitem(router.PROMPTS, "cpu", 10)
        run = CliRunner().invoke(
            train_starter,
            [
                *("-o", str(root / "out"), "--work", str(root / "work"), "--steps", "3"),
                *("--eyes", str(EYES)),
            ],
            catch_exceptions=False,
        )
    assert run.exit_code == 0, run.output
    return root


@needs_font
@pytest.mark.slow
@pytest.mark.parametrize("name", ["edge", "cloud"])
def test_both_models_open_in_diffusers_and_draw(trained, name):
    folder = trained / "out" / name
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    defaults = json.loads((folder / "defaults.json").read_text())
    picture = pipeline("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert picture.images[0].size == (defaults["width"], defaults["height"]) == (128, 128)


@needs_font
@pytest.mark.slow
def test_both_models_are_conditioned_by_the_one_text_encoder(trained):
    weights = "text_encoder/model.safetensors"
    edge, cloud = trained / "out" / "edge" / weights, trained / "out" / "cloud" / weights
    assert edge.read_bytes() == cloud.read_bytes()


@needs_font
@pytest.mark.slow
def test_the_edge_has_a_decoder_of_its_own_behind_the_shared_encoder(trained):
    edge, cloud = (
        load_file(trained / "out" / name / "vae" / "diffusion_pytorch_model.safetensors")
        for name in ("edge", "cloud")
    )
    changed = {name.split(".")[0] for name in edge if not torch.equal(edge[name], cloud[name])}
    assert changed == {"decoder"}


@needs_font
@pytest.mark.slow
def test_what_was_trained_is_exported_and_draws(trained, tmp_path):
    export = [sys.executable, "-m", "export", "--quiet", "--starter", trained / "out"]
    subprocess.run([*export, "-o", tmp_path / "bundle"], check=True, capture_output=True)
    with EdgeAgent(open_bundle(tmp_path / "bundle")) as agent:
        result = agent.generate(Request("two red apples above a cat", seed=1))
    assert result.picture.image.size == (128, 128)
    assert result.picture.steps == diffusion.DISTILLED_STEPS


@needs_font
@pytest.mark.slow
def test_a_model_is_trained_on_from_where_it_stands(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(diffusion.SCENES, "cpu", 64)
    monkeypatch.setitem(diffusion.BATCH, "cpu", 8)
    shutil.copytree(trained / "out" / "clip", tmp_path / "out" / "clip")
    folders = ["-o", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    start = ["--start", str(trained / "out" / "cloud"), "--steps", "1", "--seed", "7"]
    run = CliRunner().invoke(train_starter, ["cloud", *folders, *start], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    weights = "unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(root / "out" / "cloud" / weights) for root in (trained, tmp_path))
    apart = max(float((after[name].float() - before[name].float()).abs().max()) for name in before)
    assert 0 < apart < 0.01


SHEETS = {
    "scenes": (1024, 768), "autoencoder": (1024, 512), "edge": (512, 384), "cloud": (512, 384),
    "distil": (512, 384), "decoder": (512, 384),
}  # fmt: skip


@needs_font
@pytest.mark.slow
def test_stages_leave_sheets_to_look_at(trained):
    for name, size in SHEETS.items():
        with Image.open(trained / "work" / f"{name}.png") as sheet:
            assert sheet.size == size


def test_an_unknown_stage_is_refused_by_name():
    run = CliRunner().invoke(train_starter, ["paint"])
    assert run.exit_code == 2
    assert "paint" in run.output


def test_a_stage_without_the_one_before_it_is_refused_by_name(tmp_path):
    folders = ["-o", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    run = CliRunner().invoke(train_starter, ["cloud", *folders])
    assert run.exit_code == 1
    assert "run cloud-server train-starter clip first" in run.output


@pytest.mark.parametrize(
    ("stages", "code", "said"),
    [
        (["cloud"], 1, "holds no unet/config.json"),
        ([], 2, "one stage"),
        (["clip"], 2, "not for clip"),
    ],
)
def test_a_start_that_cannot_be_is_refused(tmp_path, stages, code, said):
    run = CliRunner().invoke(train_starter, [*stages, "--start", str(tmp_path)])
    assert run.exit_code == code
    assert said in run.output


def test_a_start_of_the_other_kind_is_refused(tmp_path):
    start = ["--start", str(starter_folder() / "cloud"), "--work", str(tmp_path / "work")]
    run = CliRunner().invoke(train_starter, ["edge", *start, "-o", str(tmp_path / "out")])
    assert run.exit_code == 2
    assert "is a UNet of (144, 288) channels, not one of (72, 144)" in run.output


def test_two_trainings_do_not_share_a_folder(tmp_path):
    with _alone_in(tmp_path / "work"):
        run = CliRunner().invoke(train_starter, ["scenes", "--work", str(tmp_path / "work")])
    assert run.exit_code == 1
    assert "another training is writing in" in run.output


def test_the_decoder_needs_a_backbone_to_see_with(tmp_path):
    folders = ["-o", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    for stages in ([], ["decoder"]):  # all of them: before the first
        run = CliRunner().invoke(train_starter, [*stages, *folders, "--eyes", str(tmp_path)])
        assert run.exit_code == 1
        assert f"{tmp_path} holds none" in run.output
