"""From a diffusers pipeline and a routing network to a bundle, one component after the other."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from cloud_server.torchvision_guard import guard
from cloud_server.training.predictor import Predictor
from edge_agent.bundle import FORMAT, Component
from edge_agent.errors import BundleError
from export import components, text
from export.bundle_writer import MODEL, BundleWriter
from export.components import Network
from export.errors import ExportError
from export.optimise import opset_of, optimise
from export.parity import GATES, check_parity
from export.quiet import quiet
from export.recognizer import RecognizerSource
from export.sources import Pipeline, RouterFolder, digest_of
from export.text import TextSource, TextTokenizer

guard()
import diffusers  # noqa: E402  the guard must come first

REVISION = 1  # raise when components come out differently, so that none older is kept
STAGES = ("trace", "optimise", "compare")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
GROWTH = 2  # pictures may be this much larger a side than those the model was trained on


@dataclass(frozen=True, slots=True)
class Job:
    """What to export. `clip` is the open_clip folder that the router's text encoder comes from;

    without it the router reads the pipeline's own. `gates` overrides parity gates by component.
    """

    pipeline: Pipeline
    router: RouterFolder
    out: Path
    clip: Path | None = None
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
    router_text, diffusion_text = _texts(job)
    parts = _plan(job, router_text, diffusion_text)
    try:
        writer = BundleWriter(job.out, fresh=job.fresh)
        rows = []
        for i, part in enumerate(parts):
            start = clock()
            kept = writer.keep(part.name, part.source)

            def tell(stage: int, name: str = part.name, before: int = i * len(STAGES)) -> None:
                on_stage(Stage(name, STAGES[stage], before + stage, len(parts) * len(STAGES)))

            component = kept or _export(part, job.precision, writer, tell)
            rows.append(Row(component, clock() - start, kept is not None))
        manifest = _manifest(job, router_text, diffusion_text, writer, now())
        return writer.finish([row.component for row in rows], manifest), rows
    except OSError as err:
        raise ExportError(
            f"cannot write the bundle to '{job.out}': {err.strerror or err}; "
            "make room or choose another folder with -o"
        ) from err
    except BundleError as err:
        raise ExportError(f"the device cannot read what was exported: {err}") from err


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


def _texts(job: Job) -> tuple[TextSource, TextSource]:
    """Return the text encoders of router and diffusion: one object where they agree."""
    with _naming("text_encoder"):
        diffusion = text.from_pipeline(job.pipeline.folder)
        router = text.from_open_clip(job.clip) if job.clip else diffusion
        if text.are_one(router, diffusion):
            router = diffusion
    if router.tower.width != job.router.width:
        raise ExportError(
            f"the router in '{job.router.folder}' reads text states of width {job.router.width}, "
            f"but the text encoder in '{job.clip or job.pipeline.folder}' gives "
            f"{router.tower.width}; pass --clip and --router of one training"
        )
    probe = job.router.spec["text_probe"]
    if not text.gives(router, probe["prompt"], probe["state"]):
        raise ExportError(
            f"the router in '{job.router.folder}' was trained on another text encoder than "
            f"'{job.clip or job.pipeline.folder}' has; pass --clip and --router of one training"
        )
    return router, diffusion


def _plan(job: Job, router_text: TextSource, diffusion_text: TextSource) -> list[_Part]:
    folder, context = job.pipeline.folder, diffusion_text.tokenizer.context_length
    size = job.pipeline.latent_size

    def part(name: str, metric: str, sources: Sequence[Path], load: Callable[[], Network]) -> _Part:
        gate = job.gates.get(name, GATES[metric])
        settings = [REVISION, str(torch.__version__), onnxruntime.__version__, job.precision, gate]
        seal = json.dumps([digest_of(*sources), context, size, *settings])
        return _Part(name, metric, gate, hashlib.sha256(seal.encode()).hexdigest(), load)

    def unet() -> Network:
        model = diffusers.UNet2DConditionModel.from_pretrained(
            folder / "unet", torch_dtype=torch.float32
        )
        return components.unet(model, context)

    def vae_decoder() -> Network:
        kind = getattr(diffusers, job.pipeline.vae_class)
        vae = kind.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        return components.vae_decoder(vae, size)

    def predictor() -> Network:
        model = Predictor.load(job.router.folder)
        return components.predictor(model, router_text.tokenizer.context_length)

    texts = {"text_encoder": router_text}
    if diffusion_text is not router_text:
        texts["text_encoder_diffusion"] = diffusion_text
    return [
        *(
            part(name, "cosine", each.files, partial(components.text_encoder, each.tower))
            for name, each in texts.items()
        ),
        part("predictor", "psnr_db", job.router.network_files, predictor),
        part("unet", "psnr_db", (folder / "unet",), unet),
        part("vae_decoder", "psnr_db", (folder / "vae",), vae_decoder),
        *(
            part(name, "psnr_db", files, load)
            for name, files, load in (job.recognizer.parts if job.recognizer else ())
        ),
    ]


def _manifest(
    job: Job,
    router_text: TextSource,
    diffusion_text: TextSource,
    writer: BundleWriter,
    created_at: datetime,
) -> dict[str, Any]:
    pipeline, shared = job.pipeline, diffusion_text is router_text
    drawing = pipeline.drawing()
    side = pipeline.latent_size * pipeline.vae_scale
    router = {key: value for key, value in job.router.spec.items() if key != "text_probe"}
    tokenizers = {"tokenizer": _tokenizer(writer, "tokenizer.json", router_text.tokenizer)}
    if not shared:
        tokenizers["tokenizer_diffusion"] = _tokenizer(
            writer, "tokenizer_diffusion.json", diffusion_text.tokenizer
        )
    return {
        "format": FORMAT,
        "created_by": f"routet2i-edge {_version()}",
        "created_at": created_at.isoformat(timespec="seconds"),
        **tokenizers,
        "diffusion": {
            "family": "stable-diffusion",
            "model": pipeline.name,
            "digest": digest_of(*(pipeline.folder / p for p in ("text_encoder", "unet", "vae"))),
            "scheduler": _scheduler(pipeline),
            "latent_channels": pipeline.unet["in_channels"],
            "vae_scale": pipeline.vae_scale,
            "scaling_factor": float(pipeline.vae.get("scaling_factor") or 1.0),
            "shift_factor": 0.0,
            **asdict(drawing),
            "max_size": GROWTH * max(side, drawing.width, drawing.height),
            "text_encoder": "text_encoder" if shared else "text_encoder_diffusion",
        },
        "router": {**router, "text_encoder": "text_encoder", "predictor": "predictor"},
        **({"recognizer": job.recognizer.manifest()} if job.recognizer else {}),
    }


def _tokenizer(writer: BundleWriter, name: str, tokenizer: TextTokenizer) -> dict[str, Any]:
    return {
        "file": name,
        **asdict(writer.add_file(name, tokenizer.json)),
        "context_length": tokenizer.context_length,
        "pad_id": tokenizer.pad_id,
    }


def _scheduler(pipeline: Pipeline) -> dict[str, Any]:
    """Return the scheduler's settings with diffusers' defaults filled in."""
    kind = getattr(diffusers, pipeline.scheduler_class)
    scheduler = kind.from_pretrained(pipeline.folder / "scheduler")
    if isinstance(scheduler, diffusers.PNDMScheduler):
        # Stable Diffusion 1 comes with PNDM; this solver needs half its steps on that schedule.
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    settings = {
        key: value
        for key, value in json.loads(scheduler.to_json_string()).items()
        if key == "_class_name" or not key.startswith("_")
    }
    # A limit at infinity is none, and JSON has no infinity.
    return {k: v for k, v in settings.items() if v not in (math.inf, -math.inf)}


def _version() -> str:
    try:
        return version("routet2i-edge")
    except PackageNotFoundError:
        return "(not installed)"
