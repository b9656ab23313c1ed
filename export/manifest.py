"""What bundle.json says beside the components: tokenizers, how the model draws, the router."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cloud_server.torchvision_guard import guard
from cloud_server.training.encoders import TextEncoder
from edge_agent.bundle import FORMAT
from edge_agent.diffusion.samplers import BY_DEFAULT
from export.bundle_writer import DECODER, PREVIEW_DECODER, ROUTER_TEXT, BundleWriter, tokenizer_file
from export.files import digest_of
from export.sources import Pipeline, RouterFolder
from export.text import Texts

guard()
import diffusers  # noqa: E402  the guard must come first


def manifest(
    pipeline: Pipeline,
    router: RouterFolder,
    texts: Texts,
    writer: BundleWriter,
    created_at: datetime,
) -> dict[str, Any]:
    """Return bundle.json but for its components, and write the tokenizers that it names."""
    parts = [encoder.folder for encoder in pipeline.family.encoders] + [pipeline.family.denoiser]
    spec = {k: value for k, value in router.spec.items() if k not in ("text_probe", "critic")}
    return {
        "format": FORMAT,
        "created_by": f"routet2i-edge {_version()}",
        "created_at": created_at.isoformat(timespec="seconds"),
        "tokenizers": {
            name: _tokenizer(writer, name, encoder) for name, encoder in texts.encoders.items()
        },
        "diffusion": {
            "family": pipeline.family.name,
            "model": pipeline.name,
            "digest": digest_of(*(pipeline.folder / p for p in parts), pipeline.vae_folder),
            "denoiser": pipeline.family.denoiser,
            "text_encoders": texts.diffusion,
            "text_states": pipeline.family.text_states,
            "empty_is_zeros": pipeline.empty_is_zeros,
            "scheduler": _scheduler(pipeline),
            "latent_channels": pipeline.denoiser["in_channels"],
            "vae_scale": pipeline.vae_scale,
            "size_step": pipeline.vae_scale * pipeline.latent_step,
            "scaling_factor": pipeline.scaling_factor,
            "shift_factor": pipeline.shift_factor,
            **asdict(pipeline.drawing()),
            "max_size": pipeline.max_size,
            "preview": _preview(pipeline),
        },
        "router": {**spec, "text_encoder": ROUTER_TEXT, "predictor": "predictor"},
    }


def _tokenizer(writer: BundleWriter, component: str, encoder: TextEncoder) -> dict[str, Any]:
    name = tokenizer_file(component)
    return {
        "file": name,
        **asdict(writer.add_file(name, encoder.json)),
        "context_length": encoder.context_length,
        "pad_id": encoder.tower.pad_id,
    }


def _scheduler(pipeline: Pipeline) -> dict[str, Any]:
    """Return the scheduler's settings as the pipeline has them, diffusers' defaults filled in."""
    kind = getattr(diffusers, pipeline.scheduler["_class_name"])
    scheduler = kind.from_config(dict(pipeline.scheduler))
    settings = {
        key: value
        for key, value in json.loads(scheduler.to_json_string()).items()
        if key == "_class_name" or not key.startswith("_")
    }
    by_default = set(scheduler.config.get(BY_DEFAULT, ()))
    if pipeline.index["_class_name"] == "StableDiffusionPipeline":
        # The pipeline puts these right in old configurations, whatever they say.
        for key, value in (("steps_offset", 1), ("clip_sample", False)):
            if settings.get(key, value) != value:
                settings[key] = value
                by_default.discard(key)
    # A limit at infinity is none, and JSON has no infinity.
    finite = {k: v for k, v in settings.items() if v not in (math.inf, -math.inf)}
    return finite | {BY_DEFAULT: sorted(by_default)}


def _preview(pipeline: Pipeline) -> dict[str, Any] | None:
    """Say with what pictures can be shown on the way, if a decoder is small enough for that."""
    preview = pipeline.preview
    if preview is None:
        return None
    return {
        "decoder": DECODER if preview is pipeline else PREVIEW_DECODER,
        "scaling_factor": preview.scaling_factor,
        "shift_factor": preview.shift_factor,
    }


def _version() -> str:
    try:
        return version("routet2i-edge")
    except PackageNotFoundError:
        return "(not installed)"
