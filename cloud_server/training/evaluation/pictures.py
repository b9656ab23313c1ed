"""Pictures that labelling kept, found again: to be shown, and to be read by another judge."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from cloud_server.errors import ModelError
from cloud_server.training.labels.work import noise, seed_of
from cloud_server.training.starter.captions import read_scene
from cloud_server.training.starter.judge import Judge
from cloud_server.training.starter.reading import objects_right

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

BATCH = 64


@dataclass(frozen=True, slots=True)
class Kept:
    """Pictures in `folder`, below the digests of the two models in the order edge, cloud."""

    folder: Path
    digests: tuple[str, str]
    prompts: Sequence[str]

    def file(self, model: int, row: int, seed: int) -> Path:
        """Return where the picture that a model drew of prompt number `row` is kept.

        Labels may have been joined or sorted since: the prompt's own number when it was drawn is
        whatever its file says.
        """
        name = hashlib.sha256(self.prompts[row].encode()).hexdigest()[:16]
        drawn = self.folder / self.digests[model][:12]
        usual = drawn / f"{name}-{noise(row, seed)}.png"
        if usual.is_file():
            return usual
        kept = sorted(drawn.glob(f"{name}-*.png"))
        return next((file for file in kept if seed_of(_noise_of(file)) == seed), usual)

    def whole(self, row: int, seeds: Sequence[int]) -> bool:
        """Tell whether both models' pictures of a prompt are kept, of all seeds."""
        return all(None not in self.pair(row, seed) for seed in seeds)

    def pair(self, row: int, seed: int) -> tuple[Path | None, Path | None]:
        """Return both models' pictures of a prompt, None for one that is not kept."""
        edge, cloud = (self.file(model, row, seed) for model in (0, 1))
        return edge if edge.is_file() else None, cloud if cloud.is_file() else None


def _noise_of(file: Path) -> int:
    number = file.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def judged_gain(judge: Judge, kept: Kept, rows: Rows, seeds: Sequence[int]) -> Floats:
    """Return how many more of the objects asked for the judge finds in the cloud's pictures.

    It is a share of the objects, on average over the cloud's pictures of a prompt, beside each of
    the edge's (N, seeds); NaN for prompts that are not among `rows`. Raises ModelError for a prompt
    of another world, and for a picture that is missing.
    """
    gain = np.full((len(kept.prompts), len(seeds)), np.nan)
    scenes = {int(row): read_scene(kept.prompts[row]) for row in rows}
    strange = [row for row, scene in scenes.items() if scene is None]
    if strange:
        raise ModelError(
            f"the judge knows the starter world only, and {kept.prompts[strange[0]]!r} asks for "
            "nothing of it; pass --judge-scores with the scores of a judge that can read it"
        )
    keys = [(model, row, seed) for model in (0, 1) for row in scenes for seed in seeds]
    right = []
    for start in tqdm(range(0, len(keys), BATCH), desc="judge", leave=False):
        part = keys[start : start + BATCH]
        readings = judge.read(np.stack([_opened(kept.file(*key)) for key in part]))
        for (_, row, _), reading in zip(part, readings, strict=True):
            scene = scenes[row]
            assert scene is not None  # checked above
            right.append(objects_right(scene, reading))
    edge, cloud = np.array(right).reshape(2, len(scenes), len(seeds))
    gain[list(scenes)] = cloud.mean(1, keepdims=True) - edge
    return gain


def _opened(file: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ModelError(
            f"the picture {file} cannot be read ({error.strerror or error}); label with "
            "--pictures and this folder, or leave the judge away"
        ) from error
