"""ICIIA-T as it is written for the device against the module it is written from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cloud_server.training.iciia.gate import Gate
from cloud_server.training.iciia.module import Iciia, IciiaConfig
from cloud_server.training.iciia.recognizer import Adapted
from edge_agent.runtime.session import Session
from export import attention
from export.optimise import optimise

LONGEST = 30


def made(groups: int) -> Adapted:
    """A module none of whose weights is at a value that would hide a term of it."""
    torch.manual_seed(groups)
    iciia, gate = Iciia(IciiaConfig(32, 7, 1, groups=groups)), Gate(32)
    for weight in iciia.parameters():
        nn.init.normal_(weight, std=0.4)
    nn.init.normal_(gate.centre)
    nn.init.normal_(gate.weights)
    return Adapted(iciia, gate).eval()


@pytest.mark.parametrize("groups", [8, 4, 2])  # groups of 4, 8 and 16 values
def test_both_say_the_same_of_any_rows(tmp_path: Path, groups: int) -> None:
    model = made(groups)
    assert attention.fits(model.iciia)
    attention.write(model.iciia, model.gate, tmp_path / "written.onnx", LONGEST)
    optimise(tmp_path / "written.onnx", tmp_path / "model.onnx")
    session, rng = Session(tmp_path / "model.onnx", optimized=True), np.random.default_rng(1)
    for length, asked in ((2, [1]), (16, [15]), (LONGEST, [29, 3, 17]), (5, list(range(5)))):
        features = rng.normal(size=(length, 32)).astype(np.float32)
        rows = np.array(asked, np.int64)
        logits, gate = session.run({"features": features, "rows": rows})
        with torch.inference_mode():
            want, opens = model(torch.from_numpy(features), torch.from_numpy(rows))
        assert logits.shape == (len(asked), 7)
        np.testing.assert_allclose(logits, want, atol=1e-4)
        np.testing.assert_allclose(gate, opens, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"groups": 8, "layers": 2},
        {"groups": 1, "layers": 1, "heads": 3, "width": 96},
        {"groups": 16},
        {"groups": 8, "mixing": "none"},
        {"groups": 8, "shuffle": False},
    ],
)
def test_other_forms_are_traced_instead(settings: dict) -> None:
    assert not attention.fits(
        Iciia(IciiaConfig(**{"width": 32, "classes": 7, "layers": 1, **settings}))
    )
