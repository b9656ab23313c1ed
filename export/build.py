"""From a diffusers pipeline and a routing network to a bundle, one component after the other."""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch

from cloud_server.torchvision_guard import guard
from cloud_server.training import predictor as predictors
from cloud_server.training.encoders import TextEncoder
from edge_agent.bundle import Component
from edge_agent.errors import BundleError
from export import components, denoisers, text
from export.bundle_writer import MODEL, PREVIEW_DECODER, ROUTER_TEXT, BundleWriter
from export.errors import ExportError
from export.files import digest_of
from export.manifest import manifest
from export.network import Network
from export.optimise import opset_of, optimise
from export.parity import GATES, check_parity
from export.quiet import quiet
from export.recognizer import RecognizerSource
from export.sources import Lora, Pipeline, RouterFolder
from export.text import Texts

guard()
import diffusers  # noqa: E402  the guard must come first

REVISION = 4  # raise when components come out differently, so that none older is kept
STAGES = ("trace", "optimise", "compare")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Job:
    """What to export. `text_encoder` is the folder or id of what the router reads prompts with;

    without it that is the pipeline's own. `loras` are merged into the pipeline first. `gates`
    overrides parity gates by component.
    """

    pipeline: Pipeline
    router: RouterFolder
    out: Path
    text_encoder: str | Path | None = None
    loras: Sequence[Lora] = ()
    recognizer: RecognizerSource | None = None
    precision: str = "fp32"
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


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    metric: str
    gate: float
    source: str
    load: Callable[[], Network]


@quiet()
def export_bundle(
    job: Job,
    on_stage: Callable[[Stage], None] = lambda _: None,
    *,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> tuple[Path, list[Row]]:
    """Export every component that is not there yet; return the bundle's folder and a row for each.

    Raises ExportError; the bundle that was there before is then still there.
    """
    try:
        with _merged(job) as merged:
            return _export_parts(merged, job.pipeline.folder, on_stage, clock, now)
    except OSError as err:
        raise ExportError(
            f"cannot write the bundle to '{job.out}': {err.strerror or err}; "
            "make room or choose another folder with -o"
        ) from err
    except BundleError as err:
        raise ExportError(f"the device cannot read what was exported: {err}") from err


def _export_parts(
    job: Job,
    original: Path,
    on_stage: Callable[[Stage], None],
    clock: Callable[[], float],
    now: Callable[[], datetime],
) -> tuple[Path, list[Row]]:
    with _naming(ROUTER_TEXT):
        source = job.text_encoder or original
        router_text = text.open_text(source)
        _check_router(job, source, router_text)
        texts = text.read_texts(job.pipeline.folder, job.pipeline.family, router_text)
    parts = _plan(job, texts)
    writer = BundleWriter(job.out, fresh=job.fresh)
    rows = []
    for i, part in enumerate(parts):
        start = clock()
        kept = writer.keep(part.name, part.source)

        def tell(stage: int, name: str = part.name, before: int = i * len(STAGES)) -> None:
            on_stage(Stage(name, STAGES[stage], before + stage, len(parts) * len(STAGES)))

        component = kept or _export(part, job.precision, writer, tell)
        rows.append(Row(component, clock() - start, kept is not None))
    components = [row.component for row in rows]
    content = manifest(job.pipeline, job.router, texts, writer, now())
    if job.recognizer:
        content["recognizer"] = job.recognizer.manifest()
    return writer.finish(components, content), rows


@contextmanager
def _merged(job: Job) -> Iterator[Job]:
    """Give the job with its LoRAs in the pipeline, which lies beside the bundle meanwhile."""
    if not job.loras:
        yield job
        return
    from export.lora import merge  # needs peft, which nobody else does

    out = job.out.expanduser().resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{out.name}.merged-", dir=out.parent) as folder:
        yield replace(job, pipeline=merge(job.pipeline, job.loras, Path(folder)), loras=())


def _export(
    part: _Part, precision: str, writer: BundleWriter, tell: Callable[[int], None]
) -> Component:
    workspace = writer.workspace(part.name)
    traced, finished = workspace / "traced.onnx", workspace / "finished"
    with _naming(part.name):
        tell(0)
        network = part.load()
        network.trace(traced)
        tell(1)
        optimise(traced, finished / MODEL)
        tell(2)
        parity = check_parity(
            part.name, network.module, finished / MODEL, network.samples, part.metric, part.gate
        )
    return writer.add(
        part.name,
        finished,
        opset=opset_of(finished / MODEL),
        precision=precision,
        inputs=network.inputs,
        outputs=network.outputs,
        parity=parity,
        source=part.source,
    )


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turn whatever loading or tracing raises into one sentence that says which part failed."""
    try:
        yield
    except ExportError:
        raise
    except Exception as err:  # torch, optimum, transformers and onnxruntime share no base class
        if isinstance(err, OSError) and err.errno in NO_ROOM:
            raise
        line = str(err).strip().partition("\n")[0]
        raise ExportError(
            f"the {what} could not be exported ({type(err).__name__}: {line}); fetch or train it "
            "again, or see the whole error with --debug"
        ) from err


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


def _plan(job: Job, texts: Texts) -> list[_Part]:
    pipeline, family, size = job.pipeline, job.pipeline.family, job.pipeline.latent_size
    context_length = texts.router.context_length

    def part(
        name: str,
        metric: str,
        sources: Sequence[Path],
        load: Callable[[], Network],
        *shape: object,
    ) -> _Part:
        gate = job.gates.get(name, GATES[metric])
        settings = [REVISION, str(torch.__version__), onnxruntime.__version__, job.precision, gate]
        seal = json.dumps([digest_of(*sources), shape, *settings])
        return _Part(name, metric, gate, hashlib.sha256(seal.encode()).hexdigest(), load)

    def denoiser() -> Network:
        kind = getattr(diffusers, family.denoiser_class)
        model = kind.from_pretrained(pipeline.folder / family.denoiser, torch_dtype=torch.float32)
        module = denoisers.WRAPPERS[family.denoiser_class](model, texts.width)
        return denoisers.denoiser(module, size, texts.context_length, step=pipeline.latent_step)

    def vae_decoder(drawn: Pipeline) -> Network:
        kind = getattr(diffusers, drawn.vae["_class_name"])
        vae = kind.from_pretrained(drawn.vae_folder, torch_dtype=torch.float32)
        return components.vae_decoder(vae, size)

    preview = pipeline.preview
    decoders = {"vae_decoder": pipeline}
    if preview is not None and preview is not pipeline:
        decoders[PREVIEW_DECODER] = preview

    def predictor() -> Network:
        model = predictors.load(job.router.folder)
        return components.predictor(model, context_length)

    return [
        *(
            part(
                name,
                "cosine",
                each.files,
                partial(components.text_encoder, each.tower, each.context_length),
                (each.name, each.context_length, each.tower.outputs),
            )
            for name, each in texts.encoders.items()
        ),
        part("predictor", "psnr_db", job.router.network_files, predictor, context_length),
        part(
            family.denoiser,
            "psnr_db",
            (pipeline.folder / family.denoiser,),
            denoiser,
            (texts.context_length, texts.width, size),
        ),
        *(
            part(name, "psnr_db", (drawn.vae_folder,), partial(vae_decoder, drawn), size)
            for name, drawn in decoders.items()
        ),
        *(
            part(name, "psnr_db", files, load)
            for name, files, load in (job.recognizer.parts if job.recognizer else ())
        ),
    ]
