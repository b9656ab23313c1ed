"""Whether an exported model answers as the torch model does, on shapes it was not traced with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_agent.bundle import Parity
from export.errors import ExportError

Array = NDArray[np.float32]
MAX_PSNR_DB = 200.0  # of equal arrays; JSON has no infinity

# fp32 reaches 1 - 1e-7 and over 100 dB; a wrong graph is far below either gate.
GATES = {"cosine": 0.9999, "psnr_db": 60.0}


def cosine(want: Array, got: Array) -> float:
    """Return the least cosine between vectors along the last axis."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (want, got))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / np.maximum(lengths, 1e-12)).min())


def psnr_db(want: Array, got: Array) -> float:
    """Return the peak signal-to-noise ratio, the peak being the largest magnitude in `want`."""
    error = float(np.mean((want.astype(np.float64) - got) ** 2))
    if error == 0:
        return MAX_PSNR_DB
    peak = max(float(np.abs(want).max()), 1e-12)
    return min(10 * math.log10(peak**2 / error), MAX_PSNR_DB)


MEASURES: dict[str, Callable[[Array, Array], float]] = {"cosine": cosine, "psnr_db": psnr_db}


def open_plainly(onnx: Path) -> ort.InferenceSession:
    """Open a finished model on the processor, as it is."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def check_parity(
    component: str,
    model: nn.Module,
    onnx: Path,
    samples: Sequence[tuple[Tensor, ...]],
    metric: str,
    gate: float,
) -> Parity:
    """Run `model` and `onnx`, loaded as the device loads it, on `samples`; return the worst answer.

    Raises ExportError, naming component, value and gate, below the gate.
    """
    session = open_plainly(onnx)
    names = [given.name for given in session.get_inputs()]
    worst = math.inf
    for sample in samples:
        with torch.inference_mode():
            wanted = model(*sample)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        found = session.run(None, {n: x.numpy() for n, x in zip(names, sample, strict=True)})
        for want, got in zip(wanted, found, strict=True):
            same_kind = want.shape == got.shape and np.isfinite(got).all()
            worst = min(worst, MEASURES[metric](want.numpy(), got) if same_kind else -math.inf)
    if worst < gate:
        raise ExportError(
            f"the exported {component} differs from torch: {metric} {worst:.6g} is below its gate "
            f"{gate:g}; no bundle was written, please report the model and these numbers"
        )
    return Parity(metric, worst, gate)
