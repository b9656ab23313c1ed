"""The comparison with peers runs, resumes and adds up; what it finds is no matter of tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import edge_vs_peers
from benchmarks.edge_vs_peers import Case, main
from benchmarks.peers.prepare import TEXT

CASES = [
    Case("sd-turbo", "one step", ("ours", "ours memory=low", "diffusers-fp32"), 1, 1, 3, cold=1),
    Case(TEXT, "text", ("onnxruntime-int8", "torch-fp32"), 1, 1, 3),
]


def found(
    p50_s: float, peak_rss_mb: float = 100.0, first_s: float = 1.0, ready_s: float | None = None
) -> dict[str, Any]:
    return {"p50_s": p50_s, "peak_rss_mb": peak_rss_mb, "first_s": first_s, "ready_s": ready_s}


def test_bars_take_the_best_of_ours_in_8_bits_apart_and_low_memory_only_where_asked() -> None:
    told = edge_vs_peers._reached(
        {
            "sd-turbo": {
                "ours provider=cpu": found(2.0, 500, 5.0),
                "ours provider=openvino": found(1.0, 900, 4.0, 2.5),
                "ours bundle=bundle-w8a8": found(0.4, 600, 2.0, 1.5),
                "ours provider=cpu memory=low": found(3.0, 300, 6.0),
                "diffusers-fp32": found(4.0, 400, 10.0, 5.0),
                "openvino": found(0.5),
            }
        }
    )
    rows = [row[:3] + row[4:] for row in list(told)[1:]]
    best, low = "'ours provider=openvino'", "'ours bundle=bundle-w8a8'"
    assert rows == [
        (f"sd-turbo: median of {best}", "diffusers-fp32", "0.25", "reached"),
        (f"sd-turbo: median of {low}", "diffusers-fp32", "0.10", "reached"),
        (f"sd-turbo: median of {best}", "openvino", "2.00", "missed"),
        (f"sd-turbo: median of {low}", "openvino", "0.80", "reached"),
        (f"sd-turbo: process start to picture of {best}", "diffusers-fp32", "0.40", "reached"),
        (f"sd-turbo: process start to picture of {low}", "diffusers-fp32", "0.20", "reached"),
        (f"sd-turbo: process start to all open of {best}", "diffusers-fp32", "0.50", "missed"),
        (f"sd-turbo: process start to all open of {low}", "diffusers-fp32", "0.30", "reached"),
        (
            "sd-turbo: peak RSS of 'ours provider=cpu memory=low'",
            "diffusers-fp32",
            "0.75",
            "reached",
        ),
    ]


def test_only_names_cases_and_contenders() -> None:
    def left(*only: str) -> dict[str, tuple[str, ...]]:
        return {case.name: case.contenders for case in edge_vs_peers._wanted(CASES, only)}

    assert left() == {case.name: case.contenders for case in CASES}
    assert left("sd-turbo") == {"sd-turbo": CASES[0].contenders}
    assert left("torch-fp32", "ours") == {"sd-turbo": ("ours",), TEXT: ("torch-fp32",)}
    assert left(TEXT, "torch-fp32") == {TEXT: ("torch-fp32",)}
    with pytest.raises(click.UsageError, match="'pytorch' is neither a case nor a contender"):
        left("pytorch")


def test_nearness_is_to_pytorch_in_32_bits(tmp_path: Path) -> None:
    reference = np.full((4, 4, 3), 100, np.uint8)
    np.save(tmp_path / "sd-turbo--diffusers-fp32.npy", reference)
    np.save(tmp_path / "sd-turbo--ours.npy", reference + 1)
    np.save(tmp_path / "sd-turbo--other.npy", reference[:2])
    files = {name: tmp_path / f"sd-turbo--{name}.json" for name in ("ours", "other", "none")}
    near = edge_vs_peers._near(tmp_path, "sd-turbo", files["ours"])
    assert near == pytest.approx(20 * np.log10(255))
    assert edge_vs_peers._near(tmp_path, "sd-turbo", files["other"]) is None
    assert edge_vs_peers._near(tmp_path, "sd-turbo", files["none"]) is None
    itself = tmp_path / "sd-turbo--diffusers-fp32.json"
    assert edge_vs_peers._near(tmp_path, "sd-turbo", itself) is None


@pytest.mark.slow
def test_everybody_draws_the_same_small_picture_and_a_second_run_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--quick", "--work", str(tmp_path), "--threads", "1", "--only", "sd-turbo"]
    options += ["--ours", ""]
    done = CliRunner().invoke(main, [*options, "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())["found"]["sd-turbo"]
    assert {"ours", "diffusers-fp32", "diffusers-bf16", "optimum"} <= set(found)
    for who, its in found.items():
        assert its["p50_s"] > 0
        assert its["peak_rss_mb"] > 50
        if who != "diffusers-fp32":  # some compute in 16 bits, none draws another prompt
            assert its["psnr_db"] > (60 if who in ("ours", "optimum") else 33)
    assert found["ours"]["first_s"] > found["ours"]["p50_s"]
    assert found["optimum"]["first_s"] is None
    assert "sd-turbo: median of 'ours'" in done.output
    monkeypatch.setattr(edge_vs_peers, "_run", None)
    again = CliRunner().invoke(main, options)
    assert again.exit_code == 0, again.output
