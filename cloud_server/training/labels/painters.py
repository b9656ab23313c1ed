"""Who draws what is labelled: a pipeline of diffusers, and pictures that are kept in a folder.

Painters are light until they draw, so that every worker process can be given a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image as images

from cloud_server.engine import card_of, check_model, load_pipeline, own_defaults
from cloud_server.errors import DrawError, ModelError
from cloud_server.training.digest import folder_digest

if TYPE_CHECKING:
    from PIL.Image import Image


class Painter(Protocol):
    """A model that draws several prompts at once."""

    @property
    def name(self) -> str:
        """What people call the model."""
        ...

    @property
    def digest(self) -> str:
        """What tells this model and its settings from any other."""
        ...

    @property
    def settings(self) -> Mapping[str, float]:
        """What it draws with: width and height in pixels, steps, guidance."""
        ...

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Return a picture per prompt; its noise depends on its own seed alone."""
        ...


class PipelinePainter:
    """A text-to-image pipeline of diffusers, a folder or a hub id, drawing with its own defaults.

    It draws in bfloat16, as a server on a GPU does, but on a processor without instructions for it.
    A hub's model is downloaded at once, all are loaded by the first picture. Raises ModelError.
    """

    def __init__(self, model: str | Path, device: str = "cpu") -> None:
        source = check_model(str(model))
        self.model, self.device = str(model), device
        self._folder = source if isinstance(source, Path) else _download(source)
        self.name = source.resolve().name if isinstance(source, Path) else source

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.device)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over weights and settings."""
        return folder_digest(self._folder)

    @cached_property
    def settings(self) -> Mapping[str, float]:
        """What it draws with: width and height in pixels, steps, guidance."""
        if own := own_defaults(self._folder):
            return own
        card = card_of(self._pipeline, self._folder)
        names = ("width", "height", "steps", "guidance")
        return {name: getattr(card, name) for name in names}

    @cached_property
    def _pipeline(self) -> Any:
        import torch

        pipeline = load_pipeline(self._folder, torch.float32)
        if hasattr(pipeline, "unet"):
            pipeline.unet.to(memory_format=torch.channels_last)
        return pipeline.to(self.device)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Return a picture per prompt, from noise of the CPU so that devices agree."""
        import torch

        from cloud_server.training.precision import autocast

        asked = {
            "width": self.settings["width"],
            "height": self.settings["height"],
            "num_inference_steps": self.settings["steps"],
            "guidance_scale": self.settings["guidance"],
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        }
        accepted = inspect.signature(self._pipeline.__call__).parameters
        try:
            with torch.inference_mode(), autocast(self.device):
                drawn = self._pipeline(
                    list(prompts), **{k: v for k, v in asked.items() if k in accepted}
                )
        except (RuntimeError, ValueError, TypeError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DrawError(
                f"{self.name} could not draw {len(prompts)} pictures at once: {said}; "
                "if memory is short, lower --batch"
            ) from error
        withheld = getattr(drawn, "nsfw_content_detected", None) or ()
        for prompt, hidden in zip(prompts, withheld, strict=False):
            if hidden:
                raise DrawError(
                    f"the safety checker of {self.name} withheld the picture of {prompt!r}, which "
                    "would be labelled black; leave the prompt out"
                )
        pictures: list[Image] = drawn.images
        return pictures


class KeptPainter:
    """A painter that keeps its pictures below a folder, and draws only those that are not there.

    They are called MODEL/PROMPT-SEED.png: 12 digits of the painter's digest, 16 of the prompt's
    SHA-256, and the seed. A picture takes its name only when it is complete.
    """

    def __init__(self, painter: Painter, folder: Path) -> None:
        self._painter, self._folder = painter, folder
        self.name, self.digest = painter.name, painter.digest

    @property
    def settings(self) -> Mapping[str, float]:
        """What it draws with."""
        return self._painter.settings

    def file(self, prompt: str, seed: int) -> Path:
        """Return where the picture of a prompt lies, or will."""
        known = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        return self._folder / self.digest[:12] / f"{known}-{seed}.png"

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Return a picture per prompt, as its file has it."""
        asked = list(zip(prompts, seeds, strict=True))
        found = {key: kept for key in asked if (kept := _opened(self.file(*key)))}
        missing = [key for key in asked if key not in found]
        if missing:
            drawn = self._painter.draw(*zip(*missing, strict=True))
            for key, picture in zip(missing, drawn, strict=True):
                _keep(self.file(*key), picture)
                found[key] = picture
        return [found[key] for key in asked]


def _opened(file: Path) -> Image | None:
    """Return the picture in a file; None where there is none or not a whole one."""
    try:
        with images.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None  # it is drawn again


def _keep(file: Path, picture: Image) -> None:
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, format="PNG")
        os.replace(partial, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DrawError(f"cannot keep the picture {file}: {error.strerror or error}") from error


def _download(hub_id: str) -> Path:
    """Return the folder that holds a hub's model here, fetched if need be."""
    from cloud_server.torchvision_guard import guard

    guard()
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id))
    # What can go wrong between here and a hub belongs to several libraries.
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot fetch {hub_id}: {said}; check the id, the network and HF_HUB_OFFLINE"
        ) from error
