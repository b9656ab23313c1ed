"""Labelled pictures of many clients: from a manifest and its image folder, dealt as asked for."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from cloud_server.errors import ModelError
from edge_agent.errors import PictureError
from edge_agent.recognition.pictures import Pixels, read_picture

Ints = NDArray[np.int64]
SPLITS = ("train", "val", "test", "lesson")
COLUMNS = ("image", "label", "client", "split")


@dataclass(frozen=True, slots=True)
class Samples:
    """N pictures by index; `clients` holds a client number each, (N,), by definition of client.

    Those of the split `lesson`, if any, are for the backbone alone: the module, which is to learn
    where the backbone errs, needs pictures that the backbone did not learn from.

    `draw(i)` gives the pictures of indices i, (n, side, side, 3). `lesson(step, n)` gives pictures
    and labels to train a backbone on: another batch every step, the same for the same step.
    `digest` names all of this.
    """

    classes: tuple[str, ...]
    labels: Ints
    splits: NDArray[np.int8]
    clients: Mapping[str, Ints]
    draw: Callable[[Ints], Pixels] = field(repr=False)
    lesson: Callable[[int, int], tuple[Pixels, Ints]] = field(repr=False)
    side: int
    digest: str

    def of(self, split: str) -> Ints:
        """Return the indices of a split."""
        return np.flatnonzero(self.splits == SPLITS.index(split))


def read_manifest(file: Path, side: int, crop: float = 1.0) -> Samples:
    """Read a CSV of image,label,client,split; images are files below the folder that it lies in.

    A backbone's lessons are the lines of split `lesson`, or of `train` where there are none. The
    digest knows files by name, size and time, so that others of the same names are others.
    Raises ModelError naming line and value.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise ModelError(f"the manifest {file} cannot be read ({err}); name a CSV file") from err
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = set(COLUMNS) - set(reader.fieldnames or ())
    if missing:
        raise ModelError(
            f"the manifest {file} has no column {sorted(missing)[0]!r}; its head line must name "
            f"{','.join(COLUMNS)}"
        )
    try:
        rows = [_checked(row, reader.line_num, file) for row in reader]
    except csv.Error as err:
        raise ModelError(f"line {reader.line_num} of {file} is not CSV ({err})") from err
    for split in SPLITS[:3]:
        if all(row["split"] != split for row in rows):
            raise ModelError(f"the manifest {file} has no line of split {split!r}; add some")
    classes = tuple(sorted({row["label"] for row in rows}))
    people = sorted({row["client"] for row in rows})
    files = [file.parent / row["image"] for row in rows]
    states = [(found.st_size, found.st_mtime_ns) for found in (each.stat() for each in files)]
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[row["label"]] for row in rows], np.int64)
    splits = np.array([SPLITS.index(row["split"]) for row in rows], np.int8)

    def draw(indices: Ints) -> Pixels:
        try:
            return np.stack([read_picture(files[i], side, crop) for i in indices])
        except PictureError as err:
            raise ModelError(f"{err}; or take its line out of {file}") from err

    of_split = [np.flatnonzero(splits == SPLITS.index(split)) for split in ("lesson", "train")]
    learnt = of_split[0] if len(of_split[0]) else of_split[1]

    def lesson(step: int, n: int) -> tuple[Pixels, Ints]:
        rng = np.random.default_rng((1, step))
        chosen = rng.choice(learnt, n)
        return turned(draw(chosen), random_turns(rng, n)), labels[chosen]

    return Samples(
        classes=classes,
        labels=labels,
        splits=splits,
        clients={"manifest": np.array([people.index(row["client"]) for row in rows], np.int64)},
        draw=draw,
        lesson=lesson,
        side=side,
        digest=hashlib.sha256(f"{text} {side} {crop} {states}".encode()).hexdigest(),
    )


def _checked(row: dict[str, str], number: int, file: Path) -> dict[str, str]:
    if empty := [name for name in COLUMNS if not row.get(name)]:
        raise ModelError(f"line {number} of {file} has no {empty[0]}; fill it in or remove it")
    if row["split"] not in SPLITS:
        raise ModelError(
            f"line {number} of {file} has the split {row['split']!r}; write {', '.join(SPLITS)}"
        )
    image = Path(row["image"])
    if image.is_absolute() or ".." in image.parts:
        raise ModelError(
            f"line {number} of {file} names {row['image']!r}, which lies outside the manifest's "
            "folder; images are named from there"
        )
    if not (file.parent / image).is_file():
        raise ModelError(
            f"line {number} of {file} names {row['image']!r}, and there is no such file; put it "
            "there or remove the line"
        )
    return row


def random_turns(rng: np.random.Generator, n: int) -> NDArray[np.float32]:
    """Return n small turns, shears, scalings and moves, as affine maps (n, 2, 3)."""
    angle, size = rng.uniform(-0.25, 0.25, n), rng.uniform(0.8, 1.15, n)
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    shear, (x, y) = rng.uniform(-0.2, 0.2, n), rng.uniform(-0.12, 0.12, (2, n))
    rows = np.stack([cos, shear - sin, x, sin, cos, y], 1)
    return rows.reshape(n, 2, 3).astype(np.float32)


def turned(pictures: Pixels, turns: NDArray[np.float32]) -> Pixels:
    """Return each picture moved by its own affine map."""
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    grid = F.affine_grid(torch.from_numpy(turns), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def mixed_clients(clients: Ints, splits: NDArray[np.int8], level: float, seed: int) -> Ints:
    """Return clients of a heterogeneity `level`: 1 leaves them as they are, 0 makes them all alike.

    A share `level` of each client's pictures stays; the others are pooled and dealt anew, split by
    split, so that clients keep their sizes (the paper's repository, `_to_soft`).
    """
    rng = np.random.default_rng(seed)
    mixed = clients.copy()
    for split in np.unique(splits):
        here = np.flatnonzero(splits == split)
        pooled = here[rng.random(len(here)) >= level]
        mixed[pooled] = clients[rng.permutation(pooled)]
    return mixed


def by_client(clients: Ints, indices: Ints) -> Sequence[Ints]:
    """Group indices by their client."""
    order = indices[np.argsort(clients[indices], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(clients[order])) + 1)
