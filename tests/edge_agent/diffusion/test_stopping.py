"""A run of an ordinary network, layer after layer, is given up between its layers."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.errors import Cancelled
from edge_agent.runtime import session as runtime
from edge_agent.types import Cancellation

LAYERS, WIDTH = 400, 192


def layered(file: Path) -> Path:
    """Write a network of many layers, each of which takes a while and no two alike."""
    weights = np.random.default_rng(0).normal(size=(4, WIDTH, WIDTH)).astype(np.float32) / WIDTH
    names = ["x", *(f"after{layer}" for layer in range(LAYERS))]
    nodes = [
        helper.make_node("MatMul", [names[layer], f"weight{layer % 4}"], [names[layer + 1]])
        for layer in range(LAYERS)
    ]
    shape = [WIDTH * 4, WIDTH]
    graph = helper.make_graph(
        nodes,
        "layered",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(each, f"weight{index}") for index, each in enumerate(weights)],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(file))
    return file


def layers_run(
    file: Path, profile: Path, delay_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> int | None:
    """Run the network, told to stop after a while; return how many layers ran, None for all."""
    options = runtime.ort.SessionOptions

    def profiled() -> object:
        made = options()
        made.enable_profiling = True
        made.profile_file_prefix = str(profile)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(runtime.ort, "SessionOptions", profiled)
        session = runtime.Session(file, threads=1)
    cancellation = Cancellation()
    feeds = {"x": np.ones((WIDTH * 4, WIDTH), np.float32)}
    timer = threading.Timer(delay_s or 0.0, cancellation.cancel)
    if delay_s is not None:
        timer.start()
    try:
        session.run(feeds, cancellation)
        stopped = False
    except Cancelled:
        stopped = True
    timer.cancel()
    events = json.loads(Path(session._session.end_profiling()).read_text())
    ran = sum(each["name"].endswith("_kernel_time") for each in events)
    assert stopped or ran == LAYERS
    return ran if stopped else None


def test_cancelling_leaves_the_layers_that_were_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime's own record of the run says how far it got, whatever the machine's speed."""
    file = layered(tmp_path / "layered.onnx")
    assert layers_run(file, tmp_path / "whole", None, monkeypatch) is None
    delay_s, tries = 0.02, []
    for attempt in range(12):  # no run or all of it may fall into the wait on a busy machine
        ran = layers_run(file, tmp_path / f"try{attempt}", delay_s, monkeypatch)
        tries.append(ran)
        if ran is not None and 0 < ran < LAYERS:
            break
        delay_s *= 0.5 if ran is None else 1.7
    assert tries[-1] is not None, tries
    assert 0 < tries[-1] < LAYERS, tries
