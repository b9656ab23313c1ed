"""`python -m export`: what reaches stdout and stderr, and one sentence for each wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from export.cli import main
from tests import tiny


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_stdout_is_the_folder_and_stderr_the_table(copied):
    made_from = ("--edge-model", copied.pipeline.folder, "--router", copied.router.folder)
    result = call(*made_from, "-o", copied.out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{copied.out}\n"
    heading, *lines = result.stderr.splitlines()
    assert heading.split() == ["component", "file", "MB", "parity", "seconds"]
    assert [line.split()[0] for line in lines] == [
        "text_encoder", "predictor", "unet", "vae_decoder"
    ]  # fmt: skip
    assert all(line.endswith("kept") for line in lines)


def test_quiet_prints_the_folder_alone(copied, monkeypatch):
    monkeypatch.setenv("EDGE_AGENT_BUNDLE", str(copied.out))
    made_from = ("--edge-model", copied.pipeline.folder, "--router", copied.router.folder)
    result = call(*made_from, "--quiet")
    assert (result.exit_code, result.output) == (0, f"{copied.out}\n")


@pytest.mark.parametrize("precision", ["fp16", "int8", "nonsense"])
def test_an_unknown_precision_is_a_usage_error(precision):
    result = call("--precision", precision)
    assert result.exit_code == 2
    assert f"'{precision}' is not 'fp32'" in result.stderr


@pytest.fixture
def router(tmp_path: Path) -> Path:
    return tiny.make_router(tmp_path / "router")


def failure(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_missing_folder_is_named(router, tmp_path):
    missing = tmp_path / "nowhere"
    assert f"there is no folder '{missing}'" in failure("--edge-model", missing, "--router", router)


def test_a_hub_id_that_cannot_be_fetched_is_named(router):
    message = failure("--edge-model", "nobody/nothing", "--router", router)
    assert "'nobody/nothing' is no folder here and could not be fetched" in message


def test_a_folder_that_is_no_pipeline_is_named(router, tmp_path):
    message = failure("--edge-model", tmp_path, "--router", router)
    assert "is no diffusers pipeline: it has no model_index.json" in message


def write_index(folder: Path, **changes: object) -> Path:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"_class_name": "FluxPipeline"}, "pipeline of '{}' is a FluxPipeline, which the device"),
        ({"scheduler": ["diffusers", "LCMScheduler"]}, "scheduler of '{}' is a LCMScheduler"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "supported: CLIPTextModel"),
    ],
)
def test_an_unsupported_class_is_named_with_the_supported_ones(router, tmp_path, changes, sentence):
    folder = write_index(tmp_path / "model", **changes)
    message = failure("--edge-model", folder, "--router", router)
    assert sentence.format(folder) in message
    assert "supported: " in message


def test_a_unet_with_inputs_the_device_lacks_is_refused(router, tmp_path):
    folder = write_index(tmp_path / "model")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text('{"addition_embed_type": "text_time"}')
    message = failure("--edge-model", folder, "--router", router)
    assert "addition_embed_type='text_time'" in message


def test_a_damaged_description_is_named(router, tmp_path):
    folder = write_index(tmp_path / "model")
    (folder / "model_index.json").write_text("{")
    assert "model_index.json" in failure("--edge-model", folder, "--router", router)


def test_a_folder_that_is_no_router_is_named(exported, tmp_path):
    message = failure("--edge-model", exported.job.pipeline.folder, "--router", tmp_path)
    assert f"'{tmp_path}' is no router: it has no predictor.safetensors" in message


def test_a_router_that_contradicts_itself_is_refused(exported, router):
    spec = json.loads((router / "router.json").read_text())
    spec["metrics"].pop()
    (router / "router.json").write_text(json.dumps(spec))
    message = failure("--edge-model", exported.job.pipeline.folder, "--router", router)
    assert "predicts 10 metrics, but its router.json names 9" in message


def test_a_folder_that_is_no_text_encoder_is_named(exported, tmp_path):
    made_from = ("--edge-model", exported.job.pipeline.folder)
    message = failure(*made_from, "--router", exported.job.router.folder, "--text-encoder", tmp_path)
    assert f"the text encoder '{tmp_path}' cannot be opened" in message


def test_an_output_with_other_files_is_not_replaced(exported, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    made_from = ("--edge-model", exported.job.pipeline.folder)
    made_from += ("--router", exported.job.router.folder)
    assert "holds 'thesis.txt', which is no part" in failure(*made_from, "-o", tmp_path)
    assert "is a file" in failure(*made_from, "-o", tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
