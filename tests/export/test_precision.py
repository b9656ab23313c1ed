"""Bundles in lower precision: what they lost is in them, and no more goes unasked."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_agent.agent import EdgeAgent
from edge_agent.bundle import Bundle, open_bundle
from edge_agent.cli import run
from edge_agent.errors import BundleError
from edge_agent.types import Provider, Request, Route
from export import loss
from export.build import Job, Row, Stage, export_bundle
from export.cli import main
from export.errors import ExportError
from export.precision import FP16, FP32, INT4, INT8, PRECISIONS, W8A8, Precisions
from tests.export.conftest import Exported

PROMPTS = ["a cat", "two red apples on the beach", "a dog above the grass", "dog", "cat and dog"]
PICTURES = 2


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("int8", Precisions(INT8)),
        ("unet=int8,denoiser=fp16", Precisions(FP32, {"unet": INT8, "denoiser": FP16})),
        ("int4, vae_decoder=fp32", Precisions(INT4, {"vae_decoder": FP32})),
    ],
)  # fmt: skip
def test_a_precision_is_for_all_that_bears_it_or_by_component(text, read):
    assert Precisions.parse(text) == read


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("int9", "'int9' is none of fp32, fp16, w8a8, int8, int4"),
        ("unet=", "'' is none of fp32"),
        ("int8,fp16", "'int8,fp16' names the usual precision twice"),
        ("unet=int8,unet=fp16", "'unet=int8,unet=fp16' names unet twice"),
    ],
)
def test_what_is_no_precision_is_a_usage_error(text, sentence):
    result = CliRunner().invoke(main, ["--precision", text])
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr


def test_the_usual_precision_is_for_text_and_denoiser_and_names_go_above_it():
    names = ["text_encoder", "text_encoder_diffusion_2", "predictor", "transformer", "vae_decoder"]
    found = Precisions(INT8, {"denoiser": INT4, "vae_decoder": FP16}).of(names, "transformer")
    assert list(found.values()) == [INT8, INT8, FP32, INT4, FP16]


def test_a_component_that_will_not_be_there_is_named(copied):
    job = replace(copied, precision=Precisions(FP32, {"transformer": INT8}), out=copied.out / "new")
    with pytest.raises(ExportError, match=r"'transformer', .*components are text_encoder, pred"):
        export_bundle(job)
    assert not job.out.with_name("new.partial").exists()


def job_in(exported: Exported, out: Path, precision: Precisions, **changes: object) -> Job:
    measured = {"prompts": PROMPTS, "pictures": PICTURES, "accept_loss": True}
    return replace(exported.job, out=out, precision=precision, **{**measured, **changes})


@pytest.fixture(scope="session")
def lowered(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[Row]]:
    """A bundle of an int8 text encoder and an int4 denoiser."""
    out = tmp_path_factory.mktemp("lowered") / "bundle"
    job = job_in(exported, out, Precisions(INT8, {"unet": INT4}))
    _, rows = export_bundle(job)
    return job, rows


@pytest.fixture
def again(lowered: tuple[Job, list[Row]], tmp_path: Path) -> Job:
    """The same job, its bundle there already, for tests that change it."""
    shutil.copytree(lowered[0].out, tmp_path / "bundle")
    return replace(lowered[0], out=tmp_path / "bundle")


def pictures(bundle: Bundle) -> np.ndarray:
    with EdgeAgent(bundle, offline=True, provider=Provider.CPU) as agent:
        requests = [Request(PROMPTS[i], seed=i, route=Route.EDGE) for i in range(PICTURES)]
        return np.stack([np.float64(agent.generate(each).picture.image) for each in requests])


def decisions(bundle: Bundle) -> list[Route]:
    with EdgeAgent(bundle, offline=True, provider=Provider.CPU) as agent:
        return [agent.route(each).route for each in PROMPTS]


def mixed(one: Bundle, other: Bundle, *names: str) -> Bundle:
    """Return `one` with some components of `other`."""
    foreign = {
        name: replace(other.components[name], file=str(other.path_of(name))) for name in names
    }
    return replace(one, components={**one.components, **foreign})


def test_what_was_lost_is_what_the_device_shows(exported, lowered):
    full, low = open_bundle(exported.path), open_bundle(lowered[0].out)
    for names, told in (
        (("text_encoder",), low.components["text_encoder"].loss),
        (("unet",), low.components["unet"].loss),
        (("text_encoder", "unet"), low.loss),
    ):
        error = np.mean((pictures(full) - pictures(mixed(full, low, *names))) ** 2)
        assert told.picture_psnr_db == pytest.approx(10 * math.log10(255**2 / error))
        if "text_encoder" in names:
            pairs = zip(decisions(full), decisions(mixed(full, low, *names)), strict=True)
            assert told.flips == np.mean([a != b for a, b in pairs])
        else:
            assert told.flips is None
    assert [full.loss, low.components["predictor"].loss, low.components["vae_decoder"].loss] == [
        None, None, None
    ]  # fmt: skip


def test_the_manifest_tells_precision_size_and_loss(exported, lowered):
    manifest = json.loads((lowered[0].out / "bundle.json").read_text())
    parts, full = manifest["components"], open_bundle(exported.path).components
    assert [part["precision"] for part in parts.values()] == [INT8, FP32, INT4, FP32]
    assert 25 < parts["text_encoder"]["loss"]["psnr_db"] < 60
    assert 10 < parts["unet"]["loss"]["psnr_db"] < 50
    assert (manifest["loss"]["prompts"], manifest["loss"]["pictures"]) == (len(PROMPTS), PICTURES)
    for name, part in parts.items():
        assert part["parity"]["value"] > part["parity"]["gate"]
        data = part["files"][f"{name}/model.onnx.data"]["size"]
        whole = full[name].files[f"{name}/model.onnx.data"].size
        assert (data < 0.75 * whole) if "loss" in part else (data == whole)
    on_disk = {p.name for p in lowered[0].out.iterdir()}
    assert on_disk == {*parts, "bundle.json", "tokenizer.json"}


def test_weights_that_were_changed_are_refused(again):
    weights = again.out / "unet" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"unet/model\.onnx\.data is not what was exported"):
        open_bundle(again.out)


def test_the_device_draws_and_doctor_tells_the_loss(lowered, tmp_path, capsys):
    bundle = str(lowered[0].out)
    told = ["generate", "a cat", "--bundle", bundle, "--offline", "-o", str(tmp_path / "cat.png")]
    assert run(told, {}) == 0
    capsys.readouterr()
    assert run(["doctor", "--bundle", bundle, "--offline"], {}) == 0
    report = capsys.readouterr().out
    opened = open_bundle(lowered[0].out)
    for part in opened.components.values():
        assert (f"{part.precision} costs {part.loss}" in report) is (part.precision != FP32)
    assert f"together lower precision costs {opened.loss}" in report
    assert run(["doctor", "--bundle", bundle, "--offline", "--json"], {}) == 0
    found = json.loads(capsys.readouterr().out)["bundle"]
    assert found["components"][2]["loss"]["psnr_db"] == opened.components["unet"].loss.psnr_db


def stages_of(job: Job) -> tuple[list[Row], list[str]]:
    stages: list[Stage] = []
    _, rows = export_bundle(job, stages.append)
    assert all(stage.index < stage.total for stage in stages)
    return rows, [f"{stage.name} {stage.component}" for stage in stages]


def test_losses_are_kept_as_long_as_all_they_depend_on(again):
    before = open_bundle(again.out)
    rows, stages = stages_of(again)
    assert all(row.kept for row in rows)
    assert stages == []
    after = open_bundle(again.out)
    assert (after.loss, after.components) == (before.loss, before.components)

    rows, stages = stages_of(replace(again, prompts=PROMPTS[:2]))
    assert [row.kept for row in rows] == [False, True, False, True]  # made again, to compare with
    measured = [stage for stage in stages if stage.startswith("measure")]
    assert measured == ["measure text_encoder", "measure unet", "measure text_encoder, unet"]
    assert json.loads((again.out / "bundle.json").read_text())["loss"]["prompts"] == 2


def test_too_much_loss_stops_the_export_until_it_is_accepted(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(loss.GATES, INT8, loss.Gate(10.0, 300.0, 1.0))
    job = job_in(exported, tmp_path / "bundle", Precisions(FP32, {"text_encoder": INT8}))
    with pytest.raises(ExportError, match=r"int8 costs the text_encoder too much: pictures .* dB "):
        export_bundle(replace(job, accept_loss=False))
    assert not job.out.exists()
    path, rows = export_bundle(job)
    assert all(row.kept for row in rows)  # goes on where it stopped
    bundle = open_bundle(path)
    assert bundle.components["text_encoder"].loss.accepted
    assert "(accepted)" in str(bundle.components["text_encoder"].loss)
    with pytest.raises(ExportError, match="or --accept-loss"):  # not accepted for good
        export_bundle(replace(job, accept_loss=False))
    assert open_bundle(path) == bundle


@pytest.mark.parametrize(
    ("gate", "what"),
    [
        (loss.Gate(300.0, 0.0, 1.0), r"outputs \d+\.\d dB \(at least 300\)"),
        (loss.Gate(0.0, 0.0, -1.0), r"\d+\.\d% of decisions \(at most -100%\)"),
    ],
)
def test_each_kind_of_loss_has_a_gate(lowered, monkeypatch, gate, what):
    monkeypatch.setitem(loss.GATES, INT8, gate)
    row = lowered[1][0]
    with pytest.raises(ExportError, match=f"int8 costs the text_encoder too much: {what}; no"):
        loss.judge("text_encoder", INT8, row.component.loss, accept=False)


def test_what_a_precision_does_not_suit_is_named(copied):
    before = open_bundle(copied.out)
    job = replace(copied, precision=Precisions(FP32, {"vae_decoder": INT8}))
    with pytest.raises(ExportError, match=r"vae_decoder cannot be written in int8: it has"):
        export_bundle(job)
    assert open_bundle(copied.out) == before


def test_half_precision_is_refused_where_nothing_computes_in_it(exported, tmp_path, capsys):
    job = job_in(exported, tmp_path / "bundle", Precisions(FP16), accept_loss=False)
    path, _ = export_bundle(job)
    bundle = open_bundle(path)
    assert [part.precision for part in bundle.components.values()] == [FP16, FP32, FP16, FP32]
    assert bundle.components["unet"].loss.psnr_db > 50
    assert bundle.loss.picture_psnr_db > 40
    assert not bundle.components["unet"].optimized  # by whoever has the GPU
    for command in (["generate", "--offline"], ["route"]):
        assert run([*command, "a cat", "--bundle", str(path), "--provider", "cpu"], {}) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "the text_encoder of this bundle is in fp16, which is for GPUs" in err
    assert run(["doctor", "--bundle", str(path), "--offline", "--provider", "cpu"], {}) == 1
    assert "export with --precision fp32 or int8" in capsys.readouterr().out


@pytest.mark.slow
def test_sensitivity_tries_every_component_at_every_precision(exported, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    made_from = [
        "--edge-model",
        exported.job.pipeline.folder,
        "--router",
        exported.job.router.folder,
    ]
    told = [*made_from, "-o", tmp_path / "bundle", "--pictures", 1]
    measured = [*told, "--prompts", tmp_path / "prompts.txt", "--sensitivity"]
    result = CliRunner().invoke(main, [str(each) for each in measured])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'bundle'}\n"
    table = result.stderr.splitlines()[-20:]
    names = ["text_encoder", "predictor", "unet", "vae_decoder"]
    pairs = [(name, precision) for name in names for precision in PRECISIONS]
    assert [tuple(line.split()[:2]) for line in table] == pairs

    report = json.loads((tmp_path / "bundle" / "sensitivity.json").read_text())
    assert (report["prompts"], report["pictures"]) == (len(PROMPTS), 1)
    found = {(each["component"], each["precision"]): each for each in report["trials"]}
    assert list(found) == pairs
    for name in ("text_encoder", "unet"):
        sizes = [found[name, precision]["size_bytes"] for precision in (FP32, FP16)]
        assert sizes[1] < 0.75 * sizes[0]
        db = [found[name, each]["loss"]["psnr_db"] for each in (FP16, INT8, INT4)]
        assert db == sorted(db, reverse=True)
        assert found[name, INT8]["milliseconds"] > 0
        assert found[name, FP16]["milliseconds"] is None
    assert found["vae_decoder", INT4]["note"].startswith("it has no matrix products")
    for name in ("unet", "vae_decoder"):
        assert found[name, W8A8]["loss"]["picture_psnr_db"] > 10
        assert found[name, W8A8]["milliseconds"] is None  # it is not for onnxruntime
    assert found["text_encoder", W8A8]["note"] == "its ranges are not those of pictures"
    bundle = open_bundle(tmp_path / "bundle")
    assert {part.precision for part in bundle.components.values()} == {FP32}
    assert bundle.loss is None

    assert CliRunner().invoke(main, [str(each) for each in told]).exit_code == 0
    assert not (tmp_path / "bundle" / "sensitivity.json").exists()  # it spoke of another bundle


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot read the prompts in"), ("", "holds no prompt"), ("a\n\x07b\n", "U+0007")],
)
def test_prompts_that_cannot_be_used_are_named(exported, tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "prompts.txt").write_text(content)
    made_from = [
        "--edge-model",
        exported.job.pipeline.folder,
        "--router",
        exported.job.router.folder,
    ]
    told = [*made_from, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "bundle"]
    result = CliRunner().invoke(main, [str(each) for each in told])
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert not (tmp_path / "bundle.partial").exists()
