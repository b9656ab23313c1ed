"""What is exported from: a diffusers folder or hub id, and a folder with the routing network.

Everything is checked here before any work starts, so that a wrong folder costs no minutes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import ExportError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ("*.json", "tokenizer*/*", "scheduler/*", "*/config.json", "*.safetensors")
HUB_PARTS_NOT_USED = ("*.fp16.*", "*non_ema*", "safety_checker/*", "feature_extractor/*")

# Classes whose parts the device can run, by their key in model_index.json.
SUPPORTED = {
    "_class_name": ("StableDiffusionPipeline",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderTiny", "AutoencoderKL"),
    "scheduler": (
        "DPMSolverMultistepScheduler",
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "PNDMScheduler",
    ),
}
DESCRIPTIONS = {"text_encoder": "config.json", "scheduler": "scheduler_config.json"}
# UNet settings that ask for inputs which the device does not feed, but for those values.
EXTRA_INPUTS = {
    "addition_embed_type": (None, "text"),  # "text" pools the caption's states inside the network
    "class_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
}
DEFAULT_STEPS, DEFAULT_GUIDANCE = 20, 7.5


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a model draws when nothing else is asked for; sizes in pixels."""

    width: int
    height: int
    steps: int
    guidance: float


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A Stable Diffusion folder in diffusers layout."""

    folder: Path
    name: str
    vae_class: str
    scheduler_class: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]

    @property
    def vae_scale(self) -> int:
        """Picture pixels a latent pixel, along one side."""
        channels = self.vae.get("block_out_channels") or self.vae["decoder_block_out_channels"]
        return int(2 ** (len(channels) - 1))

    @property
    def latent_size(self) -> int:
        """Side of the latents the model was trained on."""
        size = self.unet.get("sample_size") or 64
        return int(size if isinstance(size, int) else max(size))

    def drawing(self) -> Drawing:
        """Return the settings in defaults.json, or usual ones at the size of training."""
        side = self.latent_size * self.vae_scale
        usual = {
            "width": side,
            "height": side,
            "steps": DEFAULT_STEPS,
            "guidance": DEFAULT_GUIDANCE,
        }
        own = self.folder / "defaults.json"
        wanted = read_json(own) if own.is_file() else {}
        return Drawing(**{key: wanted.get(key, value) for key, value in usual.items()})


@dataclass(frozen=True, slots=True)
class RouterFolder:
    """A trained routing network: its sizes, and what router.json says of metrics and scores."""

    folder: Path
    width: int
    spec: Mapping[str, Any]

    @property
    def network_files(self) -> tuple[Path, ...]:
        """The files that the network itself is made of."""
        return self.folder / "config.json", self.folder / "predictor.safetensors"


def open_pipeline(source: str, name: str | None = None) -> Pipeline:
    """Check and describe the pipeline in a folder, or fetch it when `source` is a hub id.

    Raises ExportError when there is none or it holds a class that the device cannot run.
    """
    folder = _folder_of(source)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ExportError(
            f"'{source}' is no diffusers pipeline: it has no model_index.json; "
            "pass the folder that save_pretrained wrote or a hub id"
        )
    index = read_json(index_file)
    classes = {"_class_name": index.get("_class_name")}
    classes |= {part: (index.get(part) or [None, None])[1] for part in SUPPORTED if part[0] != "_"}
    for key, supported in SUPPORTED.items():
        if classes[key] not in supported:
            what = "pipeline" if key == "_class_name" else key
            raise ExportError(
                f"the {what} of '{source}' is a {classes[key]}, which the device cannot run; "
                f"supported: {', '.join(supported)}"
            )
    unet = read_json(folder / "unet" / "config.json")
    for extra, fed in EXTRA_INPUTS.items():
        if unet.get(extra) not in fed:
            raise ExportError(
                f"the unet of '{source}' has {extra}={unet[extra]!r}, which the device cannot "
                "feed; choose a text-to-image model of the Stable Diffusion 1 or 2 family"
            )
    if unet.get("time_cond_proj_dim") is not None:
        raise ExportError(
            f"the unet of '{source}' is conditioned on guidance (time_cond_proj_dim="
            f"{unet['time_cond_proj_dim']}), which the device cannot feed; choose another model"
        )
    for part, file in DESCRIPTIONS.items():
        read_json(folder / part / file)
    return Pipeline(
        folder=folder,
        name=name or (source if folder != Path(source) else folder.resolve().name),
        vae_class=str(classes["vae"]),
        scheduler_class=str(classes["scheduler"]),
        unet=unet,
        vae=read_json(folder / "vae" / "config.json"),
    )


def open_router(folder: Path) -> RouterFolder:
    """Check and describe the routing network in `folder`; raises ExportError."""
    for needed in ("predictor.safetensors", "config.json", "router.json"):
        if not (folder / needed).is_file():
            raise ExportError(
                f"'{folder}' is no router: it has no {needed}; "
                "pass the folder that cloud-server train-router wrote"
            )
    config, spec = read_json(folder / "config.json"), read_json(folder / "router.json")
    if config.get("experts") != len(spec.get("metrics", ())):
        raise ExportError(
            f"the router in '{folder}' predicts {config.get('experts')} metrics, but its "
            f"router.json names {len(spec.get('metrics', ()))}; train it again"
        )
    if len(spec.get("text_probe", {}).get("state", ())) != config["width"]:
        raise ExportError(
            f"the router.json in '{folder}' has no text_probe to know its text encoder by; "
            "train it again with cloud-server train-router"
        )
    return RouterFolder(folder, int(config["width"]), spec)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raises ExportError naming the file when it is missing or damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ExportError(f"cannot read '{file}': {err}; fetch or train the model again") from err
    if not isinstance(value, dict):
        raise ExportError(f"'{file}' holds no JSON object; fetch or train the model again")
    return value


def digest_of(*paths: Path) -> str:
    """Return one sha256 over names and contents of files, and of the files in folders."""
    total = hashlib.sha256()
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                total.update(f"{file.name} {file_sha256(file)}\n".encode())
    return total.hexdigest()


def file_sha256(file: Path) -> str:
    """Return the hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_of(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.fullmatch(source):
        raise ExportError(f"there is no folder '{source}'; pass a diffusers folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        fetched = snapshot_download(
            source, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_PARTS_NOT_USED)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as err:
        raise ExportError(
            f"'{source}' is no folder here and could not be fetched as a hub id "
            f"({type(err).__name__}); check the name and the network, or pass a folder"
        ) from err
    return Path(fetched)
