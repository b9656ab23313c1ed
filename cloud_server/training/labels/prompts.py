"""The prompts that are labelled: from a file, or captions of the starter world."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cloud_server.errors import DataError
from cloud_server.training.starter.scenes import describe, sample_scene

SHORTENED = 0.2
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


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


def read_prompts(path: Path) -> list[str]:
    """Return the different prompts in a file, in its order: one a line, blank lines left out.

    Of a .csv or .tsv file the column `prompt` is read. Raises DataError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the prompts in {path}: {error}") from error
    delimiter = _DELIMITERS.get(path.suffix.lower())
    lines = text.split("\n") if delimiter is None else _column(text, delimiter, path)
    prompts = [line.strip() for line in lines]
    if not any(prompts):
        raise DataError(f"{path} holds no prompt; write one a line")
    return list(dict.fromkeys(prompt for prompt in prompts if prompt))


def _column(text: str, delimiter: str, path: Path) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        names = rows.fieldnames or ()
        if "prompt" not in names:
            raise DataError(
                f"{path} has no column 'prompt', only {', '.join(map(repr, names)) or 'nothing'}; "
                "name the column of the prompts so"
            )
        return [row["prompt"] or "" for row in rows]
    except csv.Error as error:
        raise DataError(f"{path} is damaged at line {rows.line_num}: {error}") from error
