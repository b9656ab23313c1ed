"""Tracing what is too large for one file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from export.network import trace_by_running
from export.optimise import optimise
from export.parity import check_parity
from export.quiet import quiet

NEEDED_BYTES = 8e9


def available_bytes() -> int:
    """Return what programs can have: of Linux more than is free, since its caches give way."""
    meminfo = Path("/proc/meminfo")
    if found := meminfo.is_file() and re.search(r"MemAvailable: *(\d+)", meminfo.read_text()):
        return 1024 * int(found[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_weights_over_two_gigabytes_lie_beside_the_graph(tmp_path: Path) -> None:
    if available_bytes() < NEEDED_BYTES:
        pytest.skip("needs 8 GB of free memory")
    torch.manual_seed(0)
    network = torch.nn.Linear(24000, 23000, bias=False).eval()
    example = (torch.randn(2, 24000),)
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    with quiet():
        trace_by_running(network, example, tmp_path / "traced.onnx", ("x",), ("y",), axes)
    model = tmp_path / "finished" / "model.onnx"
    optimise(tmp_path / "traced.onnx", model)
    assert sorted(file.name for file in model.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert model.with_name("model.onnx.data").stat().st_size > 2**31
    assert check_parity("large", network, model, [example], "psnr_db", 60.0).value > 90
