"""Networks in lower precision: what is in the file, and that onnxruntime runs it as measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from cloud_server.training.predictor import PredictorConfig, build
from export import components
from export.loss import as_measured, outputs_psnr_db
from export.lowering import Unsuited, lower
from export.network import trace_by_running, trace_symbolically
from export.optimise import optimise
from export.parity import open_plainly
from export.precision import FP16, FP32, INT4, INT8
from export.quiet import quiet

WIDTH = 512


class Small(nn.Module):
    """Two products, a convolution, and a time that is embedded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8, bias=False)
        self.convolution = nn.Conv1d(3, 3, 5, padding=2)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Take (B, 3, `WIDTH`) and a scalar to (B, 3, 8) and (2, `WIDTH`)."""
        waves = time * torch.linspace(0.1, 1, WIDTH)
        embedded = torch.stack([waves.sin(), waves.cos()])
        x = self.first(self.convolution(x) + embedded[0])
        return self.second(nn.functional.gelu(x)), embedded


SAMPLES = [(torch.randn(batch, 3, WIDTH), torch.tensor(999.0 - batch)) for batch in (1, 4)]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("small") / "traced.onnx"
    with quiet():
        trace_by_running(
            Small().eval(), SAMPLES[1], file, ("x", "time"), ("y", "embedded"), {"x": {0: "batch"}}
        )
    optimise(file, file.with_name(FP32) / "model.onnx")
    return file


@pytest.fixture
def lowered(traced: Path, tmp_path: Path):
    def write(precision: str) -> Path:
        model = tmp_path / precision / "model.onnx"
        with quiet():
            lower(traced, model, precision)
        return model

    return write


def initializers(model: Path) -> dict[str, int]:
    proto = onnx.load(model, load_external_data=False)
    return {each.name: each.data_type for each in proto.graph.initializer}


def operators(model: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(model, load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("precision", "least_db", "share_of_size"),
    [(FP16, 60, 0.52), (INT8, 35, 0.28), (INT4, 20, 0.2)],
)
def test_a_lowered_model_is_smaller_and_near_the_one_in_full(
    traced, lowered, precision, least_db, share_of_size
):
    model, reference = lowered(precision), traced.with_name(FP32) / "model.onnx"
    loss_db = outputs_psnr_db(reference, model, precision, SAMPLES)
    assert least_db < loss_db < 110  # above, nothing would have been lowered
    assert sorted(file.name for file in model.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    weights = [file.with_name("model.onnx.data").stat().st_size for file in (model, reference)]
    assert weights[0] < share_of_size * weights[1]
    names = [{each.name: each.type for each in m.get_inputs() + m.get_outputs()} for m in
             (open_plainly(model), open_plainly(reference))]  # fmt: skip
    assert names[0] == names[1]


@pytest.mark.parametrize("precision", [FP16, INT8, INT4])
def test_no_file_on_the_way_holds_weights_beside_its_graph(
    lowered, tmp_path, monkeypatch, precision
):
    @contextmanager
    def kept(dir: Path) -> Iterator[str]:
        (dir / "workspace").mkdir()
        yield str(dir / "workspace")

    monkeypatch.setattr("export.lowering.TemporaryDirectory", kept)
    lowered(precision)
    graphs = list(tmp_path.rglob("*.onnx"))
    assert len(graphs) > 1
    # A graph of more than 2 GB cannot be written: in a small one it is weights that count.
    assert all(graph.stat().st_size < WIDTH * WIDTH // 8 for graph in graphs)
    assert len(list(tmp_path.rglob("*.data"))) >= len(graphs)


def test_an_integer_that_becomes_a_time_is_embedded_in_32_bits_too(tmp_path):
    class Counting(nn.Module):
        def forward(self, count: Tensor) -> Tensor:
            """Take (B,) whole numbers to waves."""
            return (count.to(torch.float32) * 0.37).sin()

    count, dims = torch.tensor([999, 3]), ({0: torch.export.Dim("batch", max=4)},)
    with quiet():
        file = tmp_path / "t.onnx"
        trace_symbolically(Counting().eval(), (count,), file, ("count",), ("wave",), dims)
        lower(file, tmp_path / "half" / "model.onnx", FP16)
    (got,) = open_plainly(tmp_path / "half" / "model.onnx").run(None, {"count": count.numpy()})
    np.testing.assert_allclose(got, Counting()(count), atol=1e-3)


def test_int8_quantises_products_and_nothing_else(lowered):
    found = operators(lowered(INT8))
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == 2
    assert found["ConvInteger"] == found["MatMul"] == found["Gemm"] == 0


def test_int8_spares_what_all_that_follows_is_made_of(tmp_path):
    traced, finished = tmp_path / "traced.onnx", tmp_path / "int8" / "model.onnx"
    layers = [layer for _ in range(30) for layer in (nn.Linear(64, 64), nn.Tanh())]
    with quiet():
        trace_by_running(nn.Sequential(*layers), (torch.randn(2, 64),), traced, ("x",), ("y",), {})
        lower(traced, finished, INT8)
    found = [
        node.op_type
        for node in onnx.load(finished, load_external_data=False).graph.node
        if "MatMul" in node.op_type or node.op_type == "Gemm"
    ]
    assert [name for name in found[:4] if name in ("MatMul", "Gemm")] == found[:4]
    assert not {"MatMul", "Gemm"} & set(found[4:])
    assert len(found) == 30


def test_int8_runs_where_matrices_are_stacked(tmp_path):
    config = PredictorConfig(width=64, experts=3, kind="mixed", members=3)
    traced, finished = tmp_path / "traced.onnx", tmp_path / "int8" / "model.onnx"
    torch.manual_seed(0)
    model = build(config).eval()
    with quiet():
        components.predictor(model, 16).trace(traced)
    lower(traced, finished, INT8)
    hidden, mask = torch.randn(1, 9, 64), torch.ones(1, 9)
    (d,) = open_plainly(finished).run(None, {"hidden": hidden.numpy(), "mask": mask.numpy()})
    np.testing.assert_allclose(d, model(hidden, mask).detach().numpy(), atol=0.01)
    assert "MatMul" in operators(finished)


def test_int8_leaves_processors_without_vnni_room(lowered):
    model = onnx.load(lowered(INT8))
    weights = [
        onnx.numpy_helper.to_array(each)
        for each in model.graph.initializer
        if each.data_type == TensorProto.INT8 and len(each.dims) == 2
    ]
    assert len(weights) == 2
    assert max(int(np.abs(each.astype(int)).max()) for each in weights) <= 64
    scales = [each for each in model.graph.initializer if list(each.dims) == [WIDTH]]
    assert scales  # one for each column


def test_int4_quantises_products_and_nothing_else(lowered):
    found = operators(lowered(INT4))
    assert (found["MatMulNBits"], found["MatMul"], found["Gemm"]) == (2, 0, 0)


def test_fp16_is_of_standard_operators_for_any_gpu(lowered):
    model = lowered(FP16)
    onnx.checker.check_model(str(model), full_check=True)
    assert {node.domain for node in onnx.load(model, load_external_data=False).graph.node} == {""}
    names, outputs = [], []
    for node in onnx.load(model, load_external_data=False).graph.node:
        names.append(node.name)
        outputs += node.output
    assert len(set(outputs)) == len(outputs)
    assert len(set(names)) == len(names)


def test_fp16_embeds_time_in_32_bits(traced, lowered):
    feeds = {"x": SAMPLES[0][0].numpy(), "time": SAMPLES[0][1].numpy()}
    _, want = open_plainly(traced.with_name(FP32) / "model.onnx").run(None, feeds)
    _, got = open_plainly(lowered(FP16)).run(None, feeds)
    assert np.abs(want - got).max() < 1e-3  # at 999, half precision is a quarter of a radian off


def test_fp16_shares_a_cast_among_those_who_need_the_same(tmp_path):
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            resized = nn.functional.interpolate(x, scale_factor=2.0)
            return nn.functional.interpolate(resized * 1.5, scale_factor=2.0)

    with quiet():
        dims = ({0: torch.export.Dim("batch", max=4)},)
        x = torch.randn(2, 3, 4, 4)
        trace_symbolically(Twice().eval(), (x,), tmp_path / "t.onnx", ("x",), ("y",), dims)
        lower(tmp_path / "t.onnx", tmp_path / "half" / "model.onnx", FP16)
    (got,) = open_plainly(tmp_path / "half" / "model.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, Twice()(x), rtol=2e-3)


@pytest.mark.parametrize("precision", [INT8, INT4])
def test_what_has_no_products_is_not_quantised(tmp_path, precision):
    dims = ({0: torch.export.Dim("batch", max=4)},)
    with quiet():
        trace_symbolically(
            nn.Conv1d(3, 3, 5).eval(),
            (torch.randn(2, 3, 9),),
            tmp_path / "t.onnx",
            ("x",),
            ("y",),
            dims,
        )
        with pytest.raises(Unsuited, match="no matrix products with fixed weights"):
            lower(tmp_path / "t.onnx", tmp_path / "low" / "model.onnx", precision)


class Overflowing(nn.Module):
    """300 squared is more than half precision holds."""

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, n) to itself, through its square."""
        return (x * x).sqrt() * torch.tensor([1.5])


def test_overflow_in_half_precision_is_found_on_a_processor(tmp_path):
    dims = ({0: torch.export.Dim("batch", max=4)},)
    samples = [(torch.full((2, 3), 300.0),)]
    with quiet():
        trace_symbolically(
            Overflowing().eval(), samples[0], tmp_path / "t.onnx", ("x",), ("y",), dims
        )
        optimise(tmp_path / "t.onnx", tmp_path / "full" / "model.onnx")
        lower(tmp_path / "t.onnx", tmp_path / "half" / "model.onnx", FP16)
    half = tmp_path / "half" / "model.onnx"
    feeds = {"x": samples[0][0].numpy()}
    (widened,) = open_plainly(half).run(None, feeds)
    assert np.isfinite(widened).all()  # as onnxruntime runs it here, nothing is wrong
    with pytest.raises(Unsuited, match="no longer finite"):
        outputs_psnr_db(tmp_path / "full" / "model.onnx", half, FP16, samples)
    (tmp_path / "measured").mkdir()
    (rounded,) = open_plainly(as_measured(half, FP16, tmp_path / "measured")).run(None, feeds)
    assert np.isinf(rounded).all()
