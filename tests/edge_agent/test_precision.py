"""Half precision runs where something computes in it, and is refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent import EdgeAgent
from edge_agent.bundle import open_bundle
from edge_agent.errors import BundleError
from edge_agent.precision import check_precision
from edge_agent.runtime import openvino
from edge_agent.types import Provider, Request, Route

Rewrite = Callable[[Path, Callable[[dict[str, Any]], None]], None]


def call_it_half(content: dict[str, Any]) -> None:
    content["components"]["unet"]["precision"] = "fp16"


def test_half_precision_needs_more_than_a_processor(tiny_bundle: Path, rewrite: Rewrite) -> None:
    rewrite(tiny_bundle, call_it_half)
    parts = open_bundle(tiny_bundle).components
    for provider in (Provider.CUDA, Provider.COREML, Provider.OPENVINO):
        check_precision(parts["unet"], provider)
    check_precision(parts["vae_decoder"], Provider.CPU)
    with pytest.raises(BundleError, match=r"the unet .* is in fp16, .* --precision fp32 or int8"):
        check_precision(parts["unet"], Provider.CPU)


def test_an_agent_on_a_processor_decides_but_refuses_to_draw_in_half_precision(
    tiny_bundle: Path, rewrite: Rewrite
) -> None:
    rewrite(tiny_bundle, call_it_half)
    with EdgeAgent(open_bundle(tiny_bundle), offline=True, provider=Provider.CPU) as agent:
        assert agent.route("a cat").prs > 0
        with pytest.raises(BundleError, match="the unet of this bundle is in fp16"):
            agent.generate(Request("a cat", route=Route.EDGE))


@pytest.mark.skipif(openvino.version() is None, reason="OpenVINO is not installed")
@pytest.mark.parametrize("provider", [Provider.AUTO, Provider.OPENVINO])
def test_what_decides_in_half_precision_is_compared_with_the_cpu_too(
    tiny_bundle: Path, half_text_encoder: Callable[[Path], None], provider: Provider
) -> None:
    half_text_encoder(tiny_bundle)
    with EdgeAgent(open_bundle(tiny_bundle), offline=True, provider=provider, threads=1) as agent:
        assert agent.route("a cat").metrics
        assert agent.backends["text_encoder"].provider is Provider.OPENVINO_F32
