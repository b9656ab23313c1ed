"""Quality labels: both models draw the same prompts with the same seeds, CLIP scores every picture.

Scores go to a file of JSON lines, one a picture, so that a killed run continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cloud_server.torchvision_guard import guard
from cloud_server.training.quality import Metric
from cloud_server.training.starter.scenes import describe, sample_scene

guard()
from diffusers import DiffusionPipeline  # noqa: E402  the guard must come first

if TYPE_CHECKING:
    from PIL.Image import Image

SHORTENED = 0.2


class Painter(Protocol):
    """A model that draws several prompts at once."""

    @property
    def digest(self) -> str:
        """What tells this model and its settings from any other."""
        ...

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Return a picture per prompt; its noise depends on its own seed alone."""
        ...


class Scorer(Protocol):
    """What labelling needs of `QualityScorer`."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metrics, in the order of the scores."""
        ...

    def score(self, pictures: Sequence[Image], prompts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """Return the qualities (B, k) of pictures drawn for prompts, each in 0..1."""
        ...


class PipelinePainter:
    """A text-to-image pipeline of diffusers, drawing with the settings of its defaults.json.

    It draws in bfloat16, as a server on a GPU does; on a CPU that takes half the time.
    """

    def __init__(self, folder: Path, device: str) -> None:
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(pipeline, "unet"):
            pipeline.unet.to(memory_format=torch.channels_last)
        self._pipeline = pipeline.to(device)
        self._kind = torch.device(device).type
        self._settings = {"num_inference_steps": 20, "guidance_scale": 7.5}
        defaults = folder / "defaults.json"
        if defaults.exists():
            own = json.loads(defaults.read_text(encoding="utf-8"))
            self._settings = {
                "width": own["width"],
                "height": own["height"],
                "num_inference_steps": own["steps"],
                "guidance_scale": own["guidance"],
            }
        self.digest = folder_digest(folder)

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Return a picture per prompt, from noise of the CPU so that devices agree."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.autocast(self._kind, dtype=torch.bfloat16):
            drawn = self._pipeline(list(prompts), generator=generators, **self._settings)
        images: list[Image] = drawn.images
        return images


def folder_digest(folder: Path) -> str:
    """Return one SHA-256 over the weights and settings of a model folder."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".json", ".safetensors", ".txt"):
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{file.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and how many objects it asks for."""

    text: str
    objects: int


def sample_prompts(count: int, seed: int) -> list[Prompt]:
    """Return `count` different captions of scenes, one to five objects in equal numbers.

    One in five is shortened to its objects, without place, prefix or relation.
    """
    rng = np.random.default_rng(seed)
    prompts: dict[str, Prompt] = {}
    while len(prompts) < count:
        scene = sample_scene(rng, objects=len(prompts) % 5 + 1)
        if rng.random() < SHORTENED:
            scene = replace(scene, place=None, prefix="", relation=None)
        text = describe(scene)
        prompts.setdefault(text, Prompt(text, scene.objects))
    return list(prompts.values())


@dataclass(frozen=True, slots=True)
class Labels:
    """Qualities `q` (model, prompt, seed, metric), models in the order edge, cloud.

    `digest` tells these labels from those of other models, prompts, seeds or metrics.
    """

    q: NDArray[np.float64]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    digest: str


def label(
    edge: Painter,
    cloud: Painter,
    scorer: Scorer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    judge: str,
    batch: int = 16,
) -> Labels:
    """Draw and score every prompt with every seed on both models, and keep the scores in `out`.

    Both models start a picture from the same noise, which differs from prompt to prompt. `judge`
    tells the scorer's CLIP model from others. Every model has a store of its own, named by the
    digest of all that decides its labels, which is its first line: a run that was killed goes on
    with the pictures that are missing, and a new edge model leaves the cloud's labels as they are.
    """
    q, digests = [], []
    for painter in (edge, cloud):
        header = json.dumps(
            {
                "model": painter.digest,
                "judge": judge,
                "metrics": [asdict(metric) for metric in scorer.metrics],
                "prompts": list(prompts),
                "seeds": list(seeds),
            }
        )
        digest = hashlib.sha256(header.encode()).hexdigest()[:12]
        q.append(_label_one(painter, scorer, prompts, seeds, out, digest, header, batch))
        digests.append(digest)
    names = tuple(metric.name for metric in scorer.metrics)
    return Labels(np.stack(q), tuple(prompts), tuple(seeds), names, "-".join(digests))


def _label_one(
    painter: Painter,
    scorer: Scorer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    digest: str,
    header: str,
    batch: int,
) -> NDArray[np.float64]:
    """Return the qualities (prompt, seed, metric) of one model."""
    wanted = [(p, s) for p in range(len(prompts)) for s in range(len(seeds))]
    out.mkdir(parents=True, exist_ok=True)
    store = out / f"labels-{digest}.jsonl"
    done = _resume(store, header)
    missing = [key for key in wanted if key not in done]
    with (
        store.open("a", encoding="utf-8") as lines,
        tqdm(total=len(wanted), initial=len(done), desc="labels", unit="picture") as bar,
    ):
        for start in range(0, len(missing), batch):
            keys = missing[start : start + batch]
            noise = [seeds[s] * 1_000_003 + p for p, s in keys]
            asked = [prompts[p] for p, _ in keys]
            pictures = painter.draw(asked, noise)
            for key, q in zip(keys, scorer.score(pictures, asked), strict=True):
                done[key] = [round(float(value), 6) for value in q]
                lines.write(json.dumps({"at": key, "q": done[key]}) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
            bar.update(len(keys))
    shape = (len(prompts), len(seeds), len(scorer.metrics))
    return np.array([done[key] for key in wanted]).reshape(shape)


def _resume(store: Path, header: str) -> dict[tuple[int, int], list[float]]:
    """Return the scores in a store, starting it if need be and cutting off a half-written line."""
    text = store.read_text(encoding="utf-8") if store.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if not whole:
        store.write_text(header + "\n", encoding="utf-8")
        return {}
    os.truncate(store, len(whole))  # json.dumps writes ASCII: characters are bytes
    records = [json.loads(line) for line in whole.splitlines()[1:]]
    return {tuple(record["at"]): record["q"] for record in records}
