"""ICIIA-T as it is written for the device against the module it is written from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cloud_server.training.iciia.module import Iciia, IciiaConfig
from edge_agent.runtime.session import Session
from export import attention
from export.optimise import optimise


def made(groups: int) -> Iciia:
    """A module none of whose weights is at a value that would hide a term of it."""
    torch.manual_seed(groups)
    iciia = Iciia(IciiaConfig(32, 7, 1, groups=groups))
    for weight in iciia.parameters():
        nn.init.normal_(weight, std=0.4)
    return iciia.eval()


@pytest.mark.parametrize("groups", [8, 4, 2])  # groups of 4, 8 and 16 values
def test_both_say_the_same_after_any_history(tmp_path: Path, groups: int) -> None:
    model = made(groups)
    assert attention.fits(model)
    attention.write(model, tmp_path / "written.onnx")
    optimise(tmp_path / "written.onnx", tmp_path / "model.onnx")
    session, rng = Session(tmp_path / "model.onnx", optimized=True), np.random.default_rng(1)
    for earlier, new in ((1, 1), (15, 1), (27, 3), (0, 5), (0, 1)):
        features = rng.normal(size=(earlier + new, 32)).astype(np.float32)
        before, now = np.split(features, [earlier])
        (logits,) = session.run({"before": before, "features": now})
        with torch.inference_mode():
            want = model(torch.from_numpy(features))[earlier:]
        assert logits.shape == (new, 7)
        np.testing.assert_allclose(logits, want, atol=1e-4)


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
