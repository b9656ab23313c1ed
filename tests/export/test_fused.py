"""UNets with attention as one node and GEGLU in halves say what diffusers' own say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from cloud_server.starter import starter_folder
from cloud_server.torchvision_guard import guard
from edge_agent.runtime.session import Session
from export.denoisers import UNet, denoiser
from export.fused import FusedAttention, SplitGeglu, fuse, write_standard
from export.lowering import lower
from export.network import Network
from export.optimise import optimise
from export.precision import FP16, FP32, INT4, INT8
from export.quiet import quiet

guard()
from diffusers import UNet2DConditionModel  # noqa: E402  after the guard

ATTENTIONS = 8  # in the starter's edge model: twice in each of its four transformer blocks


def load() -> UNet2DConditionModel:
    folder = starter_folder() / "edge" / "unet"
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def network() -> Network:
    model = load()
    return denoiser(UNet(model, model.config.cross_attention_dim), 16, 24, step=2)


@pytest.fixture(scope="module")
def traced(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("fused") / "traced.onnx"
    with quiet(), torch.inference_mode():
        network.trace(file)
    return file


def kinds(model: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(model, load_external_data=False).graph.node)


def run(model: Path, network: Network, sample: tuple[Tensor, ...]) -> np.ndarray:
    feeds = {name: x.numpy() for name, x in zip(network.inputs, sample, strict=True)}
    return Session(model).run(feeds)[0]


@torch.inference_mode()
def test_says_what_diffusers_says(network: Network) -> None:
    own = load()
    for sample in network.samples:
        torch.testing.assert_close(network.module(*sample), own(*sample).sample)


def test_attention_of_another_kind_stays() -> None:
    class Special:
        """A processor of somebody else's."""

    model, special = load(), Special()
    first = next(iter(model.attn_processors))
    model.set_attn_processor({**model.attn_processors, first: special})  # type: ignore[dict-item]
    fuse(model)
    assert model.attn_processors[first] is special
    others = [own for name, own in model.attn_processors.items() if name != first]
    assert others
    assert all(isinstance(own, FusedAttention) for own in others)


def test_halves_share_the_weights_of_the_whole() -> None:
    model = load()
    before = sum(p.numel() for p in model.parameters())
    fuse(model)
    assert any(isinstance(module, SplitGeglu) for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) == before


def test_every_attention_is_one_node(traced: Path) -> None:
    found = kinds(traced)
    assert found["MultiHeadAttention"] == ATTENTIONS
    assert found["Softmax"] == 1  # of the pooled caption, which is not diffusers' attention


def test_standard_operators_say_the_same(network: Network, traced: Path) -> None:
    standard = traced.with_name("other.onnx")
    write_standard(traced, standard)
    assert kinds(standard)["MultiHeadAttention"] == 0
    assert kinds(standard)["Softmax"] == 1 + ATTENTIONS
    for sample in network.samples:
        expected = run(traced, network, sample)
        np.testing.assert_allclose(run(standard, network, sample), expected, atol=2e-5)


def test_half_precision_is_in_standard_operators(traced: Path, tmp_path: Path) -> None:
    lower(traced, tmp_path / FP16 / "model.onnx", FP16)
    assert kinds(tmp_path / FP16 / "model.onnx")["MultiHeadAttention"] == 0
    assert not traced.with_name("standard.onnx").exists()


def test_a_processors_file_keeps_the_node(traced: Path, tmp_path: Path) -> None:
    optimise(traced, tmp_path / FP32 / "model.onnx")
    assert kinds(tmp_path / FP32 / "model.onnx")["MultiHeadAttention"] == ATTENTIONS


@pytest.mark.parametrize(
    ("precision", "quantised", "share"),
    [(INT8, "MatMulIntegerToFloat", 0.1), (INT4, "MatMulNBits", 0.3)],
)
def test_products_around_the_node_are_quantised(
    network: Network, traced: Path, tmp_path: Path, precision: str, quantised: str, share: float
) -> None:
    model = tmp_path / precision / "model.onnx"
    lower(traced, model, precision)
    assert kinds(model)["MultiHeadAttention"] == ATTENTIONS
    assert kinds(model)[quantised] > ATTENTIONS
    sample = network.samples[0]
    with torch.inference_mode():
        want = network.module(*sample).numpy()
    off = run(model, network, sample) - want
    assert 0 < np.sqrt((off**2).mean()) < share * want.std()
