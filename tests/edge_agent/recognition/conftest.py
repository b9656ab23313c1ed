"""A bundle with a hand-made recogniser, and pictures of one colour each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from tests.edge_agent.conftest import component, edit_manifest, save, tensor

SIDE, CLASSES = 8, ("red", "green", "blue", "dark")
DIGEST = "ab" * 32


def _recognizer(folder: Path) -> dict[str, Path]:
    """Features are mean colours; the head names the strongest, unless all are weak: dark.

    Adapted, the mean of all pictures counts twice.
    """
    weights = np.array([[2.0, -1, -1, -1], [-1, 2, -1, -1], [-1, -1, 2, -1]])
    bias = tensor("bias", [0.0, 0, 0, 0.5])
    features = ["n", 3]
    backbone = save(
        folder / "recognizer_backbone/model.onnx",
        [
            helper.make_node("Cast", ["pictures"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
            helper.make_node("Div", ["means", "white"], ["features"]),
        ],
        {"pictures": (TensorProto.UINT8, ["n", SIDE, SIDE, 3])},
        {"features": features},
        [tensor("axes", [1, 2], np.int64), tensor("white", 255.0)],
    )
    head = save(
        folder / "recognizer_head/model.onnx",
        [helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"])],
        {"features": (TensorProto.FLOAT, features)},
        {"logits": ["n", 4]},
        [tensor("weights", weights), bias],
    )
    adapted = save(
        folder / "recognizer_adapted/model.onnx",
        [
            helper.make_node("Concat", ["before", "features"], ["all"], axis=0),
            helper.make_node("ReduceMean", ["all", "first"], ["mean"], keepdims=1),
            helper.make_node("Add", ["mean", "mean"], ["twice"]),
            helper.make_node("Add", ["features", "twice"], ["both"]),
            helper.make_node("Gemm", ["both", "weights", "bias"], ["logits"]),
        ],
        {"before": (TensorProto.FLOAT, ["k", 3]), "features": (TensorProto.FLOAT, features)},
        {"logits": ["n", 4]},
        [tensor("weights", weights), bias, tensor("first", [0], np.int64)],
    )
    return {"backbone": backbone, "head": head, "adapted": adapted}


@pytest.fixture
def recognizing_bundle(tiny_bundle: Path) -> Path:
    """The tiny bundle with a recogniser of four classes."""
    files = _recognizer(tiny_bundle)
    assert all(onnx.load(str(file)).graph.output for file in files.values())

    def add(content: dict) -> None:
        for name, file in files.items():
            content["components"][f"recognizer_{name}"] = component(tiny_bundle, file)
        content["recognizer"] = {
            "classes": list(CLASSES),
            "side": SIDE,
            "crop": 1.0,
            "width": 3,
            "digest": DIGEST,
            "history": 15,
            "least_history": 3,
            **{name: f"recognizer_{name}" for name in files},
        }

    edit_manifest(tiny_bundle, add)
    return tiny_bundle


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Write a picture of one colour and return its file."""

    def write(name: str, *colour: int) -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 10), colour).save(file)
        return file

    return write
