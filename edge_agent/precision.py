"""Which precisions this device computes in."""

from __future__ import annotations

from edge_agent.bundle import Component
from edge_agent.errors import BundleError
from edge_agent.types import Provider

HALF = "fp16"
W8A8 = "w8a8"  # weights and activations in 8 bits, convolutions too


def suits(component: Component, provider: Provider) -> bool:
    """Whether a provider computes in the precision of a component, and not in a wider one."""
    return component.precision != HALF or provider is not Provider.CPU


def check_precision(component: Component, provider: Provider) -> None:
    """Raise BundleError for fp16 on onnxruntime's CPU provider.

    It would widen all of it to 32 bits in every run, which is never what somebody meant who chose
    fp16.
    """
    if not suits(component, provider):
        raise BundleError(
            f"the {component.name} of this bundle is in fp16, which is for GPUs, and here it would "
            "run on onnxruntime's CPU provider; export with --precision fp32 or int8 for this "
            "device, or choose another --provider"
        )
