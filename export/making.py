"""One network at all the precisions that are wanted of it, each a component of the bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch import Tensor

from edge_agent.bundle import Component, Loss
from edge_agent.runtime.session import Session
from export.bundle_writer import MODEL, BundleWriter
from export.errors import naming
from export.loss import outputs_psnr_db
from export.lowering import Unsuited, lower
from export.network import Network
from export.optimise import opset_of, optimise
from export.parity import check_parity
from export.parts import Part
from export.precision import FP16, FP32

STAGES = ("trace", "optimise", "compare")
CALLS = 5  # timed, after one that is not


@dataclass(frozen=True, slots=True)
class Made:
    """A part's components by precision; `unsuited` says why one could not be made.

    `milliseconds` is the time of a call, where it was asked for and the precision is one that a
    processor computes in.
    """

    components: Mapping[str, Component]
    unsuited: Mapping[str, str]
    milliseconds: Mapping[str, float]
    kept: bool


def make(
    part: Part,
    products: Mapping[str, str],
    writer: BundleWriter,
    tell: Callable[[str], None],
    *,
    timed: bool = False,
) -> Made:
    """Make the components named by `products`, whose keys are precisions, but those that are there.

    Each is recorded with the loss of its outputs. Raises ExportError when the part cannot be
    exported or differs from torch.
    """
    components = {
        precision: component
        for precision, name in products.items()
        if (component := writer.keep(name, part.source(precision)))
    }
    missing = {p: name for p, name in products.items() if p not in components}
    unsuited: dict[str, str] = {}
    milliseconds: dict[str, float] = {}
    with naming(part.name):
        if missing or timed:
            tell(STAGES[0])
            network = part.load()
        if missing:
            made, unsuited = _make(part, network, missing, writer, tell)
            components |= made
        if timed:
            milliseconds = {
                precision: call_ms(
                    writer.partial / component.file,
                    optimized=component.optimized,
                    sample=network.samples[0],
                )
                for precision, component in components.items()
                if precision != FP16
            }
    return Made(components, unsuited, milliseconds, kept=not missing)


def _make(
    part: Part,
    network: Network,
    products: Mapping[str, str],
    writer: BundleWriter,
    tell: Callable[[str], None],
) -> tuple[dict[str, Component], dict[str, str]]:
    workspace = writer.workspace(part.name)
    traced = workspace / "traced.onnx"
    network.trace(traced)
    tell(STAGES[1])
    finished = {precision: workspace / precision / MODEL for precision in (FP32, *products)}
    optimise(traced, finished[FP32])
    calibration = [
        {name: x.numpy() for name, x in zip(network.inputs, each, strict=True)}
        for each in network.calibration
    ]
    losses: dict[str, Loss | None] = {FP32: None}
    unsuited = {}
    for precision in [each for each in products if each != FP32]:
        try:
            lower(traced, finished[precision], precision, calibration)
            losses[precision] = _loss(finished, precision, network)
        except Unsuited as err:
            unsuited[precision] = str(err)
    tell(STAGES[2])
    parity = check_parity(
        part.name, network.module, finished[FP32], network.samples, part.metric, part.gate
    )
    components = {
        precision: writer.add(
            name,
            finished[precision].parent,
            opset=opset_of(finished[precision]),
            precision=precision,
            inputs=network.inputs,
            outputs=network.outputs,
            parity=parity,
            source=part.source(precision),
            optimized=precision != FP16,
            loss=losses[precision],
        )
        for precision, name in products.items()
        if precision in losses
    }
    writer.discard(workspace)
    return components, unsuited


def _loss(finished: Mapping[str, Path], precision: str, network: Network) -> Loss:
    psnr_db = outputs_psnr_db(finished[FP32], finished[precision], precision, network.samples)
    return Loss(psnr_db, picture_psnr_db=None, flips=None, accepted=False)


def call_ms(model: Path, *, optimized: bool, sample: Sequence[Tensor]) -> float:
    """Return the median time of one call as the device makes it, on one sample of parity."""
    session = Session(model, optimized=optimized)
    feeds = {name: value.numpy() for name, value in zip(session.inputs, sample, strict=True)}
    taken = []
    for _ in range(1 + CALLS):
        begun = time.perf_counter()
        session.run(feeds)
        taken.append(1e3 * (time.perf_counter() - begun))
    return median(taken[1:])
