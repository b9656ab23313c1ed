"""What lower precision costs: in a component's outputs, in pictures, in the router's decisions.

All is measured on this machine's processor, with the device's own agent. Pictures of both
precisions begin with the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edge_agent.agent import EdgeAgent
from edge_agent.bundle import Bundle, Component, Loss
from edge_agent.errors import GenerationError
from edge_agent.runtime import openvino
from edge_agent.runtime.openvino import OpenVinoSession
from edge_agent.runtime.session import default_threads
from edge_agent.types import Provider, Request, Route
from export.bundle_writer import DECODER, Losses
from export.errors import ExportError
from export.files import link
from export.lowering import Unsuited, rounding
from export.parity import MAX_PSNR_DB, open_plainly, psnr_db
from export.precision import FP16, FP32, INT4, INT8, PRECISIONS, W8A8, unsuited

PROMPTS, PICTURES = 1000, 4
PROMPTS_SEED = 20  # of the prompts that are taken where none are given
EVEN_SHARE = 0.5  # to count flips by, where the router sends nothing to the cloud


@dataclass(frozen=True, slots=True)
class Gate:
    """What a precision may cost unasked: least PSNRs, and the largest share of decisions."""

    psnr_db: float
    picture_psnr_db: float
    flips: float


GATES = {
    FP16: Gate(45.0, 30.0, 0.01),
    W8A8: Gate(25.0, 20.0, 0.05),
    INT8: Gate(25.0, 20.0, 0.05),
    INT4: Gate(20.0, 15.0, 0.10),
}


def judge(name: str, precision: str, loss: Loss, *, accept: bool) -> Loss:
    """Return the loss, marked where it fails its gate but is to be accepted; else ExportError."""
    gate = GATES[precision]
    failing = [
        f"{what} {value:.1f} dB (at least {least:g})"
        for what, value, least in (
            ("outputs", loss.psnr_db, gate.psnr_db),
            ("pictures", loss.picture_psnr_db, gate.picture_psnr_db),
        )
        if value is not None and value < least
    ]
    if loss.flips is not None and loss.flips > gate.flips:
        failing.append(f"{loss.flips:.1%} of decisions (at most {gate.flips:.0%})")
    if failing and not accept:
        raise ExportError(
            f"{precision} costs the {name} too much: {', '.join(failing)}; no bundle was written, "
            "choose another --precision for it (--sensitivity compares them), or --accept-loss"
        )
    return replace(loss, accepted=bool(failing))


def judged(losses: Losses, precisions: Mapping[str, str], *, accept: bool) -> Losses:
    """Judge every loss by the gate of its precision, and all together by that of the lowest."""
    each = {
        name: judge(name, precisions[name], loss, accept=accept)
        for name, loss in losses.each.items()
    }
    lowest = max((precisions[name] for name in each), key=PRECISIONS.index)
    names = " and the ".join(each)
    return Losses(each, judge(names, lowest, losses.together, accept=accept))


def outputs_psnr_db(
    reference: Path, lowered: Path, precision: str, samples: Sequence[tuple[Tensor, ...]]
) -> float:
    """Return the least PSNR of outputs of `lowered` on `samples`; raises Unsuited for broken ones.

    The peak is the largest magnitude of an output in `reference`. w8a8 is seen in OpenVINO too,
    where that is installed: it is made for it, and not every version adds up 8 bits correctly.
    """
    with TemporaryDirectory(dir=lowered.parent.parent) as folder:
        wanting = open_plainly(reference)
        plain = open_plainly(as_measured(lowered, precision, Path(folder)))
        engines = [lambda feeds: plain.run(None, feeds)]
        if precision == W8A8 and openvino.version():
            engines.append(OpenVinoSession(lowered, threads=default_threads(), f32=True).run)
        names = [given.name for given in wanting.get_inputs()]
        worst = MAX_PSNR_DB
        for sample in samples:
            feeds = {name: value.numpy() for name, value in zip(names, sample, strict=True)}
            wanted = wanting.run(None, feeds)
            for run in engines:
                for want, got in zip(wanted, run(feeds), strict=True):
                    if not np.isfinite(got).all():
                        raise Unsuited("its answers are then no longer finite numbers")
                    worst = min(worst, psnr_db(want, got))
    return worst


def as_measured(model: Path, precision: str, folder: Path) -> Path:
    """Return the file that computes here as `model` does where its precision belongs."""
    if precision != FP16:
        return model
    for file in model.parent.iterdir():
        if file != model:
            link(file, folder / file.name)
    rounding(model, folder / model.name)
    return folder / model.name


class Exam:
    """Prompts that are decided, and drawn, by a bundle in 32-bit floats and by changed ones.

    `tell` hears which components are about to be measured, and how many were before.
    """

    def __init__(
        self,
        reference: Bundle,
        prompts: Sequence[str],
        pictures: int,
        tell: Callable[[Sequence[str], int], None] = lambda names, index: None,
    ) -> None:
        self._bundle = reference
        self._prompts = prompts
        self._pictures = pictures
        self._tell = tell
        self._known: dict[frozenset[tuple[str, str]], Loss] = {}

    def losses(self, components: Mapping[str, Component]) -> Losses:
        """Return the loss of each lowered component, and of all; raises ExportError if they break.

        Components in 32-bit floats are left out.
        """
        lowered = {name: each for name, each in components.items() if each.precision != FP32}
        each = {}
        for name, component in lowered.items():
            try:
                each[name] = self.loss({name: component})
            except Unsuited as err:
                raise unsuited(name, component.precision, str(err)) from err
        together = self.loss(lowered)
        return Losses(each, replace(together, psnr_db=None))

    def loss(self, changed: Mapping[str, Component]) -> Loss:
        """Return what it costs to put `changed` components in; raises Unsuited if they break."""
        key = frozenset((name, component.precision) for name, component in changed.items())
        if key not in self._known:
            self._tell(list(changed), len(self._known))
            self._known[key] = self._measure(changed)
        return self._known[key]

    def _measure(self, changed: Mapping[str, Component]) -> Loss:
        drawing, router = self._bundle.diffusion, self._bundle.router
        in_pictures = {*drawing.text_encoders, drawing.denoiser, DECODER}
        in_decisions = {router.text_encoder, router.predictor}
        alone = next(iter(changed.values())).loss if len(changed) == 1 else None
        with TemporaryDirectory(dir=self._bundle.path) as folder:
            files = {
                name: self._as_measured(name, component, Path(folder) / name)
                for name, component in changed.items()
            }
            bundle = replace(self._bundle, components={**self._bundle.components, **files})
            return Loss(
                psnr_db=alone.psnr_db if alone else None,
                picture_psnr_db=self._picture_psnr_db(bundle) if in_pictures & set(files) else None,
                flips=self._flips(bundle) if in_decisions & set(files) else None,
                accepted=False,
            )

    def _as_measured(self, name: str, component: Component, folder: Path) -> Component:
        folder.mkdir()
        model = as_measured(self._bundle.path / component.file, component.precision, folder)
        file = str(model.relative_to(self._bundle.path))
        optimized = component.optimized or component.precision == FP16
        # Called fp32, since the device refuses to run fp16 on a processor: here it is to.
        return replace(component, name=name, file=file, precision=FP32, optimized=optimized)

    def _picture_psnr_db(self, bundle: Bundle) -> float:
        """Return the PSNR of the mean error over all pictures."""
        error = float(np.mean((self._wanted_pictures - self._draw(bundle)) ** 2))
        return min(10 * math.log10(255**2 / error), MAX_PSNR_DB) if error else MAX_PSNR_DB

    def _flips(self, bundle: Bundle) -> float:
        return float(np.mean(self._wanted_decisions != self._decide(bundle)))

    @cached_property
    def _wanted_pictures(self) -> NDArray[np.float64]:
        return self._draw(self._bundle)

    @cached_property
    def _wanted_decisions(self) -> NDArray[np.bool_]:
        return self._decide(self._bundle)

    def _draw(self, bundle: Bundle) -> NDArray[np.float64]:
        """Return pixels (pictures, height, width, 3), 0 to 255."""
        with EdgeAgent(bundle, offline=True, provider=Provider.CPU) as agent:
            try:
                drawn = [
                    agent.generate(
                        Request(self._prompts[i % len(self._prompts)], seed=i, route=Route.EDGE)
                    ).picture.image
                    for i in range(self._pictures)
                ]
            except GenerationError as err:
                raise Unsuited(f"drawing then fails: {err}") from err
        return np.stack([np.asarray(image, np.float64) for image in drawn])

    def _decide(self, bundle: Bundle) -> NDArray[np.bool_]:
        """Return of each prompt whether it would go to the cloud."""
        share = bundle.router.default_share or EVEN_SHARE
        with EdgeAgent(bundle, offline=True, share=share, provider=Provider.CPU) as agent:
            return np.array([agent.route(each).route is Route.CLOUD for each in self._prompts])
