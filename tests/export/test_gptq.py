"""Weights rounded by what they are used for: the integers that change outputs least."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import gptq
from export.gptq import round_columns
from export.loss import outputs_psnr_db
from export.lowering import lower
from export.network import trace_by_running
from export.optimise import optimise
from export.precision import FP32, INT8
from export.quiet import quiet

WIDTH, RANK = 192, 24
MOST = 64


def going_together(n: int, seed: int) -> np.ndarray:
    """Inputs (n, `WIDTH`) of mostly `RANK` directions, as of a trained network's layer."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(1).normal(size=(RANK, WIDTH))
    return rng.normal(size=(n, RANK)) @ mixing + 0.1 * rng.normal(size=(n, WIDTH)) + 0.5


def test_outputs_change_less_than_by_rounding_to_the_nearest():
    weight = np.random.default_rng(2).normal(size=(WIDTH, 40))
    scale = np.abs(weight).max(0) / MOST
    known, fresh = going_together(600, 3), going_together(200, 4)
    rounded = round_columns(weight, scale, known.T @ known, MOST)
    nearest = (weight / scale).round()

    def error(integers: np.ndarray) -> float:
        return float(np.mean((fresh @ (integers * scale - weight)) ** 2))

    assert np.array_equal(rounded, rounded.round())
    assert np.abs(rounded).max() <= MOST
    assert error(rounded) < 0.3 * error(nearest)


def test_inputs_that_do_not_go_together_leave_the_nearest():
    weight = np.random.default_rng(2).normal(size=(WIDTH, 40))
    scale = np.abs(weight).max(0) / MOST
    rounded = round_columns(weight, scale, np.eye(WIDTH), MOST)
    assert np.array_equal(rounded, (weight / scale).round())


def test_inputs_that_never_came_are_no_error():
    weight = np.random.default_rng(2).normal(size=(WIDTH, 40))
    scale = np.abs(weight).max(0) / MOST
    rounded = round_columns(weight, scale, np.zeros((WIDTH, WIDTH)), MOST)
    assert np.array_equal(rounded, (weight / scale).round())


class Layers(nn.Module):
    """Products one after the other, of which the second and third read the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, `WIDTH`) to (B, 8)."""
        x = self.first(x).tanh()
        return self.last((self.one(x) * self.other(x)).tanh())


def test_a_network_rounded_by_use_answers_nearer_however_its_parts_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def sample(seed: int) -> tuple[Tensor]:
        return (torch.from_numpy(going_together(50, seed)).float(),)

    traced = tmp_path / "traced.onnx"
    with quiet():
        trace_by_running(Layers().eval(), sample(5), traced, ("x",), ("y",), {"x": {0: "batch"}})
    reference = tmp_path / FP32 / "model.onnx"
    optimise(traced, reference)
    calibration = [{"x": sample(seed)[0].numpy()} for seed in range(6, 16)]

    def written(name: str, *calibration: dict[str, np.ndarray]) -> Path:
        file = tmp_path / name / "model.onnx"
        with quiet():
            lower(traced, file, INT8, calibration)
        return file

    nearest, by_use = written("nearest"), written("by_use", *calibration)
    monkeypatch.setattr(gptq, "MOST_BYTES", 1)  # one product at a time
    again = written("again", *calibration)

    def psnr_db(model: Path) -> float:
        return outputs_psnr_db(reference, model, INT8, [sample(17)])

    assert psnr_db(by_use) > psnr_db(nearest) + 1
    weights = [file.with_name("model.onnx.data").read_bytes() for file in (by_use, again)]
    assert weights[0] == weights[1]
    plain = nearest.with_name("model.onnx.data").read_bytes()
    assert len(weights[0]) == len(plain)
    monkeypatch.setattr(gptq, "WIDEST", WIDTH - 1)
    assert written("too_wide", *calibration).with_name("model.onnx.data").read_bytes() == plain
