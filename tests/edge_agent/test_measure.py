"""Measuring runs every provider on what a picture really feeds, and `auto` follows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent import EdgeAgent
from edge_agent.bundle import open_bundle
from edge_agent.measure import measure
from edge_agent.runtime import openvino, providers
from edge_agent.runtime.plan import Measured, Plan, candidates
from edge_agent.types import Provider, Request

Rewrite = Callable[[Path, Callable[[dict[str, Any]], None]], None]
Told = list[tuple[str, Provider, Measured]]


@pytest.fixture
def told(tiny_bundle: Path) -> Told:
    results: Told = []
    measure(open_bundle(tiny_bundle), 1, lambda *result: results.append(result))
    return results


def test_every_network_is_measured_on_every_provider(told: Told) -> None:
    drawing = {(name, one) for name in ("unet", "vae_decoder") for one in providers.available()}
    deciding = {
        (name, one)
        for name in ("text_encoder", "predictor")
        for one in providers.available()
        if one is not Provider.OPENVINO
    }
    assert {(name, provider) for name, provider, _ in told} == drawing | deciding
    assert all(found.right and found.seconds for _, _, found in told)
    assert {found.psnr_db for _, provider, found in told if provider is Provider.CPU} == {200.0}


def test_what_is_in_half_precision_is_measured_too(
    tiny_bundle: Path, rewrite: Rewrite, half_text_encoder: Callable[[Path], None]
) -> None:
    """The CPU answers for the others to be compared with, though it would not draw so."""
    half_text_encoder(tiny_bundle)
    rewrite(tiny_bundle, lambda it: it["components"]["unet"].update(precision="fp16"))
    results: Told = []
    measure(open_bundle(tiny_bundle), 1, lambda *result: results.append(result))
    for part, precise in (("text_encoder", True), ("unet", False)):
        measured = {one for name, one, found in results if name == part and found.right}
        assert measured == set(candidates(precise))


def test_a_preview_decoder_of_its_own_is_measured_too(tiny_bundle: Path, rewrite: Rewrite) -> None:
    def add(content: dict[str, Any]) -> None:
        content["components"]["preview_decoder"] = content["components"]["vae_decoder"]
        content["diffusion"]["preview"]["decoder"] = "preview_decoder"

    rewrite(tiny_bundle, add)
    results: Told = []
    measure(open_bundle(tiny_bundle), 1, lambda *result: results.append(result))
    measured = {one for name, one, found in results if name == "preview_decoder" and found.right}
    assert measured == set(providers.available())


@pytest.mark.skipif(openvino.version() is None, reason="OpenVINO is not installed")
def test_auto_draws_with_what_was_fastest(told: Told, tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    part = bundle.component("unet")
    Plan(Provider.AUTO, 1).remember(
        part, {Provider.CPU: Measured(2.0, 200.0), Provider.OPENVINO_F32: Measured(1e-9, 90.0)}
    )
    with EdgeAgent(bundle, threads=1) as agent:
        drawn = agent.generate(Request("a cat", seed=1))
    with EdgeAgent(bundle, threads=1, provider=Provider.CPU) as agent:
        on_cpu = agent.generate(Request("a cat", seed=1))
    assert drawn.backends["unet"].startswith("openvino f32 (openvino ")
    assert set(drawn.backends) == {"text_encoder", "predictor", "unet", "vae_decoder"}
    assert on_cpu.backends["unet"].startswith("cpu (onnxruntime ")
