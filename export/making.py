"""One network at all the precisions that are wanted of it, each a component of the bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from edge_agent.bundle import Component, Loss
from edge_agent.runtime.session import Session
from export.bundle_writer import MODEL, BundleWriter
from export.calibration import Calls, quantise
from export.errors import naming
from export.loss import outputs_psnr_db
from export.lowering import Unsuited, lower
from export.network import Network
from export.optimise import BASIC, opset_of, optimise
from export.parity import check_parity
from export.parts import Part
from export.precision import FP16, FP32, W8A8

# Beside the precisions: in 32 bits, as it was traced, to be calibrated when all is there.
UNFUSED = "unfused"
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
                if precision not in (FP16, UNFUSED)
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
        if precision == UNFUSED:
            optimise(traced, finished[precision], BASIC)
            losses[precision] = None
            continue
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
            precision=FP32 if precision == UNFUSED else precision,
            inputs=network.inputs,
            outputs=network.outputs,
            parity=parity,
            source=part.source(precision),
            optimized=precision not in (FP16, UNFUSED),
            loss=losses[precision],
        )
        for precision, name in products.items()
        if precision in losses
    }
    writer.discard(workspace)
    return components, unsuited


def with_w8a8(
    made: Made, name: str, product: str, source: str, calls: Calls, writer: BundleWriter
) -> Made:
    """Return `made` with component `product`: part `name` in w8a8, of what was made unfused.

    `calls` are what the part is fed while the device draws, `source` a digest of all that decides.
    """
    full, unfused = made.components[FP32], made.components[UNFUSED]
    workspace = writer.workspace(name)
    finished = workspace / W8A8 / MODEL
    checks = [tuple(torch.from_numpy(feeds[i]) for i in unfused.inputs) for feeds in calls.checks]
    try:
        quantise(writer.partial / unfused.file, finished, calls.calibration)
        near = outputs_psnr_db(writer.partial / full.file, finished, W8A8, checks)
    except Unsuited as err:
        writer.discard(workspace)
        return replace(made, unsuited={**made.unsuited, W8A8: str(err)})
    component = writer.add(
        product,
        finished.parent,
        opset=opset_of(finished),
        precision=W8A8,
        inputs=unfused.inputs,
        outputs=unfused.outputs,
        parity=unfused.parity,
        source=source,
        optimized=False,
        loss=Loss(near, picture_psnr_db=None, flips=None, accepted=False),
    )
    writer.discard(workspace)
    return replace(made, components={**made.components, W8A8: component})


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
