"""From a diffusers pipeline and a routing network to a bundle, one component after the other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cloud_server.training.encoders import TextEncoder
from cloud_server.training.labels.prompts import sample_prompts
from edge_agent.bundle import Bundle, Component
from edge_agent.errors import BundleError
from export import calibration, text
from export.bundle_writer import ROUTER_TEXT, SENSITIVITY, BundleWriter, dump
from export.critic import CriticSource
from export.errors import ExportError, naming
from export.files import empty, hold
from export.loss import PICTURES, PROMPTS, PROMPTS_SEED, Exam, judge, judged
from export.making import STAGES, UNFUSED, Made, make, with_w8a8
from export.manifest import manifest
from export.parts import Part, parts_of
from export.precision import FP32, NOT_DRAWN, PRECISIONS, W8A8, Precisions, drawn, unsuited
from export.quiet import quiet
from export.recognizer import RecognizerSource
from export.sensitivity import report, try_all
from export.sources import Lora, Pipeline, RouterFolder


@dataclass(frozen=True, slots=True)
class Job:
    """What to export. `text_encoder` is the folder or id of what the router reads prompts with;

    without it that is the pipeline's own. With a `critic` the device can draw in a cascade. `loras`
    are merged into the pipeline first. `gates`
    overrides parity gates by component. What lower precision costs is measured on `prompts`, by
    default captions of the starter's world, and so many `pictures`; with `accept_loss` it may be
    anything. With `sensitivity` every component is tried at every precision.
    """

    pipeline: Pipeline
    router: RouterFolder
    out: Path
    text_encoder: str | Path | None = None
    loras: Sequence[Lora] = ()
    critic: CriticSource | None = None
    recognizer: RecognizerSource | None = None
    precision: Precisions = field(default_factory=Precisions)
    prompts: Sequence[str] = ()
    pictures: int = PICTURES
    accept_loss: bool = False
    sensitivity: bool = False
    gates: Mapping[str, float] = field(default_factory=dict)
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """Work that is about to start: `name` of `component`, after `index` of `total` stages."""

    component: str
    name: str
    index: int
    total: int


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the closing table; `kept` when an earlier export had made the component."""

    component: Component
    seconds: float
    kept: bool


@quiet()
def export_bundle(
    job: Job,
    on_stage: Callable[[Stage], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
    *,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> tuple[Path, list[Row]]:
    """Export every component that is not there yet; return the bundle's folder and a row for each.

    What its owner should know is told to `on_note`. Raises ExportError; the bundle that was there
    before is then still there.
    """
    try:
        with _merged(job, on_note) as merged:
            return _Export(merged, job.pipeline.folder, on_stage, clock).run(now())
    except OSError as err:
        raise ExportError(
            f"cannot write the bundle to '{job.out}': {err.strerror or err}; "
            "make room or choose another folder with -o"
        ) from err
    except BundleError as err:
        raise ExportError(f"the device cannot read what was exported: {err}") from err


@contextmanager
def _merged(job: Job, on_note: Callable[[str], None]) -> Iterator[Job]:
    """Give the job with its LoRAs in the pipeline, which lies beside the bundle meanwhile.

    What a killed export left of that goes.
    """
    out = job.out.expanduser().resolve()
    folder = out.with_name(f"{out.name}.merged")
    if not job.loras and not folder.exists():
        yield job
        return
    held = hold(folder)
    try:
        empty(folder)
        if job.loras:
            from export.lora import merge  # needs peft, which nobody else does

            merged = merge(job.pipeline, job.loras, folder, on_note)
            job = replace(job, pipeline=merged, loras=())
        yield job
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what stays goes with the next export here
        os.close(held)


class _Export:
    """One export; `original` is the pipeline's folder before LoRAs were merged.

    Where a precision is lowered, the same component is made in 32-bit floats too, to measure the
    loss, and dropped in the end.
    """

    def __init__(
        self,
        job: Job,
        original: Path,
        on_stage: Callable[[Stage], None],
        clock: Callable[[], float],
    ) -> None:
        self._job, self._on_stage, self._clock = job, on_stage, clock
        with naming(ROUTER_TEXT):
            source = job.text_encoder or original
            router_text = text.open_text(source)
            _check_router(job, source, router_text)
            self._texts = text.read_texts(
                job.pipeline.folder,
                job.pipeline.family,
                router_text,
                job.critic.text if job.critic else None,
            )
        self._parts = parts_of(
            job.pipeline, job.router, self._texts, job.critic, job.recognizer, job.gates
        )
        names = [part.name for part in self._parts]
        self._precisions = job.precision.of(names, job.pipeline.family.denoiser)
        self._drawn = drawn(job.pipeline.family.denoiser)
        calibrated = {
            name for name in self._drawn if job.sensitivity or self._precisions[name] == W8A8
        }
        # Stages between making and measuring: drawing, and one for each that waits for it.
        self._calibrating = len(calibrated) + bool(calibrated)
        self._lowered = [name for name in names if self._precisions[name] != FP32]
        captions = sample_prompts(PROMPTS, PROMPTS_SEED)
        self._prompts = list(job.prompts) or [caption.text for caption in captions]
        self._writer = BundleWriter(job.out, fresh=job.fresh)

    def run(self, created_at: datetime) -> tuple[Path, list[Row]]:
        """Write the bundle and return its folder and a row for each component."""
        job, writer = self._job, self._writer
        content = manifest(job.pipeline, job.router, self._texts, writer, created_at)
        if job.critic and self._texts.critic:
            content["critic"] = job.critic.manifest(self._texts.critic)
        if job.recognizer:
            content["recognizer"] = job.recognizer.manifest()
        source = self._source_of_losses(content)
        losses = writer.losses(source) if self._lowered else None
        also: Sequence[str] = PRECISIONS if job.sensitivity else ()
        if self._lowered and losses is None:
            also = also or (FP32,)
        made, seconds = self._make_all(also, content)
        rows = [
            Row(each.components[self._precisions[name]], seconds[name], each.kept)
            for name, each in made.items()
        ]
        reports = []
        if also:
            exam = self._exam(made, content)
            if self._lowered:
                losses = exam.losses({row.component.name: row.component for row in rows})
            if job.sensitivity:
                trials = try_all(made, exam)
                told = report(trials, self._prompts, job.pictures, content["created_at"])
                reports.append(SENSITIVITY)
                writer.add_file(SENSITIVITY, dump(told))
        if losses:
            losses = judged(losses, self._precisions, accept=job.accept_loss)
            content["loss"] = {
                **asdict(losses.together),
                "source": source,
                "prompts": len(self._prompts),
                "pictures": job.pictures,
            }
            rows = [
                replace(row, component=replace(row.component, loss=losses.each.get(name)))
                for name, row in zip(made, rows, strict=True)
            ]
        path = writer.finish([row.component for row in rows], content, reports)
        writer.close()
        return path, rows

    def _make_all(
        self, also: Sequence[str], content: Mapping[str, Any]
    ) -> tuple[dict[str, Made], dict[str, float]]:
        """Make what is shipped, and of the same parts other precisions too; tell the seconds."""
        made, seconds = {}, {}
        for i, part in enumerate(self._parts):
            start, precision = self._clock(), self._precisions[part.name]
            others = also if self._job.sensitivity or precision != FP32 else ()
            products = {each: self._product(part, each) for each in (precision, *others)}
            calibrated = self._calibrated(part, products, content)

            def tell(stage: str, name: str = part.name, before: int = i * len(STAGES)) -> None:
                self._tell(name, stage, before + STAGES.index(stage))

            each = make(part, products, self._writer, tell, timed=self._job.sensitivity)
            each = replace(each, components={**each.components, **calibrated})
            if W8A8 in also and part.name not in self._drawn:
                each = replace(each, unsuited={**each.unsuited, W8A8: NOT_DRAWN})
            made[part.name], seconds[part.name] = each, self._clock() - start
            self._check(part.name, each)
        waiting = {name: each for name, each in made.items() if UNFUSED in each.components}
        if waiting:
            made |= self._calibrate(waiting, self._reference(made, content), content)
        return made, seconds

    def _product(self, part: Part, precision: str) -> str:
        """Return what a component is called in the making: only what is shipped has its name."""
        shipped = precision == self._precisions[part.name]
        return part.name if shipped else f"{part.name}.{precision}"

    def _calibrated(
        self, part: Part, products: dict[str, str], content: Mapping[str, Any]
    ) -> dict[str, Component]:
        """Take w8a8 out of `products`: return it if it is there, else put in what it is made of."""
        name = products.pop(W8A8, None)
        if name is None or part.name not in self._drawn:
            return {}
        if found := self._writer.keep(name, self._source_of_calibrated(part, content)):
            return {W8A8: found}
        products |= {each: self._product(part, each) for each in (FP32, UNFUSED)}
        return {}

    def _calibrate(
        self, waiting: Mapping[str, Made], reference: Bundle, content: Mapping[str, Any]
    ) -> dict[str, Made]:
        """Make w8a8 of what is `waiting`, by what `reference` feeds it while drawing."""
        stages = len(self._parts) * len(STAGES)
        self._tell(", ".join(waiting), "draw", stages)
        # From the last prompt on: losses are measured on pictures of the first.
        calls = calibration.record(reference, list(waiting), self._prompts[::-1])
        made: dict[str, Made] = {}
        for name, each in waiting.items():
            self._tell(name, "calibrate", stages + 1 + len(made))
            part = next(part for part in self._parts if part.name == name)
            product, source = self._product(part, W8A8), self._source_of_calibrated(part, content)
            with naming(name):
                made[name] = with_w8a8(each, name, product, source, calls[name], self._writer)
            if self._precisions[name] == W8A8:
                self._check(name, made[name])
        return made

    def _check(self, name: str, made: Made) -> None:
        """Refuse a part that cannot have its precision, or loses too much by it."""
        precision = self._precisions[name]
        if precision in made.unsuited:
            raise unsuited(name, precision, made.unsuited[precision])
        component = made.components.get(precision)
        if component and component.loss:
            judge(name, precision, component.loss, accept=self._job.accept_loss)

    def _reference(self, made: Mapping[str, Made], content: Mapping[str, Any]) -> Bundle:
        """Open the bundle in 32 bits, as far as it was made."""
        components = {
            name: each.components.get(FP32) or each.components[self._precisions[name]]
            for name, each in made.items()
        }
        return self._writer.preview(components, content)

    def _exam(self, made: Mapping[str, Made], content: Mapping[str, Any]) -> Exam:
        measuring = len(self._parts) * len(STAGES) + self._calibrating

        def tell(names: Sequence[str], index: int) -> None:
            self._tell(", ".join(names), "measure", measuring + index)

        return Exam(self._reference(made, content), self._prompts, self._job.pictures, tell)

    def _tell(self, component: str, stage: str, index: int) -> None:
        measuring = len(self._parts) * len(PRECISIONS) if self._job.sensitivity else 0
        measuring = max(measuring, len(self._lowered) + (len(self._lowered) > 1))
        total = len(self._parts) * len(STAGES) + self._calibrating + measuring
        self._on_stage(Stage(component, stage, index, total))

    def _source_of_losses(self, content: Mapping[str, Any]) -> str:
        """Return a digest of all that losses depend on."""
        components = [part.source(self._precisions[part.name]) for part in self._parts]
        drawn = [content["diffusion"], content["router"], self._prompts, self._job.pictures]
        return hashlib.sha256(json.dumps([components, drawn]).encode()).hexdigest()

    def _source_of_calibrated(self, part: Part, content: Mapping[str, Any]) -> str:
        """Return a digest of the part and of all that it is fed by when it is calibrated."""
        feeding = [each.source(FP32) for each in self._parts]
        told = [part.source(W8A8), feeding, content["diffusion"], self._prompts]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _check_router(job: Job, source: str | Path, encoder: TextEncoder) -> None:
    """Refuse a router that was trained on another text encoder; raises ExportError."""
    if encoder.tower.width != job.router.width:
        raise ExportError(
            f"the router in '{job.router.folder}' reads text states of width {job.router.width}, "
            f"but the text encoder in '{source}' gives {encoder.tower.width}; "
            "pass --text-encoder and --router of one training"
        )
    probe = job.router.spec["text_probe"]
    if not text.gives(encoder, probe["prompt"], probe["state"]):
        raise ExportError(
            f"the router in '{job.router.folder}' was trained on another text encoder than "
            f"'{source}' has; pass --text-encoder and --router of one training"
        )
