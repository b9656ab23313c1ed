"""What is optimised here is computed alike by every engine of the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import openvino
from onnx import TensorProto, helper, numpy_helper

from export.optimise import optimise


def test_a_layer_that_ends_in_a_sigmoid_is_read_alike_by_onnxruntime_and_openvino(
    tmp_path: Path,
) -> None:
    """As the routing network ends; its fused form came out of OpenVINO as zeros."""
    weight = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "weight", "bias"], ["logit"]),
            helper.make_node("Sigmoid", ["logit"], ["d"]),
        ],
        "head",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("d", TensorProto.FLOAT, [2, 3])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.full(3, -9, np.float32), "bias"),
        ],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "traced")
    file = tmp_path / "optimised.onnx"
    optimise(tmp_path / "traced", file)
    feeds = {"x": np.ones((2, 8), np.float32)}
    (ours,) = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, feeds)
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    theirs = openvino.Core().compile_model(file, "CPU", precise)(feeds)[0]
    assert (ours > 0).all()
    np.testing.assert_allclose(theirs, ours, rtol=1e-2)
