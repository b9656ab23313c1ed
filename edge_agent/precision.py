"""Which precisions this device computes in."""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.bundle import Component
from edge_agent.errors import BundleError

HALF = "fp16"
PROCESSOR = "CPUExecutionProvider"


def check_precision(component: Component, providers: Sequence[str]) -> None:
    """Raise BundleError for fp16 with nothing but the processor to run it.

    onnxruntime would widen all of it to 32 bits in every run, which is never what somebody meant
    who chose fp16.
    """
    if component.precision == HALF and set(providers) <= {PROCESSOR}:
        raise BundleError(
            f"the {component.name} of this bundle is in fp16, which is for GPUs, and here "
            "onnxruntime has only the processor; export with --precision fp32 or int8 for this "
            "device, or install the build of onnxruntime for its GPU"
        )
