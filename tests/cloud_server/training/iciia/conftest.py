"""A small image folder with its manifest, and features whose classes come in clients."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cloud_server.training.iciia.learn import Cohort

COLOURS = ((220, 30, 30), (30, 200, 40), (40, 60, 220), (230, 220, 40))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Four colours, two clients of two colours each, as PNG files."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(96):
        colour, split = i % 4, ("train", "train", "val", "test")[i // 4 % 4]
        pixels = np.array(COLOURS[colour]) + rng.normal(0, 40, (40, 30, 3))
        name = f"pictures/{i}.png"
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / name)
        rows.append((name, f"colour {colour}", f"client {colour // 2}", split))
    file = tmp_path / "manifest.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("image", "label", "client", "split"), *rows])
    return file


@pytest.fixture(scope="session")
def cohort() -> Cohort:
    """40 classes that lie in pairs so near that only the client tells the two apart.

    Of each pair one belongs to even clients and one to odd ones, whose backgrounds differ too.
    """
    rng = np.random.default_rng(0)
    width, classes, people, each = 32, 40, 60, 48
    centres = np.repeat(rng.normal(0, 1, (classes // 2, width)), 2, 0)
    kind = np.arange(people * each) // each % 2
    labels = 2 * rng.integers(classes // 2, size=people * each) + kind
    features = centres[labels] + rng.normal(0, 0.15, (people * each, width))
    features[:, :4] += np.where(kind, 0.2, -0.2)[:, None]
    splits = np.array([0, 0, 1, 2], np.int8)[np.arange(people * each) % 4]
    return Cohort(
        torch.from_numpy(features).float(), labels, splits, np.arange(people * each) // each
    )
