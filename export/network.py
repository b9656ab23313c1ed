"""A torch network on its way to ONNX, and the two ways of tracing one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

OPSET = 18
MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class Network:
    """A torch module with tensors in and out, how to trace it, and inputs to compare it on.

    `calibration` are inputs as they come in use, if any are known, for int8 to be rounded by.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    trace: Callable[[Path], None]
    samples: Sequence[tuple[Tensor, ...]]
    calibration: Sequence[tuple[Tensor, ...]] = ()


def trace_symbolically(
    module: nn.Module,
    example: tuple[Tensor, ...],
    file: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[dict, ...],
) -> None:
    """Export by torch.export, which reasons about sizes: for networks that fit all of them."""
    # The example has two prompts or latents: a batch of one would be taken for a constant.
    torch.onnx.export(
        module,
        example,
        file,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=dynamic_shapes,
        dynamo=True,
        external_data=True,
        optimize=True,
        verbose=False,
    )


def trace_by_running(
    module: nn.Module,
    example: tuple[Tensor, ...],
    file: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_axes: Mapping[str, Mapping[int, str]],
) -> None:
    """Export what happens on the example: for networks that branch on sizes on the way.

    Weights over 2 GB are laid in files of their own beside `file`.
    """
    torch.onnx.export(
        module,
        example,
        str(file),  # over 2 GB it takes no Path
        input_names=inputs,
        output_names=outputs,
        dynamic_axes=dynamic_axes,
        opset_version=OPSET,
        dynamo=False,
        verbose=False,
    )
