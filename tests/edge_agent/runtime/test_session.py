"""Networks run, stop in the middle when told to, and fail in words."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.errors import BundleError, Cancelled, GenerationError
from edge_agent.runtime.session import Session
from edge_agent.types import Cancellation


def endless(file: Path) -> Path:
    """Write a network that multiplies a matrix for hours."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["before", "weight"], ["after"]),
            helper.make_node("Identity", ["go"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [64, 64]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [64, 64]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["count", "yes", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 64])],
        [
            numpy_helper.from_array(np.array(10**9, np.int64), "count"),
            numpy_helper.from_array(np.array(True), "yes"),
            numpy_helper.from_array(np.eye(64, dtype=np.float32), "weight"),
        ],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(file))
    return file


def test_reads_types_and_ranks_of_its_inputs(tiny_bundle: Path) -> None:
    session = Session(tiny_bundle / "unet" / "model.onnx", threads=1)
    assert session.inputs["timestep"] == np.int64
    assert session.providers == ["CPUExecutionProvider"]


def test_cancelling_stops_a_network_in_the_middle_of_its_run(tmp_path: Path) -> None:
    session = Session(endless(tmp_path / "endless.onnx"), threads=1)
    cancellation = Cancellation()
    timer = threading.Timer(0.2, cancellation.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        session.run({"x": np.eye(64, dtype=np.float32)}, cancellation)
    timer.join()


def test_does_not_begin_once_cancelled(tmp_path: Path) -> None:
    session = Session(endless(tmp_path / "endless.onnx"), threads=1)
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        session.run({"x": np.eye(64, dtype=np.float32)}, cancellation)


def test_a_file_that_is_no_network_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"not a network")
    with pytest.raises(BundleError, match=r"cannot load .*model\.onnx.*python -m export"):
        Session(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"gone\.onnx"):
        Session(tmp_path / "gone.onnx", optimized=True)


def test_a_wrong_shape_is_one_sentence(tiny_bundle: Path) -> None:
    session = Session(tiny_bundle / "vae_decoder" / "model.onnx", threads=1)
    with pytest.raises(GenerationError, match=r"failed in .*vae_decoder") as caught:
        session.run({"latent_sample": np.zeros((1, 3, 8, 8), np.float32)})
    assert "\n" not in str(caught.value)
