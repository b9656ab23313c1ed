"""OpenVINO answers as onnxruntime does, stops when told to, and compiles only once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from edge_agent.errors import BundleError, Cancelled, GenerationError
from edge_agent.runtime import openvino
from edge_agent.runtime.checked import psnr_db
from edge_agent.runtime.openvino import LEAST_KEYS, OpenVinoSession
from edge_agent.runtime.session import Session
from edge_agent.types import Cancellation, Provider
from export.optimise import optimise

pytest.importorskip("openvino", reason="OpenVINO is not installed")

UNET = {
    "sample": np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32),
    "timestep": np.asarray(500),
    "encoder_hidden_states": np.random.default_rng(1).standard_normal((1, 16, 8)),
}
SHAPES = {name: array.shape for name, array in UNET.items()}


def model(file: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> Path:
    """Write a network from `x` to `y`, both matrices of 32 bits."""
    any_matrix = [None, None]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, any_matrix)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, any_matrix)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(file))
    return file


@pytest.mark.parametrize("shapes", [None, SHAPES])
def test_in_32_bits_it_answers_as_onnxruntime(
    tiny_bundle: Path, shapes: dict[str, tuple[int, ...]] | None
) -> None:
    file = tiny_bundle / "unet" / "model.onnx"
    session = OpenVinoSession(file, threads=1, f32=True, shapes=shapes)
    assert psnr_db(Session(file, threads=1).run(UNET), session.run(UNET)) > 100
    assert session.backend.provider is Provider.OPENVINO_F32
    assert str(session.backend).startswith("openvino f32 (openvino 20")


def test_in_the_precision_of_the_device_it_is_near(tiny_bundle: Path) -> None:
    file = tiny_bundle / "unet" / "model.onnx"
    session = OpenVinoSession(file, threads=1)
    assert psnr_db(Session(file, threads=1).run(UNET), session.run(UNET)) > 30
    assert session.backend.precision in ("f32", "bf16", "f16")


@pytest.mark.parametrize("activation", ["Sigmoid", "Tanh", "Relu"])
def test_what_the_export_fuses_is_read_rightly(tmp_path: Path, activation: str) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "weight", "bias"], ["sums"]),
        helper.make_node(activation, ["sums"], ["y"]),
    ]
    constants = {name: rng.standard_normal((8, 8), np.float32) for name in ("weight", "bias")}
    traced = model(tmp_path / "traced.onnx", nodes, constants)
    file = tmp_path / "optimised" / "model.onnx"
    optimise(traced, file)
    feeds = {"x": rng.standard_normal((8, 8))}
    session = OpenVinoSession(file, threads=1, f32=True)
    assert psnr_db(Session(file, threads=1, optimized=True).run(feeds), session.run(feeds)) > 100


def test_inputs_of_a_network_in_16_bits_have_their_names(tmp_path: Path) -> None:
    """OpenVINO takes a cast away, and the name behind it comes first then."""
    weight = np.random.default_rng(0).standard_normal((8, 8), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["y"])]
    file = model(tmp_path / "whole.onnx", nodes, {"weight": weight})
    half = convert_float_to_float16(onnx.load(file), keep_io_types=True)
    onnx.save(half, tmp_path / "half.onnx")
    session = OpenVinoSession(tmp_path / "half.onnx", threads=1, inputs=("x",))
    assert list(session.inputs) == ["x"]
    feeds = {"x": np.ones((2, 8), np.float32)}
    assert psnr_db(Session(file, threads=1).run(feeds), session.run(feeds)) > 50
    with pytest.raises(GenerationError, match=r"x has the shape None"):
        session.run({})


@pytest.mark.parametrize("width", [40, 64])
@pytest.mark.parametrize("tiles", [False, True])
def test_narrow_heads_are_filled_up_and_answer_the_same(
    tmp_path: Path, width: int, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "_multiplies_by_tiles", lambda in_16_bits: tiles)
    heads, keys = 2, LEAST_KEYS
    settings = {"num_heads": heads, "scale": width**-0.5, "domain": "com.microsoft"}
    node = helper.make_node("MultiHeadAttention", ["x", "y", "z"], ["mixed"], **settings)
    shape = (1, keys, heads * width)
    file = tmp_path / "attention.onnx"
    values = [helper.make_tensor_value_info(name, 1, shape) for name in ("x", "y", "z", "mixed")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", values[:3], values[3:])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), file)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape, np.float32) for name in ("x", "y", "z")}
    session = OpenVinoSession(file, threads=1, f32=True)
    np.testing.assert_allclose(
        session.run(feeds)[0], Session(file, threads=1).run(feeds)[0], atol=1e-5
    )
    nodes = [op.get_friendly_name() for op in session._compiled.get_runtime_model().get_ops()]
    assert any("Pad" in name for name in nodes) == (tiles and width == 40)


@pytest.fixture
def with_weights(tmp_path: Path) -> Path:
    """A network whose weights lie in a file of their own, as in a bundle."""
    weight = np.random.default_rng(3).standard_normal((64, 64), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["y"])]
    traced = model(tmp_path / "traced.onnx", nodes, {"weight": weight})
    optimise(traced, tmp_path / "network" / "model.onnx")
    assert (tmp_path / "network" / "model.onnx.data").stat().st_size >= weight.nbytes
    return tmp_path / "network" / "model.onnx"


def test_what_was_compiled_is_kept_without_its_weights_and_taken_again(
    with_weights: Path, tmp_path: Path
) -> None:
    kept, feeds = tmp_path / "cache" / "network.blob", {"x": np.eye(64)}
    shapes = {"x": (64, 64)}
    first = OpenVinoSession(with_weights, threads=1, f32=True, shapes=shapes, compiled=kept)
    assert kept.stat().st_size > 0
    wanted = first.run(feeds)[0]
    with_weights.write_bytes(b"no network any more")  # only the weights are read again
    again = OpenVinoSession(with_weights, threads=1, f32=True, shapes=shapes, compiled=kept)
    np.testing.assert_array_equal(again.run(feeds)[0], wanted)


@pytest.mark.parametrize("damage", [b"", b"damaged", b"\0" * 5000])
def test_a_damaged_cache_is_compiled_anew(
    with_weights: Path, tmp_path: Path, damage: bytes
) -> None:
    kept = tmp_path / "network.blob"
    kept.write_bytes(damage)
    session = OpenVinoSession(with_weights, threads=1, compiled=kept)
    assert np.isfinite(session.run({"x": np.eye(64)})[0]).all()
    assert kept.read_bytes() != damage


def test_a_cache_that_cannot_be_written_is_no_failure(with_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    session = OpenVinoSession(with_weights, threads=1, compiled=tmp_path / "file" / "network.blob")
    assert np.isfinite(session.run({"x": np.eye(64)})[0]).all()


@pytest.fixture
def large(with_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`with_weights`, taken for large on a processor that computes in 16 bits."""
    monkeypatch.setattr(openvino, "LEAST_HALVED", 1)
    monkeypatch.setattr(openvino, "_computes_in_16_bits", lambda: True)
    return with_weights


def half(large: Path, cache: Path, **options: bool) -> np.ndarray:
    session = OpenVinoSession(
        large, threads=1, compiled=cache / "n.blob", halved=cache / "n.xml", **options
    )
    return session.run({"x": np.eye(64)})[0]


def files(cache: Path) -> list[str]:
    return sorted(each.name for each in cache.iterdir())


def test_a_large_network_is_kept_with_weights_of_16_bits(large: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    wanted = OpenVinoSession(large, threads=1, f32=True).run({"x": np.eye(64)})[0]
    found = half(large, cache)
    assert files(cache) == ["n.bin", "n.half.blob", "n.xml"]
    assert (cache / "n.bin").stat().st_size < 0.6 * wanted.nbytes
    assert psnr_db(found, wanted) > 40  # bfloat16 or better
    large.write_bytes(b"no network any more")
    np.testing.assert_array_equal(half(large, cache), found)  # opens without the bundle's weights


def test_in_32_bits_or_when_small_no_weights_are_copied(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half(large, tmp_path / "exact", f32=True)
    assert files(tmp_path / "exact") == ["n.blob"]
    monkeypatch.setattr(openvino, "LEAST_HALVED", 1 << 20)
    half(large, tmp_path / "small")
    assert files(tmp_path / "small") == ["n.blob"]


def test_on_a_disk_without_room_no_weights_are_copied(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    half(large, tmp_path / "cache")
    assert files(tmp_path / "cache") == ["n.blob"]


def test_a_copy_that_was_not_all_written_is_not_taken(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino as engine

    def short(model: engine.Model, file: Path, **options: bool) -> None:
        saved(model, file, **options)
        os.truncate(file.with_suffix(".bin"), 100)

    saved = engine.save_model
    monkeypatch.setattr(engine, "save_model", short)
    half(large, tmp_path / "cache")
    assert files(tmp_path / "cache") == ["n.blob"]


def test_copies_that_nothing_used_for_long_are_deleted(large: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "killed.partial").mkdir(parents=True)
    for name in ("old.xml", "old.bin", "old.blob", "new.xml", "new.bin", "killed.partial/old.bin"):
        (cache / name).write_bytes(b"")
    for name in ("old.xml", "old.bin", "old.blob", "killed.partial"):
        os.utime(cache / name, (0, 0))
    half(large, cache)
    assert files(cache) == [
        *("n.bin", "n.half.blob", "n.xml", "new.bin", "new.xml", "old.blob"),  # a blob is small
    ]
    os.utime(cache / "n.bin", (0, 0))
    half(large, cache)
    assert (cache / "n.bin").stat().st_mtime > 0  # a use is noted


@pytest.fixture(scope="module")
def lengthy(tmp_path_factory: pytest.TempPathFactory) -> OpenVinoSession:
    """A network of many layers that takes seconds."""
    nodes, before = [], "x"
    for index in range(40):
        nodes.append(helper.make_node("MatMul", [before, "weight"], [f"m{index}"]))
        before = "y" if index == 39 else f"t{index}"
        nodes.append(helper.make_node("Tanh", [f"m{index}"], [before]))
    weight = np.eye(1500, dtype=np.float32)
    file = model(tmp_path_factory.mktemp("lengthy") / "model.onnx", nodes, {"weight": weight})
    return OpenVinoSession(file, threads=1, f32=True)


def test_cancelling_stops_a_network_in_the_middle_of_its_run(lengthy: OpenVinoSession) -> None:
    cancellation = Cancellation()
    timer = threading.Timer(0.3, cancellation.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        lengthy.run({"x": np.ones((1500, 1500), np.float32)}, cancellation)
    timer.join()


def test_does_not_begin_once_cancelled(lengthy: OpenVinoSession) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        lengthy.run({"x": np.ones((1500, 1500), np.float32)}, cancellation)


def test_several_threads_may_run_one_network(with_weights: Path) -> None:
    session = OpenVinoSession(with_weights, threads=1, f32=True)
    feeds = [{"x": np.full((64, 64), float(i))} for i in range(8)]
    wanted = [session.run(each)[0] for each in feeds]
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> Callable[[], None]:
        return lambda: found.__setitem__(index, session.run(feeds[index])[0])

    threads = [threading.Thread(target=work(index)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, each in enumerate(wanted):
        np.testing.assert_array_equal(found[index], each)


def test_a_file_that_is_no_network_is_named_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"not a network")
    with pytest.raises(BundleError, match=r"OpenVINO .* cannot load .*model\.onnx") as caught:
        OpenVinoSession(file, threads=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("feeds", [{}, {"latent_sample": np.zeros((1, 3, 8, 8), np.float32)}])
def test_a_missing_or_wrong_input_is_one_sentence(
    tiny_bundle: Path, feeds: dict[str, np.ndarray]
) -> None:
    session = OpenVinoSession(tiny_bundle / "vae_decoder" / "model.onnx", threads=1)
    with pytest.raises(GenerationError, match=r"failed in .*vae_decoder.*latent_sample") as caught:
        session.run(feeds)
    assert "\n" not in str(caught.value)


def test_it_reaches_for_no_network_and_no_telemetry(tiny_bundle: Path, tmp_path: Path) -> None:
    program = """if True:
        import sys
        def guard(event, arguments):
            if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
                print(event, arguments)
        sys.addaudithook(guard)
        from pathlib import Path
        from edge_agent.runtime.openvino import OpenVinoSession
        session = OpenVinoSession(Path(sys.argv[1]), threads=1, compiled=Path(sys.argv[2]))
    """
    file = tiny_bundle / "unet" / "model.onnx"
    done = subprocess.run(
        [sys.executable, "-c", program, str(file), str(tmp_path / "kept.blob")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
