"""RouteT2I on the device: decide where a prompt is drawn, draw it here, or fetch it from the cloud.

Names are loaded when first used, so that `import edge_agent` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.agent import CloudGenerator, EdgeAgent
    from edge_agent.bundle import Bundle, open_bundle
    from edge_agent.cloud.client import CloudClient
    from edge_agent.errors import AgentError
    from edge_agent.gallery.png import read_record, write_png
    from edge_agent.types import (
        Cancellation,
        Decision,
        Memory,
        Picture,
        Provider,
        Request,
        Result,
        Route,
    )

_HOMES = {
    "AgentError": "errors",
    "Bundle": "bundle",
    "Cancellation": "types",
    "CloudClient": "cloud.client",
    "CloudGenerator": "agent",
    "Decision": "types",
    "EdgeAgent": "agent",
    "Memory": "types",
    "Picture": "types",
    "Provider": "types",
    "Request": "types",
    "Result": "types",
    "Route": "types",
    "open_bundle": "bundle",
    "read_record": "gallery.png",
    "write_png": "gallery.png",
}

__all__ = [
    "AgentError",
    "Bundle",
    "Cancellation",
    "CloudClient",
    "CloudGenerator",
    "Decision",
    "EdgeAgent",
    "Memory",
    "Picture",
    "Provider",
    "Request",
    "Result",
    "Route",
    "open_bundle",
    "read_record",
    "write_png",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
