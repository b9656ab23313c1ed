"""`python -m export`: what reaches stdout and stderr, and one sentence for each wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from edge_agent.bundle import open_bundle
from export.cli import main
from export.sources import Lora, open_lora
from tests import tiny


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_stdout_is_the_folder_and_stderr_the_table(copied):
    made_from = ("--edge-model", copied.pipeline.folder, "--router", copied.router.folder)
    result = call(*made_from, "-o", copied.out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{copied.out}\n"
    heading, *lines = result.stderr.splitlines()
    assert heading.split() == ["component", "precision", "MB", "parity", "loss", "seconds"]
    assert [line.split()[0] for line in lines] == [
        "text_encoder", "predictor", "unet", "vae_decoder"
    ]  # fmt: skip
    assert all(line.endswith("kept") for line in lines)


def test_quiet_prints_the_folder_alone(copied, monkeypatch):
    monkeypatch.setenv("EDGE_AGENT_BUNDLE", str(copied.out))
    made_from = ("--edge-model", copied.pipeline.folder, "--router", copied.router.folder)
    result = call(*made_from, "--quiet")
    assert (result.exit_code, result.output) == (0, f"{copied.out}\n")


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
        ({"scheduler": ["diffusers", "HeunScheduler"]}, "scheduler of '{}' is a HeunScheduler"),
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


def test_a_scheduler_that_no_sampler_can_follow_is_named(exported, router, tmp_path):
    folder = Path(shutil.copytree(exported.job.pipeline.folder, tmp_path / "model"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_lu_lambdas": True}))
    message = failure("--edge-model", folder, "--router", router)
    assert f"'{folder}' cannot be sampled: the scheduler option use_lu_lambdas=True" in message


def test_the_refiner_of_xl_lacks_a_text_encoder(router, tmp_path):
    folder = write_index(
        tmp_path / "model", _class_name="StableDiffusionXLPipeline", text_encoder=[None, None]
    )
    message = failure("--edge-model", folder, "--router", router)
    assert f"the text_encoder of '{folder}' is a None, which the device cannot run" in message


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"_class_name": "AutoencoderTiny", "latent_channels": 4}, "has 4 channels, but"),
        ({"_class_name": "AutoencoderDC"}, "is a AutoencoderDC, which the device cannot run"),
        ({"_class_name": "AutoencoderKL", "latents_mean": [0.1]}, "has latents_mean"),
        (
            {"latent_channels": 8, "decoder_block_out_channels": [8, 8]}
            | {"_class_name": "AutoencoderTiny"},
            "has 2 pixels a latent, but 'tiny' needs 8",
        ),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_named(exported, router, tmp_path, config, sentence):
    usual = {"decoder_block_out_channels": [8, 8, 8, 8]}
    (tmp_path / "config.json").write_text(json.dumps(usual | config))
    made_from = ("--edge-model", exported.job.pipeline.folder, "--router", router)
    message = failure(*made_from, "--vae", tmp_path)
    assert f"the autoencoder in '{tmp_path}'" in message
    assert sentence in message


def test_a_large_autoencoder_is_refused_for_previews(exported, router, tmp_path):
    blocks = {"block_out_channels": [8] * 4, "latent_channels": 8, "_class_name": "AutoencoderKL"}
    (tmp_path / "config.json").write_text(json.dumps(blocks))
    made_from = ("--edge-model", exported.job.pipeline.folder, "--router", router)
    message = failure(*made_from, "--preview-vae", tmp_path)
    assert (
        f"the autoencoder in '{tmp_path}' is of the kind AutoencoderKL, too slow for previews"
        in message
    )
    assert "AutoencoderTiny" in message


@pytest.mark.parametrize(
    "given", ["nowhere", "nowhere:0.5", "empty", "empty:nan", "odd.safetensors"]
)
def test_what_is_no_lora_is_named(exported, router, tmp_path, given):
    (tmp_path / "empty").mkdir()
    made_from = ("--edge-model", exported.job.pipeline.folder, "--router", router)
    message = failure(*made_from, "--lora", f"{tmp_path}/{given}")
    assert f"'{tmp_path}/{given}' is no LoRA: expected a folder with one .safetensors" in message


def test_a_lora_of_another_model_is_named(exported, tmp_path):
    from safetensors.torch import save_file

    weights = {"unet.nothing.lora_A.weight": torch.ones(2, 3)}
    save_file(
        weights | {"unet.nothing.lora_B.weight": torch.ones(3, 2)}, tmp_path / "l.safetensors"
    )
    made_from = ("--edge-model", exported.job.pipeline.folder)
    made_from += ("--router", exported.job.router.folder, "-o", tmp_path / "bundle")
    message = failure(*made_from, "--lora", f"{tmp_path / 'l.safetensors'}:0.5")
    assert f"the LoRA '{tmp_path / 'l.safetensors'}' could not be merged into 'tiny'" in message
    assert [path.name for path in tmp_path.iterdir()] == ["l.safetensors"]


def test_a_lora_may_say_how_much_of_it_is_wanted(tmp_path):
    file = tmp_path / "style" / "weights.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"")
    assert open_lora(f"{file.parent}") == Lora(file, 1.0, "style")
    assert open_lora(f"{file.parent}:0.25") == Lora(file, 0.25, "style")
    assert open_lora(f"{file}:-1") == Lora(file, -1.0, "weights")


def test_defaults_may_be_given_at_export(copied):
    made_from = ("--edge-model", copied.pipeline.folder, "--router", copied.router.folder)
    assert call(*made_from, "-o", copied.out, "--steps", 1, "--guidance", 0).exit_code == 0
    drawing = open_bundle(copied.out).diffusion
    assert (drawing.steps, drawing.guidance) == (1, 0.0)


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
    message = failure(
        *made_from, "--router", exported.job.router.folder, "--text-encoder", tmp_path
    )
    assert f"the text encoder '{tmp_path}' cannot be opened" in message


def test_an_output_with_other_files_is_not_replaced(exported, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    made_from = ("--edge-model", exported.job.pipeline.folder)
    made_from += ("--router", exported.job.router.folder)
    assert "holds 'thesis.txt', which is no part" in failure(*made_from, "-o", tmp_path)
    assert "is a file" in failure(*made_from, "-o", tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
