"""Networks run, stop in the middle when told to, and fail in words."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.errors import BundleError, Cancelled, GenerationError
from edge_agent.runtime.network import Backend
from edge_agent.runtime.session import ENGINE, Session
from edge_agent.types import Cancellation, Memory, Provider


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
    assert session.backend == Backend(Provider.CPU, ENGINE)


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


def test_inputs_are_cast_to_the_types_of_the_network(tiny_bundle: Path) -> None:
    session = Session(tiny_bundle / "unet" / "model.onnx", threads=1)
    feeds = {
        "sample": np.ones((1, 4, 8, 8)),
        "timestep": np.asarray(7.0),
        "encoder_hidden_states": np.ones((1, 3, 8)),
    }
    (prediction,) = session.run(feeds)
    assert prediction.dtype == np.float32


def test_little_memory_changes_no_more_than_the_rounding(tiny_bundle: Path) -> None:
    feeds = {"latent_sample": np.random.default_rng(0).standard_normal((1, 4, 8, 8))}
    file = tiny_bundle / "vae_decoder" / "model.onnx"
    little, usual = (Session(file, memory=mode) for mode in (Memory.LOW, Memory.HIGH))
    np.testing.assert_allclose(little.run(feeds)[0], usual.run(feeds)[0], rtol=1e-5, atol=1e-6)
    assert little.backend != usual.backend


def test_fixed_shapes_are_the_only_ones_taken(tiny_bundle: Path) -> None:
    shapes = {"latent_sample": (1, 4, 8, 8)}
    file = tiny_bundle / "vae_decoder" / "model.onnx"
    session = Session(file, threads=1, shapes=shapes)
    assert session.run({"latent_sample": np.zeros((1, 4, 8, 8))})[0].shape == (1, 3, 64, 64)
    with pytest.raises(GenerationError, match="vae_decoder"):
        session.run({"latent_sample": np.zeros((1, 4, 16, 8))})


def test_one_dimension_cannot_have_two_sizes(tiny_bundle: Path) -> None:
    shapes = {"sample": (1, 4, 8, 8), "timestep": (), "encoder_hidden_states": (2, 3, 8)}
    with pytest.raises(GenerationError, match="one dimension 'batch' of two sizes, 1 and 2"):
        Session(tiny_bundle / "unet" / "model.onnx", shapes=shapes)


def greedy(file: Path) -> Path:
    """Write a network that asks for 40 GB on the way to one number."""
    graph = helper.make_graph(
        [
            helper.make_node("Expand", ["x", "wide"], ["much"]),
            helper.make_node("ReduceMean", ["much"], ["y"], keepdims=0),
        ],
        "greedy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(np.array([10, 10**9], np.int64), "wide")],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(file))
    return file


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_running_out_of_memory_is_a_sentence_and_the_process_goes_on(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    program = """if True:
        import resource, sys
        import numpy as np
        from pathlib import Path
        from edge_agent.errors import GenerationError
        from edge_agent.runtime.session import Session
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        try:
            Session(Path(sys.argv[1]), threads=1).run({"x": np.ones(1)})
        except GenerationError as err:
            print(err)
        decoder = Session(Path(sys.argv[2]), threads=1)
        print(decoder.run({"latent_sample": np.zeros((1, 4, 8, 8))})[0].shape)
    """
    arguments = [str(greedy(tmp_path / "greedy.onnx")), str(tiny_bundle / "vae_decoder/model.onnx")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    told, went_on = done.stdout.splitlines()
    assert told.startswith("greedy ran out of memory; ask for --memory low or a smaller --size")
    assert went_on == "(1, 3, 64, 64)"
