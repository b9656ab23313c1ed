"""What is exported from: a diffusers folder or hub id, and a folder with the routing network.

Everything is checked here before any work starts, so that a wrong folder costs no minutes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from edge_agent.diffusion.samplers import SCHEDULERS, make_sampler
from edge_agent.errors import BundleError
from export.errors import ExportError
from export.families import FAMILIES, VAES, Family
from export.files import read_json
from export.weights import check_present, wanted

CRITIC_WEIGHTS = "critic.safetensors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The folders in a repository that are fetched; "" is its own.
PIPELINE_PARTS = sorted({"", "scheduler"}.union(*(each.classes for each in FAMILIES.values())))
VAE_PARTS = ("",)
# Where weights usually are, in parts that are diffusers' and in those that are transformers'.
USUAL, USUAL_OF_TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
# Settings that are counted with; what the libraries alone read they check themselves.
COUNTS = ("num_train_timesteps", "patch_size", "pos_embed_max_size", "sample_size")
NUMBERS = ("beta_end", "beta_start", "scaling_factor", "shift_factor", "steps_offset")

# What Turbo models come with, SD-Turbo the first and SDXL-Turbo the other, spaced from the end on.
ONE_STEP = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
# Stable Diffusion 1 comes with PNDM; one solver takes its place and that of others that walk the
# same path, in half the steps.
SOLVER = "DPMSolverMultistepScheduler"
REPLACED = (
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
# Options of the path, which stay then; what only the other solver reads goes.
OF_THE_PATH = {
    "beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "prediction_type",
    "rescale_betas_zero_snr", "steps_offset", "thresholding", "timestep_spacing", "trained_betas",
    "use_beta_sigmas", "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas",
}  # fmt: skip
# Settings of UNets that ask for inputs which the device does not feed, but for those values.
EXTRA_INPUTS: dict[str, dict[str, tuple[str | None, ...]]] = {
    "stable-diffusion": {
        "addition_embed_type": (None, "text"),  # "text" pools the states inside the network
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
    },
    "stable-diffusion-xl": {
        "addition_embed_type": ("text_time",),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
    },
}
SMALL_VAE = "AutoencoderTiny"
GROWTH = 2  # pictures may be this much larger a side than those the model was trained on
# What AutoencoderKL's configuration leaves out in old models; that of the tiny one is 1.
KL_SCALING_FACTOR = 0.18215


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a model draws when nothing else is asked for; sizes in pixels."""

    width: int
    height: int
    steps: int
    guidance: float


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A folder in diffusers layout; `vae_folder` is its own autoencoder's, or another one's.

    `index`, `scheduler`, `denoiser` and `vae` are what the folder's JSON files say; `steps` and
    `guidance` stand above all that they say of those. `preview_vae` is the folder of a small
    autoencoder to show pictures with on the way.
    """

    folder: Path
    name: str
    family: Family
    index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    denoiser: Mapping[str, Any]
    vae_folder: Path
    vae: Mapping[str, Any]
    steps: int | None = None
    guidance: float | None = None
    preview_vae: Path | None = None

    @property
    def preview(self) -> Pipeline | None:
        """The pipeline as it decodes previews, None where it has no decoder that is small."""
        if self.preview_vae is not None:
            return _with_vae(self, self.preview_vae)
        return self if self.vae["_class_name"] == SMALL_VAE else None

    @property
    def vae_scale(self) -> int:
        """Picture pixels a latent pixel, along one side."""
        channels = self.vae.get("block_out_channels") or self.vae["decoder_block_out_channels"]
        return int(2 ** (len(channels) - 1))

    @property
    def scaling_factor(self) -> float:
        """Factor from the decoder's latents to those of the denoiser."""
        default = KL_SCALING_FACTOR if self.vae["_class_name"] == "AutoencoderKL" else 1.0
        return float(self.vae.get("scaling_factor") or default)

    @property
    def shift_factor(self) -> float:
        """Offset of the decoder's latents from those of the denoiser."""
        return float(self.vae.get("shift_factor") or 0.0)

    @property
    def latent_step(self) -> int:
        """Number of which the sides of latents are multiples."""
        return int(self.denoiser.get("patch_size") or 1)

    @property
    def latent_size(self) -> int:
        """Side of the latents the model was trained on."""
        size = self.denoiser.get("sample_size") or 64
        return int(size if isinstance(size, int) else max(size))

    @property
    def max_size(self) -> int:
        """Pixels a side up to which pictures may be asked for."""
        drawing = self.drawing()
        side = GROWTH * max(self.latent_size * self.vae_scale, drawing.width, drawing.height)
        positions = self.denoiser.get("pos_embed_max_size")
        if positions is None:
            return side
        return min(side, int(positions) * self.latent_step * self.vae_scale)

    @property
    def empty_is_zeros(self) -> bool:
        """Whether an empty negative prompt stands for zeros instead of what encoders say to it."""
        own = self.index.get("force_zeros_for_empty_prompt", self.family.empty_is_zeros)
        return bool(own) and self.family.empty_is_zeros

    @property
    def takes_guidance(self) -> bool:
        """Whether the strength of guidance is an input of the denoiser."""
        return self.denoiser.get("time_cond_proj_dim") is not None

    def drawing(self) -> Drawing:
        """Return the settings in defaults.json, or usual ones at the size of training.

        Raises ExportError for what nothing can be drawn by.
        """
        side = self.latent_size * self.vae_scale
        steps, guidance = self._usual()
        usual = {"width": side, "height": side, "steps": steps, "guidance": guidance}
        own = self.folder / "defaults.json"
        wanted = read_json(own) if own.is_file() else {}
        asked = {"steps": self.steps, "guidance": self.guidance}
        wanted |= {key: value for key, value in asked.items() if value is not None}
        found = {key: wanted.get(key, value) for key, value in usual.items()}
        for key, value in found.items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            strength = isinstance(value, int | float) and 0 <= value < math.inf
            if not (strength if key == "guidance" else whole):
                raise ExportError(
                    f"the default {key} of '{self.name}' is {value!r}; it must be a "
                    f"number {'from 0 on' if key == 'guidance' else 'above 0'}"
                )
        step = self.vae_scale * self.latent_step
        if found["width"] % step or found["height"] % step:
            raise ExportError(
                f"the default size of '{self.name}' is {found['width']}x{found['height']}; sides "
                f"must be multiples of {step}"
            )
        return Drawing(**found)

    def _usual(self) -> tuple[int, float]:
        name, spacing = self.scheduler["_class_name"], self.scheduler.get("timestep_spacing")
        if name == "LCMScheduler":  # diffusers' own for these pipelines
            return 4, 8.5 if self.takes_guidance else 1.0
        whole = self.scheduler.get("rescale_betas_zero_snr")  # as of models for many steps
        if name in ONE_STEP and spacing == "trailing" and not whole:
            return 1, 0.0
        return self.family.steps, self.family.guidance


@dataclass(frozen=True, slots=True)
class Lora:
    """A file of LoRA weights, and how much of them is added."""

    path: Path
    scale: float
    name: str


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

    Raises ExportError when there is none or it holds a class or setting that the device cannot run.
    """
    folder = _folder_of(source, PIPELINE_PARTS)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ExportError(
            f"'{source}' is no diffusers pipeline: it has no model_index.json; "
            "pass the folder that save_pretrained wrote or a hub id"
        )
    index = read_json(index_file)
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        raise ExportError(
            f"the pipeline of '{source}' is a {kind}, which the device cannot run; "
            f"supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    for part, supported in {**family.classes, "scheduler": (*SCHEDULERS, *REPLACED)}.items():
        found = index.get(part)
        found = found[1] if isinstance(found, list) and len(found) == 2 else None
        if found not in supported:
            raise ExportError(
                f"the {part} of '{source}' is a {found}, which the device cannot run; "
                f"supported: {', '.join(supported)}"
            )
    denoiser = _read_settings(folder / family.denoiser / "config.json")
    _check_inputs(source, family, denoiser)
    vae = _read_vae(folder / "vae", str(index["vae"][1]))
    _check_channels(source, family, denoiser, vae)
    for encoder in family.encoders:
        read_json(folder / encoder.folder / "config.json")
        check_present(folder / encoder.folder, USUAL_OF_TEXT)
    check_present(folder / family.denoiser, USUAL)
    check_present(folder / "vae", USUAL)
    return Pipeline(
        folder=folder,
        name=name or (source if folder != Path(source) else folder.resolve().name),
        family=family,
        index=index,
        scheduler=_read_scheduler(source, folder, str(index["scheduler"][1])),
        denoiser=denoiser,
        vae_folder=folder / "vae",
        vae=vae,
    )


def with_vae(pipeline: Pipeline, source: str) -> Pipeline:
    """Return the pipeline with another autoencoder, of a folder or hub id, in the place of its own.

    Raises ExportError when there is none or its latents are others.
    """
    changed = _with_vae(pipeline, _folder_of(source, VAE_PARTS))
    check_present(changed.vae_folder, USUAL)
    return changed


def _with_vae(pipeline: Pipeline, folder: Path) -> Pipeline:
    vae = _read_vae(folder)
    changed = replace(pipeline, vae_folder=folder, vae=vae)
    for what, own, other in (
        ("channels", pipeline.denoiser["in_channels"], vae.get("latent_channels", 4)),
        ("pixels a latent", pipeline.vae_scale, changed.vae_scale),
    ):
        if own != other:
            raise ExportError(
                f"the autoencoder in '{folder}' has {other} {what}, but '{pipeline.name}' needs "
                f"{own}; pass one that was made for this family"
            )
    return changed


def with_preview(pipeline: Pipeline, source: str) -> Pipeline:
    """Return the pipeline with a small autoencoder, of a folder or hub id, for its previews.

    Raises ExportError when there is none, it is a large one, or its latents are others.
    """
    folder = _folder_of(source, VAE_PARTS)
    kind = _with_vae(pipeline, folder).vae["_class_name"]
    if kind != SMALL_VAE:
        raise ExportError(
            f"the autoencoder in '{folder}' is of the kind {kind}, too slow for previews; "
            f"pass an {SMALL_VAE}, such as TAESD's folder"
        )
    check_present(folder, USUAL)
    return replace(pipeline, preview_vae=folder)


def open_lora(source: str) -> Lora:
    """Find the weights that `DIR[:scale]`, or `FILE[:scale]`, speaks of; raises ExportError."""
    name, _, number = source.rpartition(":")
    try:
        path, scale = Path(name), float(number)
    except ValueError:
        path, scale = Path(source), 1.0
    if not name:
        path, scale = Path(source), 1.0
    files = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
    if len(files) != 1 or not files[0].is_file() or not math.isfinite(scale):
        raise ExportError(
            f"'{source}' is no LoRA: expected a folder with one .safetensors file, or that file, "
            "and after a colon, if it is not 1, the scale"
        )
    return Lora(files[0], scale, path.stem)


def _check_inputs(source: str, family: Family, denoiser: Mapping[str, Any]) -> None:
    for extra, fed in EXTRA_INPUTS.get(family.name, {}).items():
        if denoiser.get(extra) not in fed:
            raise ExportError(
                f"the unet of '{source}' has {extra}={denoiser.get(extra)!r}, which the device "
                f"cannot feed in a {family.name} pipeline; choose a text-to-image model"
            )


def _check_channels(
    source: str, family: Family, denoiser: Mapping[str, Any], vae: Mapping[str, Any]
) -> None:
    """Refuse networks whose latents do not go through each other; the device would find out."""
    if not isinstance(denoiser.get("in_channels"), int):
        raise ExportError(
            f"the {family.denoiser} of '{source}' does not say its in_channels; fetch or train the "
            "model again"
        )
    taken = denoiser["in_channels"]
    for what, given in (
        (f"the {family.denoiser} gives", denoiser.get("out_channels", taken)),
        ("its autoencoder has", vae.get("latent_channels", 4)),
    ):
        if given not in (taken, None):
            raise ExportError(
                f"the {family.denoiser} of '{source}' takes latents of {taken} channels, and "
                f"{what} {given}; choose a text-to-image model (one for inpainting takes more)"
            )


def _read_scheduler(source: str, folder: Path, kind: str) -> dict[str, Any]:
    """Read the scheduler's configuration, and try whether the device has a sampler for it."""
    config = _read_settings(folder / "scheduler" / "scheduler_config.json")
    if kind in REPLACED:
        config = {key: value for key, value in config.items() if key in OF_THE_PATH}
        kind = SOLVER
    config["_class_name"] = kind
    try:
        make_sampler(config, steps=2)
    except BundleError as err:
        raise ExportError(f"'{source}' cannot be sampled: {err}") from err
    return config


def _read_vae(folder: Path, kind: str | None = None) -> dict[str, Any]:
    config = _read_settings(folder / "config.json")
    config["_class_name"] = kind or config.get("_class_name")
    if config["_class_name"] not in VAES:
        raise ExportError(
            f"the autoencoder in '{folder}' is a {config['_class_name']}, which the device cannot "
            f"run; supported: {', '.join(VAES)}"
        )
    if not (config.get("block_out_channels") or config.get("decoder_block_out_channels")):
        raise ExportError(
            f"the autoencoder in '{folder}' does not say its block_out_channels; fetch or train it "
            "again"
        )
    if config.get("latents_mean") is not None:
        raise ExportError(
            f"the autoencoder in '{folder}' has latents_mean, which the device does not undo; "
            "choose another with --vae"
        )
    return config


def _read_settings(file: Path) -> dict[str, Any]:
    """Read a configuration whose numbers are numbers; raises ExportError."""
    config = read_json(file)
    for key in (*COUNTS, *NUMBERS):
        value = config.get(key)
        sides = value if isinstance(value, list) and value else [value]  # height and width
        count = all(type(side) is int and side > 0 for side in sides)
        number = (isinstance(value, float) and math.isfinite(value)) or type(value) is int
        if value is not None and not (count if key in COUNTS else number):
            kind = "whole number above 0" if key in COUNTS else "number"
            raise ExportError(
                f"'{file}' says {key}={value!r}, which must be a {kind}; fetch or train the model "
                "again"
            )
    return config


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
    _check_critic(folder, spec, int(config["width"]))
    if len(spec.get("text_probe", {}).get("state", ())) != config["width"]:
        raise ExportError(
            f"the router.json in '{folder}' has no text_probe to know its text encoder by; "
            "train it again with cloud-server train-router"
        )
    return RouterFolder(folder, int(config["width"]), spec)


def _check_critic(folder: Path, spec: Mapping[str, Any], width: int) -> None:
    """Refuse a critic of router.json, if it speaks of one, that is not there whole."""
    critic = spec.get("critic")
    if critic is None:
        return
    try:
        names = [critic["clip"]["name"], critic["clip"]["digest"], *(critic["others"] or ())]
        numbers = [critic["sharpness"], *critic["score_digest"]]
        with safe_open(folder / CRITIC_WEIGHTS, "np") as weights:
            shape = weights.get_slice("weight").get_shape()
        typed = all(isinstance(name, str) for name in names) and all(
            isinstance(number, int | float) for number in numbers
        )
    except (KeyError, TypeError, OSError, SafetensorError):
        typed, shape = False, []
    if not typed or shape != [len(spec["metrics"]), 2 * width + 1]:
        raise ExportError(
            f"the router in '{folder}' speaks of a critic that is not there whole, or of another "
            "router; train it again with cloud-server train-router"
        )


def _folder_of(source: str, parts: Sequence[str]) -> Path:
    """Return the folder `source`, or that where `parts` of the hub id `source` are kept."""
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.fullmatch(source):
        raise ExportError(f"there is no folder '{source}'; pass a diffusers folder or a hub id")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return _fetch(source, parts)
    except (HfHubHTTPError, HFValidationError, OSError) as err:
        raise ExportError(
            f"'{source}' is no folder here and could not be fetched as a hub id "
            f"({type(err).__name__}); check the name and the network, or pass a folder"
        ) from err


def _fetch(source: str, parts: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        files = wanted(HfApi().list_repo_files(source), parts)
    except OSError as err:  # no network, or no answer: then what was fetched before
        try:
            return Path(snapshot_download(source, local_files_only=True))
        except LocalEntryNotFoundError:
            raise err from None
    return Path(snapshot_download(source, allow_patterns=files))
