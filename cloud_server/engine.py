"""The large model behind the service: any text-to-image pipeline of diffusers.

Torch and diffusers are imported when a model is loaded, so that everything around it stays quick.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cloud_server.errors import DrawError, ModelError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

MAX_STEPS = 200
MAX_GUIDANCE = 30.0
_TELLING = 64  # values of a tensor
_FOREIGN_STEPS = 20
_FOREIGN_GUIDANCE = 7.5
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Card:
    """What a model is called, draws by default and accepts; sizes in pixels.

    `digest` is another one where the weights are others, empty where that is not known.
    """

    name: str
    width: int
    height: int
    steps: int
    guidance: float
    min_size: int
    max_size: int
    size_multiple: int = 8
    max_steps: int = MAX_STEPS
    max_guidance: float = MAX_GUIDANCE
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """One picture to draw, every setting decided."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float


class Stopped(Exception):
    """The one who asked has left; raised out of `Engine.draw`."""


class Engine(Protocol):
    """A model that draws. One thread at a time calls it, so it need not be safe for more."""

    @property
    def card(self) -> Card:
        """Name, defaults and limits."""

    def draw(
        self,
        order: Order,
        on_step: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Image:
        """Draw `order`, calling `on_step(index, total)` after each step.

        Raises Stopped within one step of `cancelled()` turning true, DrawError if it cannot draw.
        """


class DiffusersEngine:
    """A diffusers pipeline as an `Engine`; float32 on the CPU, half precision on CUDA."""

    def __init__(self, pipeline: Any, card: Card) -> None:
        self._pipeline = pipeline
        self._accepts = frozenset(inspect.signature(pipeline.__call__).parameters)
        self._card = card

    @classmethod
    def load(
        cls, model: str, *, device: str = "auto", threads: int | None = None
    ) -> DiffusersEngine:
        """Load `model`, a folder or hub id, on `device` (auto, cpu, cuda:N) and draw one step.

        Raises ModelError if there is no such model, it draws from no text, or the device is
        not there.
        """
        source = check_model(model)
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        where = pick_device(device)
        pipeline = load_pipeline(source, _precision(where))
        engine = cls(pipeline.to(where), card_of(pipeline, source))
        engine._warm_up()
        return engine

    @property
    def card(self) -> Card:
        """Name, defaults and limits."""
        return self._card

    def draw(
        self,
        order: Order,
        on_step: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Image:
        """Draw `order` as `Engine.draw` says; the same order gives the same picture."""
        import torch

        def after_step(
            pipe: Any, index: int, _timestep: Any, kept: dict[str, Any]
        ) -> dict[str, Any]:
            if cancelled():
                raise Stopped
            # Some schedulers (Heun, PNDM) call their model more often than the steps asked for.
            on_step(index + 1, max(index + 1, getattr(pipe, "num_timesteps", order.steps)))
            return kept

        if cancelled():
            raise Stopped
        asked = {
            "prompt": order.prompt,
            "negative_prompt": order.negative_prompt or None,
            "width": order.width,
            "height": order.height,
            "num_inference_steps": order.steps,
            "guidance_scale": order.guidance,
            # The noise is drawn on the CPU so that a seed means the same picture on every device.
            "generator": torch.Generator("cpu").manual_seed(order.seed),
            "callback_on_step_end": after_step,
            "output_type": "pil",
        }
        try:
            with torch.inference_mode():
                drawn = self._pipeline(**{k: v for k, v in asked.items() if k in self._accepts})
        except (RuntimeError, ValueError, TypeError) as error:
            raise DrawError(
                f"{self._card.name} could not draw {order.width}x{order.height}"
                f" in {order.steps} steps: {_first_line(error)}"
            ) from error
        if any(getattr(drawn, "nsfw_content_detected", None) or ()):
            raise DrawError(
                f"the safety checker of {self._card.name} withheld the picture;"
                " try another seed or prompt"
            )
        image: Image = drawn.images[0]
        return image

    def _warm_up(self) -> None:
        card = self._card
        order = Order("warm up", "", 0, card.width, card.height, 1, card.guidance)
        try:
            self.draw(order, lambda _index, _total: None, lambda: False)
        except DrawError as error:
            raise ModelError(f"{error}; is it a text-to-image model?") from error


def check_model(model: str) -> Path | str:
    """Return the folder or hub id that `model` means, raising ModelError early if it is neither."""
    try:
        folder = Path(model).expanduser()
    except RuntimeError as error:
        raise ModelError(f"there is no home for {model}; give the folder in full") from error
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"{model} holds no model_index.json; give the folder of a diffusers pipeline"
            )
        return folder
    if folder.exists():
        raise ModelError(f"{model} is a file; give the folder of a diffusers pipeline or a hub id")
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "~")):
        raise ModelError(
            f"there is no model folder {model}; give a diffusers folder or a hub id OWNER/NAME"
        )
    return model


def load_pipeline(source: Path | str, dtype: torch.dtype) -> Any:
    """Load a text-to-image pipeline of diffusers that is quiet; ModelError if it cannot be."""
    from cloud_server.torchvision_guard import guard

    guard()
    from diffusers import DiffusionPipeline  # imports one pipeline; the Auto classes, all of them
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    # Both would print the prompts that are longer than a text encoder reads.
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    local = isinstance(source, Path)
    options = {"torch_dtype": dtype, "local_files_only": local}
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(source), **options)
    # Loading runs the code of several libraries over foreign files; all of it ends in one sentence.
    except Exception as error:
        raise ModelError(
            f"cannot load {source} as a text-to-image pipeline of diffusers: {_first_line(error)}"
            + ("; check the folder" if local else "; check the id, the network and HF_HUB_OFFLINE")
        ) from error
    parameters = inspect.signature(pipeline.__call__).parameters
    if missing := {"prompt", "num_inference_steps", "callback_on_step_end"} - parameters.keys():
        raise ModelError(
            f"{source} is a {type(pipeline).__name__}, which takes no {min(missing)};"
            " give a text-to-image pipeline"
        )
    pipeline.set_progress_bar_config(disable=True)
    for name, part in pipeline.components.items():
        # "<|endoftext|>" in a prompt is a word somebody typed, not the end of it.
        if name.startswith("tokenizer") and part is not None:
            part.split_special_tokens = True
    return pipeline


def card_of(pipeline: Any, source: Path | str) -> Card:
    """Return the defaults and limits of a pipeline that was loaded from `source`."""
    core = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    scale = int(getattr(pipeline, "vae_scale_factor", 8))
    sample = getattr(getattr(core, "config", None), "sample_size", None)
    default = getattr(pipeline, "default_sample_size", None) or sample or 512 // scale
    latent_h, latent_w = default if isinstance(default, list | tuple) else (default, default)
    settings: dict[str, Any] = {
        "width": int(latent_w) * scale,
        "height": int(latent_h) * scale,
        "steps": _FOREIGN_STEPS,
        "guidance": _FOREIGN_GUIDANCE,
    } | own_defaults(source)
    longest = max(settings["width"], settings["height"])
    levels = len(getattr(getattr(core, "config", None), "down_block_types", None) or ()) or 1
    return Card(
        name="/".join(source.resolve().parts[-2:]) if isinstance(source, Path) else source,
        width=settings["width"],
        height=settings["height"],
        steps=settings["steps"],
        guidance=float(settings["guidance"]),
        min_size=min(longest, scale * 2 ** (levels - 1)),  # at least one value on the lowest level
        max_size=2 * longest,
        size_multiple=scale if scale % 8 == 0 else 8,
        digest=_digest_of(pipeline),
    )


def _digest_of(pipeline: Any) -> str:
    """Return a digest of a pipeline's weights, by the first values of each tensor.

    Reading gigabytes at every start would take longer than loading them; training changes all.
    """
    total = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        for key, value in sorted(getattr(part, "state_dict", dict)().items()):
            first = value.flatten()[:_TELLING].float().cpu().numpy().tobytes()
            total.update(f"{name}.{key} {tuple(value.shape)}\n".encode() + first)
    return total.hexdigest()


def own_defaults(source: Path | str) -> dict[str, float]:
    """Read defaults.json beside model_index.json, if the folder has one."""
    if not isinstance(source, Path) or not (source / "defaults.json").is_file():
        return {}
    path = source / "defaults.json"
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    settings: dict[str, float] = {}
    for name in ("width", "height", "steps", "guidance"):
        value: Any = read.get(name) if isinstance(read, dict) else None
        whole = name != "guidance"
        number = isinstance(value, int) if whole else isinstance(value, int | float)
        most = {"steps": MAX_STEPS, "guidance": MAX_GUIDANCE}.get(name, math.inf)
        if not number or isinstance(value, bool) or not whole <= value <= most:
            needed = "a whole number above 0" if whole else "a number from 0 on"
            needed += "" if most == math.inf else f" and at most {most:g}"
            raise ModelError(f"{path} has {name} = {value!r}; it needs {needed} there")
        settings[name] = value
    return settings


def pick_device(name: str) -> str:
    """Return the device that auto, cpu or cuda:N means; ModelError if it is not here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(name.partition(":")[2] or 0) >= count:
            raise ModelError(
                f"device {name!r} is not here ({count} CUDA devices); try --device cpu"
            )
    return name


def _precision(device: str) -> torch.dtype:
    import torch

    if not device.startswith("cuda"):
        return torch.float32
    # bfloat16 where the hardware has it: some autoencoders overflow float16.
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
