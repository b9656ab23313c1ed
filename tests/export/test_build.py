"""What an export leaves on disk: networks that agree with torch, digests, kept components."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from cloud_server.training import predictor
from edge_agent.bundle import open_bundle
from export.build import export_bundle
from export.bundle_writer import BundleWriter
from export.errors import ExportError, naming
from export.sources import open_pipeline, open_router
from export.text import PROBES, open_text
from tests import tiny

NAMES = ["text_encoder", "predictor", "unet", "vae_decoder"]


def run(path: Path, feeds: dict) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in feeds.items()})


@torch.inference_mode()
def test_every_network_agrees_with_torch_on_shapes_of_the_tests_own(exported):
    bundle, folder = open_bundle(exported.path), exported.job.pipeline.folder
    rng = torch.Generator().manual_seed(5)

    ids = torch.randint(60, (5, 32), generator=rng)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    hidden, pooled = run(bundle.path_of("text_encoder"), {"input_ids": ids})
    want = encoder(ids)
    np.testing.assert_allclose(hidden, want.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(pooled, want.pooler_output, atol=1e-5)

    mask = torch.zeros(5, 32)
    mask[:, 1:6] = 1
    (d,) = run(bundle.path_of("predictor"), {"hidden": hidden, "mask": mask})
    router = predictor.load(exported.job.router.folder)
    np.testing.assert_allclose(d, router(torch.from_numpy(hidden), mask), atol=1e-5)

    # 9 x 7 halves to no whole number: such sizes are allowed too.
    latents, states = torch.randn(2, 8, 9, 7, generator=rng), torch.randn(2, 32, 32, generator=rng)
    feeds = {"sample": latents, "timestep": np.float32(321), "encoder_hidden_states": states}
    (noise,) = run(bundle.path_of("unet"), feeds)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    np.testing.assert_allclose(noise, unet(latents, 321, states).sample, atol=1e-4)

    (pictures,) = run(bundle.path_of("vae_decoder"), {"latent_sample": latents})
    vae = AutoencoderTiny.from_pretrained(folder / "vae")
    assert pictures.shape == (2, 3, 72, 56)
    np.testing.assert_allclose(pictures, vae.decode(latents).sample, atol=1e-4)


def test_an_interrupted_export_goes_on_where_it_was(exported):
    assert not exported.existed_after_interruption
    assert {"text_encoder", "predictor", "components.json"} <= set(exported.left_behind)
    assert [row.kept for row in exported.rows] == [True, True, False, False]
    assert not exported.path.with_name("bundle.partial").exists()


def test_the_manifest_says_what_the_device_needs(exported):
    manifest = json.loads((exported.path / "bundle.json").read_text())
    assert list(manifest["components"]) == NAMES
    assert all(part["optimized"] for part in manifest["components"].values())
    bundle = open_bundle(exported.path)
    drawing = bundle.diffusion
    assert (drawing.width, drawing.height, drawing.steps, drawing.guidance) == (64, 64, 2, 4.0)
    assert (drawing.latent_channels, drawing.vae_scale, drawing.model) == (8, 8, "tiny")
    assert drawing.scheduler["_class_name"] == "DPMSolverMultistepScheduler"
    assert drawing.scheduler["prediction_type"] == "v_prediction"
    assert bundle.router.text_encoder == "text_encoder"
    assert drawing.text_encoders == ("text_encoder",)
    assert (drawing.family, drawing.denoiser) == ("stable-diffusion", "unet")
    tokenizer = bundle.tokenizers["text_encoder"]
    assert (tokenizer.context_length, tokenizer.pad_id) == (32, 0)
    assert manifest["router"]["score_digest"] == exported.job.router.spec["score_digest"]


def test_digests_and_sizes_are_those_of_the_files(exported):
    manifest = json.loads((exported.path / "bundle.json").read_text())
    records = {each["file"]: each for each in manifest["tokenizers"].values()}
    for part in manifest["components"].values():
        records |= part["files"]
        assert len(part["files"]) == 2  # graph and weights
    on_disk = {p.relative_to(exported.path).as_posix() for p in exported.path.rglob("*.*")}
    assert on_disk == {*records, "bundle.json"}
    for name, record in records.items():
        content = (exported.path / name).read_bytes()
        assert record["size"] == len(content)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()


def test_parity_with_torch_is_recorded_and_far_above_its_gate(exported):
    parity = {row.component.name: row.component.parity for row in exported.rows}
    assert parity["text_encoder"].metric == "cosine"
    assert parity["text_encoder"].value > 0.999999
    for name in ("predictor", "unet", "vae_decoder"):
        assert parity[name].metric == "psnr_db"
        assert parity[name].value > parity[name].gate + 30


def test_a_second_export_keeps_every_component(copied):
    before = open_bundle(copied.out)
    path, rows = export_bundle(copied, now=lambda: datetime(2030, 1, 1, tzinfo=UTC))
    assert all(row.kept for row in rows)
    after = open_bundle(path)
    assert after.components == before.components
    assert after.created_at == "2030-01-01T00:00:00+00:00"
    assert [each.name for each in path.parent.iterdir()] == ["bundle"]


def test_only_a_damaged_component_is_made_again(copied):
    weights = copied.out / "unet" / "model.onnx.data"
    weights.write_bytes(b"\0" + weights.read_bytes()[1:])
    path, rows = export_bundle(copied)
    assert [row.kept for row in rows] == [True, True, False, True]
    open_bundle(path)


def test_a_failing_gate_names_the_component_and_leaves_the_old_bundle(copied):
    before = open_bundle(copied.out)
    with pytest.raises(ExportError, match=r"unet differs from torch: psnr_db 1\d\d.* gate 1000"):
        export_bundle(replace(copied, gates={"unet": 1000.0}))
    assert open_bundle(copied.out) == before


def test_a_bundle_lost_between_the_two_renames_is_found_again(copied):
    copied.out.rename(copied.out.with_name("bundle.old"))
    path, rows = export_bundle(copied)
    assert all(row.kept for row in rows)
    open_bundle(path)


def test_a_router_of_another_width_is_refused(exported, tmp_path):
    router = open_router(tiny.make_router(tmp_path / "router", text_width=48))
    job = replace(exported.job, router=router, out=tmp_path / "bundle")
    with pytest.raises(ExportError, match=r"width 48.* gives 32; pass --text-encoder and --router"):
        export_bundle(job)
    assert not job.out.exists()


def test_a_router_of_another_text_encoder_is_refused(exported, tmp_path):
    router = open_router(tiny.make_router(tmp_path / "router", text_seed=9))
    job = replace(exported.job, router=router, out=tmp_path / "bundle")
    with pytest.raises(
        ExportError, match=r"trained on another text encoder than .*; pass --text-encoder"
    ):
        export_bundle(job)
    assert not job.out.exists()


def test_two_exports_do_not_write_into_one_folder(copied):
    writer = BundleWriter(copied.out)
    with pytest.raises(ExportError, match=r"another export is writing to '.*bundle\.partial'"):
        export_bundle(replace(copied, fresh=True))
    assert writer.partial.is_dir()
    writer.close()
    export_bundle(copied)


def test_what_a_killed_merge_left_goes(copied):
    left = copied.out.with_name("bundle.merged")
    (left / "unet").mkdir(parents=True)
    export_bundle(copied)
    assert not left.exists()


def without_weight(folder: Path, part: str) -> str:
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    # Not of an autoencoder's encoder, which no device needs.
    name = next(key for key in sorted(weights, reverse=True) if not key.startswith("encoder."))
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_weights_that_are_missing_are_not_made_up(copied, tmp_path, part):
    folder = tiny.make_pipeline(tmp_path / "broken", seed=7)
    name = without_weight(folder, part)
    before = open_bundle(copied.out)
    with pytest.raises(
        ExportError, match=rf"weights are missing in '.*{part}', 1 .* first {name};"
    ):
        export_bundle(replace(copied, pipeline=open_pipeline(str(folder))))
    assert open_bundle(copied.out) == before


BROKEN = {
    "text_encoder": "text_model.embeddings.position_embedding.weight",
    "unet": "conv_in.weight",
    "vae": "decoder.layers.0.weight",
}


def with_weight(folder: Path, part: str, value: float, *, rows: int | None = None) -> str:
    """Fill one weight of a part, which then has so many rows, and return its name."""
    (file,) = (folder / part).glob("*.safetensors")
    weights, name = load_file(file), BROKEN[part]
    shape = weights[name].shape
    weights[name] = torch.full((rows or shape[0], *shape[1:]), value)
    save_file(weights, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("part", BROKEN)
def test_weights_of_another_shape_are_one_sentence(copied, tmp_path, part):
    folder = tiny.make_pipeline(tmp_path / "broken")
    name = with_weight(folder, part, 0.0, rows=3)
    job = replace(copied, text_encoder=copied.pipeline.folder)
    with pytest.raises(
        ExportError, match=rf"in '.*{part}' do not fit its config\.json \({name} expected shape"
    ):
        export_bundle(replace(job, pipeline=open_pipeline(str(folder))))


@pytest.mark.parametrize("part", BROKEN)
def test_weights_that_are_no_numbers_are_not_blamed_on_the_export(copied, tmp_path, part):
    folder = tiny.make_pipeline(tmp_path / "broken")
    name = with_weight(folder, part, float("nan"))
    job = replace(copied, text_encoder=copied.pipeline.folder)
    with pytest.raises(ExportError, match=rf"in '.*{part}' are damaged: {name} holds NaN"):
        export_bundle(replace(job, pipeline=open_pipeline(str(folder))))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("could not create a primitive"), "memory ran out while the unet was"),
        (MemoryError(), "memory ran out while the unet was exported"),
        (RuntimeError("Fail: Failed to write weights to x"), "could not be written .* make room"),
    ],
)
def test_a_machine_that_is_too_small_is_not_blamed_on_the_model(error, told):
    with pytest.raises(ExportError, match=told), naming("unet"):
        raise error


def test_a_component_that_cannot_be_exported_is_named(copied, tmp_path):
    folder = tiny.make_pipeline(tmp_path / "broken")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    before = open_bundle(copied.out)
    with pytest.raises(ExportError, match=r"the unet could not be exported \("):
        export_bundle(replace(copied, pipeline=open_pipeline(str(folder))))
    assert open_bundle(copied.out) == before


def test_an_output_that_cannot_be_written_is_one_sentence(exported):
    with pytest.raises(ExportError, match="cannot write the bundle to '/dev/null/bundle'"):
        export_bundle(replace(exported.job, out=Path("/dev/null/bundle")))


def test_a_full_disk_is_one_sentence_and_leaves_the_old_bundle(copied):
    weights = copied.out / "unet" / "model.onnx.data"
    weights.write_bytes(b"\0" + weights.read_bytes()[1:])  # so that there is something to do
    before = {file: file.read_bytes() for file in copied.out.rglob("*") if file.is_file()}
    # A limit on file size is the full disk that needs no mount: the same write fails midway.
    limit = len(weights.read_bytes()) // 2
    program = (
        "import resource, runpy; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "runpy.run_module('export', run_name='__main__')"
    )
    done = subprocess.run(
        [
            sys.executable, "-c", program, "-o", str(copied.out), "--edge-model",
            str(copied.pipeline.folder), "--router", str(copied.router.folder),
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"cannot write the bundle to '{copied.out}'" in done.stderr
    assert {file: file.read_bytes() for file in before} == before


def test_pndm_becomes_a_solver_the_device_has(exported, tmp_path, copied):
    folder = tiny.make_pipeline(tmp_path / "pndm")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    settings = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
    settings |= {"beta_schedule": "scaled_linear", "skip_prk_steps": True, "steps_offset": 1}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    path, rows = export_bundle(replace(copied, pipeline=open_pipeline(str(folder))))
    assert all(row.kept for row in rows)  # the networks are the same
    scheduler = open_bundle(path).diffusion.scheduler
    assert scheduler["_class_name"] == "DPMSolverMultistepScheduler"
    assert (scheduler["beta_end"], scheduler["beta_schedule"]) == (0.012, "scaled_linear")


@pytest.mark.slow
def test_a_foreign_model_brings_its_own_text_encoder_and_a_kl_decoder(copied, tmp_path):
    folder = tiny.make_pipeline(tmp_path / "foreign", latent_channels=4, text_seed=9)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.25,
    ).save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "defaults.json").unlink()
    clip = tiny_open_clip(tmp_path / "clip")
    router = tiny.make_router(tmp_path / "router")
    spec = json.loads((router / "router.json").read_text())
    spec["text_probe"] = {"prompt": PROBES[1], "state": open_text(clip).state(PROBES[1])}
    (router / "router.json").write_text(json.dumps(spec))
    job = replace(copied, text_encoder=clip, router=open_router(router), out=tmp_path / "foreign-b")

    path, rows = export_bundle(replace(job, pipeline=open_pipeline(str(folder))))
    names = ["text_encoder", "text_encoder_diffusion", "predictor", "unet", "vae_decoder"]
    assert [row.component.name for row in rows] == names
    bundle = open_bundle(path)
    assert bundle.diffusion.text_encoders == ("text_encoder_diffusion",)
    assert bundle.router.text_encoder == "text_encoder"
    assert (bundle.diffusion.vae_scale, bundle.diffusion.scaling_factor) == (2, 0.25)
    assert (bundle.diffusion.width, bundle.diffusion.steps) == (16, 20)
    tokenizers = {name: each.file for name, each in bundle.tokenizers.items()}
    assert tokenizers == {
        "text_encoder": "tokenizer.json",
        "text_encoder_diffusion": "tokenizer_diffusion.json",
    }


def tiny_open_clip(folder: Path) -> Path:
    import open_clip
    from safetensors.torch import save_file

    vocabulary = len(tiny.make_tokenizer(folder))
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16
        },
        "text_cfg": {
            "context_length": 32, "vocab_size": vocabulary, "width": 32, "heads": 2, "layers": 2
        },
    }  # fmt: skip
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    described = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.slow
def test_a_killed_export_leaves_the_old_bundle_and_is_resumed(copied):
    weights = copied.out / "unet" / "model.onnx.data"
    weights.write_bytes(b"\0" + weights.read_bytes()[1:])  # so that there is something to do
    command = [
        sys.executable, "-m", "export", "-o", str(copied.out), "--edge-model",
        str(copied.pipeline.folder), "--router", str(copied.router.folder),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    partial = copied.out.with_name("bundle.partial")
    while not (partial / "unet.work").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    open_bundle(copied.out, verify=False)
    shutil.rmtree(copied.out)  # what is kept now is the killed export's own

    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{copied.out}\n"
    kept = [line.endswith("kept") for line in finished.stderr.splitlines()[1:]]
    assert kept == [True, True, False, False]
    open_bundle(copied.out)
