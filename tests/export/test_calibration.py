"""w8a8: products of what is drawn in 8 bits, by ranges that the device's own drawing shows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from edge_agent.agent import EdgeAgent
from edge_agent.bundle import Bundle, open_bundle
from edge_agent.runtime import openvino
from edge_agent.types import Provider, Request, Route
from export import calibration, loss
from export.build import Job, Stage, export_bundle
from export.calibration import CHECKED_PICTURES, LEAST_PICTURES, quantise, record
from export.errors import ExportError
from export.lowering import Unsuited
from export.network import trace_by_running
from export.optimise import BASIC, optimise
from export.parity import open_plainly
from export.precision import FP32, INT8, W8A8, Precisions
from export.quiet import quiet
from tests.export.conftest import Exported, interrupt_at

PROMPTS = ["a cat", "two red apples on the beach", "a dog above the grass"]


class Drawing(nn.Module):
    """Convolutions and a projection of pictures; a projection of a time is added to each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.mixed, self.told = nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, picture: Tensor, time: Tensor) -> Tensor:
        """Take (B, 8, h, w) and (4,) to (B, 8, h, w)."""
        told = self.told(time.expand(picture.shape[0], -1))  # as diffusers repeats timesteps
        x = self.inner(self.first(picture)) + told[:, :, None, None]
        x = self.mixed(x.transpose(1, 3)).transpose(1, 3)
        return self.last(x)


class Block(nn.Module):
    """A block as in UNets: a norm and a convolution, and a shortcut of what the norm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norm, self.shortcut = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)

    def forward(self, picture: Tensor) -> Tensor:
        """Take (B, 8, h, w) to the same."""
        x = self.first(picture)
        x = self.shortcut(x) + self.inner(functional.silu(self.norm(x)))
        return self.last(functional.silu(x))


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Conv2d(8, 8, 3)

    def forward(self, picture: Tensor) -> Tensor:
        """Take (B, 8, h, w) to one that is smaller."""
        return self.only(picture)


def calls(count: int, spread: float = 1.0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {"picture": spread * rng.standard_normal((1, 8, 6, 6), np.float32),
         "time": rng.standard_normal(4, np.float32)}
        for _ in range(count)
    ]  # fmt: skip


def unfused(module: nn.Module, folder: Path, *names: str) -> Path:
    example = tuple(torch.from_numpy(calls(1)[0][name]) for name in names)
    with quiet():
        axes = {"picture": {0: "batch"}}
        trace_by_running(module.eval(), example, folder / "traced.onnx", names, ("y",), axes)
    optimise(folder / "traced.onnx", folder / "unfused.onnx", BASIC)
    return folder / "unfused.onnx"


def test_products_of_the_picture_are_quantised_but_the_first_and_the_last(tmp_path):
    model, finished = unfused(Drawing(), tmp_path, "picture", "time"), tmp_path / W8A8 / "m.onnx"
    seen = calls(8)
    with quiet():
        quantise(model, finished, seen)
    graph = onnx.load(finished).graph
    makers = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    in_8_bits = [
        [makers[name].op_type == "DequantizeLinear" if name in makers else False
         for name in node.input[:2]]
        for node in products
    ]  # fmt: skip
    assert sorted(in_8_bits) == [[False, False]] * 3 + [[True, True]] * 2
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    (conv,) = [node for node in products if node.op_type == "Conv" and node.input[0] in makers
               and makers[node.input[0]].op_type == "DequantizeLinear"]  # fmt: skip
    assert constants[makers[conv.input[0]].input[2]] == 0  # whose weights OpenVINO packs fast
    integers = [numpy_helper.to_array(w) for w in graph.initializer if w.data_type == 3]
    largest = [int(np.abs(each).max()) for each in integers if each.ndim > 1]
    assert len(largest) == 2
    assert all(32 < most <= 64 for most in largest)

    full, low = open_plainly(model), open_plainly(finished)
    wanted = np.stack([full.run(None, feeds)[0] for feeds in seen])
    error = wanted - np.stack([low.run(None, feeds)[0] for feeds in seen])
    assert 1e-4 < error.std() / wanted.std() < 0.03
    # Ranges are those of what was seen: what is five times as large is cut off.
    beyond = [{**feeds, "picture": 5 * feeds["picture"]} for feeds in seen]
    wanted = np.stack([full.run(None, feeds)[0] for feeds in beyond])
    error = wanted - np.stack([low.run(None, feeds)[0] for feeds in beyond])
    assert error.std() / wanted.std() > 0.3


def test_what_norms_read_too_is_not_rounded(tmp_path):
    model, finished = unfused(Block(), tmp_path, "picture"), tmp_path / W8A8 / "m.onnx"
    with quiet():
        quantise(model, finished, [{"picture": each["picture"]} for each in calls(8)])
    graph = onnx.load(finished).graph
    rounded = [node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert sum(n.op_type == "Conv" and n.input[0] in rounded for n in graph.node) == 1
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 1


def test_a_loss_is_seen_in_the_engine_that_draws(tmp_path, monkeypatch):
    model, finished = unfused(Block(), tmp_path, "picture"), tmp_path / W8A8 / "m.onnx"
    seen = [{"picture": each["picture"]} for each in calls(8)]
    with quiet():
        quantise(model, finished, seen)
    samples = [(torch.from_numpy(each["picture"]),) for each in seen]

    class Wrong:
        """An OpenVINO that adds something up wrongly."""

        def __init__(self, path: Path, **_: object) -> None:
            self._right = open_plainly(path)

        def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [0.5 * each for each in self._right.run(None, feeds)]

    right = loss.outputs_psnr_db(model, finished, W8A8, samples)
    monkeypatch.setattr(openvino, "version", lambda: "some")
    monkeypatch.setattr(loss, "OpenVinoSession", Wrong)
    wrong = loss.outputs_psnr_db(model, finished, W8A8, samples)
    assert wrong < 20 < 30 < right < 90


def test_what_has_no_products_in_between_is_unsuited(tmp_path):
    model = unfused(Single(), tmp_path, "picture")
    with pytest.raises(Unsuited, match="no convolutions or matrix products but"):
        quantise(model, tmp_path / W8A8 / "m.onnx", calls(1))
    assert not (tmp_path / W8A8).exists()


def test_what_the_device_feeds_is_recorded_by_picture(exported):
    bundle = open_bundle(exported.path)
    bundle = replace(bundle, diffusion=replace(bundle.diffusion, steps=20))
    found = record(bundle, ["unet", "vae_decoder"], PROMPTS)
    unet, decoder = found["unet"], found["vae_decoder"]
    steps = calibration.MOST_STEPS
    assert (len(unet.calibration), len(unet.checks)) == (
        LEAST_PICTURES * steps, CHECKED_PICTURES * steps
    )  # fmt: skip
    assert (len(decoder.calibration), len(decoder.checks)) == (LEAST_PICTURES, CHECKED_PICTURES)
    assert set(unet.calibration[0]) == set(bundle.component("unet").inputs)
    every = [each for feeds in (*unet.calibration, *unet.checks) for each in feeds.values()]
    assert {each.dtype for each in every} == {np.dtype(np.float32)}
    samples = [feeds["latent_sample"] for feeds in (*decoder.calibration, *decoder.checks)]
    assert len({sample.tobytes() for sample in samples}) == len(samples)
    again = record(bundle, ["unet"], PROMPTS)["unet"]
    for one, other in zip(unet.calibration, again.calibration, strict=True):
        assert all((one[name] == other[name]).all() for name in one)


def job_in(exported: Exported, out: Path, **changes: object) -> Job:
    precision = Precisions(W8A8, {"text_encoder": INT8})
    measured = {"prompts": PROMPTS, "pictures": 2, "accept_loss": True, "precision": precision}
    return replace(exported.job, out=out, **{**measured, **changes})


@pytest.fixture(scope="session")
def quantised(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Bundle]:
    """A bundle in w8a8 and int8, of an export that was stopped before calibration and went on."""
    job = job_in(exported, tmp_path_factory.mktemp("w8a8") / "bundle")
    with pytest.raises(KeyboardInterrupt):
        export_bundle(job, interrupt_at("unet, vae_decoder"))
    stages: list[Stage] = []
    path, _ = export_bundle(job, stages.append)
    assert [f"{stage.name} {stage.component}" for stage in stages] == [
        "draw unet, vae_decoder", "calibrate unet", "calibrate vae_decoder",
        "measure text_encoder", "measure unet", "measure vae_decoder",
        "measure text_encoder, unet, vae_decoder",
    ]  # fmt: skip
    assert [stage.index for stage in stages] == list(range(12, 19))
    assert {stage.total for stage in stages} == {19}
    return job, open_bundle(path)


def picture(bundle: Bundle, provider: Provider) -> np.ndarray:
    with EdgeAgent(bundle, offline=True, provider=provider) as agent:
        request = Request(PROMPTS[0], seed=5, route=Route.EDGE)
        return np.float64(agent.generate(request).picture.image)


def test_a_bare_w8a8_is_for_what_draws_and_leaves_what_decides():
    names = ["text_encoder", "predictor", "unet", "vae_decoder"]
    assert list(Precisions(W8A8).of(names, "unet").values()) == [FP32, FP32, W8A8, W8A8]
    of_its_own = [*names, "text_encoder_diffusion"]
    assert list(Precisions(W8A8).of(of_its_own, "unet").values())[-1] == INT8
    named = Precisions.parse("w8a8,text_encoder_diffusion=fp32").of(of_its_own, "unet")
    assert named == dict.fromkeys(of_its_own, FP32) | {"unet": W8A8, "vae_decoder": W8A8}


def test_what_draws_is_smaller_and_its_loss_told(exported, quantised):
    bundle = quantised[1]
    parts = bundle.components
    assert [part.precision for part in parts.values()] == [INT8, FP32, W8A8, W8A8]
    assert {file.name for file in bundle.path.iterdir()} == {
        *parts,
        "bundle.json",
        "tokenizer.json",
    }
    full = open_bundle(exported.path).components
    for name in ("unet", "vae_decoder"):
        assert not parts[name].optimized
        assert 10 < parts[name].loss.psnr_db < 90
        assert 10 < parts[name].loss.picture_psnr_db < 90
        weights = f"{name}/model.onnx.data"
        assert parts[name].files[weights].size < 0.7 * full[name].files[weights].size
    assert bundle.loss.flips is not None
    assert bundle.loss.picture_psnr_db > 10


@pytest.mark.parametrize(
    "provider",
    [
        Provider.CPU,
        pytest.param(
            Provider.OPENVINO,
            marks=pytest.mark.skipif(openvino.version() is None, reason="OpenVINO is missing"),
        ),
    ],
)
def test_the_device_draws_what_it_draws_in_32_bits(exported, quantised, provider):
    full = picture(open_bundle(exported.path), Provider.CPU)
    low = picture(quantised[1], provider)
    assert 0 < np.sqrt(np.mean((full - low) ** 2)) < 25


def test_what_was_calibrated_is_kept(quantised):
    job, bundle = quantised
    _, rows = export_bundle(job)
    assert all(row.kept for row in rows)
    assert open_bundle(job.out).components == bundle.components


@pytest.mark.slow
def test_with_other_prompts_it_is_calibrated_anew(quantised, tmp_path):
    job, bundle = quantised
    shutil.copytree(job.out, tmp_path / "bundle")
    job = replace(job, out=tmp_path / "bundle")
    _, rows = export_bundle(replace(job, prompts=PROMPTS[:2]))  # others to calibrate on
    assert {row.component.name: row.kept for row in rows} == {
        "text_encoder": False, "predictor": True, "unet": False, "vae_decoder": False,
    }  # fmt: skip
    sources = [open_bundle(job.out).component("unet").source, bundle.component("unet").source]
    assert sources[0] != sources[1]


def test_what_loses_too_much_is_refused(quantised, monkeypatch):
    job, _ = quantised
    before = open_bundle(job.out)
    monkeypatch.setitem(loss.GATES, W8A8, loss.Gate(300.0, 0.0, 1.0))
    with pytest.raises(ExportError, match=r"w8a8 costs the unet too much: outputs \d+\.\d dB"):
        export_bundle(replace(job, accept_loss=False))
    assert open_bundle(job.out) == before


@pytest.mark.parametrize("name", ["text_encoder", "predictor"])
def test_what_does_not_draw_cannot_be_calibrated(exported, tmp_path, name):
    job = job_in(exported, tmp_path / "bundle", precision=Precisions(FP32, {name: W8A8}))
    with pytest.raises(ExportError, match=f"the {name} cannot be written in w8a8: its ranges"):
        export_bundle(job)
    assert list(tmp_path.iterdir()) == []
