"""The judge: what it is taught is true, it learns, and a folder reads as what was saved."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cloud_server.training.loop import Budget
from cloud_server.training.starter import judge as judge_module
from cloud_server.training.starter import scenes
from cloud_server.training.starter.autoencoder import to_tensor
from cloud_server.training.starter.judge import (
    CELLS,
    SIDE,
    Detector,
    Judge,
    Vocabulary,
    _batch,
    _loss,
    mean_shares,
    train_judge,
)

needs_font = pytest.mark.skipif(
    not any(path.exists() for path in scenes.FONT_PATHS),
    reason="drawing scenes needs the Debian package fonts-noto-color-emoji",
)
VOCABULARY = Vocabulary()


def perfect_maps(objects: np.ndarray, count: int) -> torch.Tensor:
    """Return maps (B, C, 32, 32) that say what objects (N, 6) are, and nothing else."""
    channels = SIDE + 1 + len(VOCABULARY.nouns) + len(VOCABULARY.colours)
    maps = torch.zeros(count, channels, CELLS, CELLS)
    maps[:, 0] = -20.0
    for picture, x, y, side, noun, colour in objects.tolist():
        column, row = round(x * CELLS), round(y * CELLS)
        maps[int(picture), 0, row, column] = 20.0
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                cell = maps[int(picture), :, row + dy, column + dx]
                cell[1:SIDE] = torch.tensor([x * CELLS - column - dx, y * CELLS - row - dy])
                cell[SIDE] = float(np.log(side * CELLS))
                cell[SIDE + 1 + int(noun)] = 20.0
                cell[SIDE + 1 + len(VOCABULARY.nouns) + int(colour)] = 20.0
    return maps


class Told(torch.nn.Module):
    """Stands for a detector; says what it was told."""

    def __init__(self, maps: torch.Tensor, places: torch.Tensor) -> None:
        super().__init__()
        self.maps, self.places = maps, places

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.maps.clone(), self.places


def place_logits(places: np.ndarray) -> torch.Tensor:
    known = torch.from_numpy(places).clamp(min=0)
    return 20.0 * torch.nn.functional.one_hot(known, len(VOCABULARY.places)).float()


def test_the_network_stays_small():
    assert sum(p.numel() for p in Detector(VOCABULARY).parameters()) < 4e6


@needs_font
def test_a_batch_depends_on_seed_and_step_alone():
    first, again, other = (_batch(3, step, 8) for step in (5, 5, 6))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != other[0]).any()
    pictures, objects, places = first
    assert pictures.shape == (8, 128, 128, 3)
    assert pictures.dtype == np.uint8
    assert len(places) == 8
    assert set(objects[:, 0]) == set(range(8))


@needs_font
def test_what_is_taught_is_what_is_read(monkeypatch):
    """Maps that the loss finds nothing wrong with are read as the scenes that they come from."""
    monkeypatch.setattr(judge_module, "SPOILED", 0.0)
    pictures, objects, places = _batch(0, 0, 16)
    _, truths = judge_module._scenes(np.random.default_rng([0, 0, 0]), 16)
    maps, logits = perfect_maps(objects, 16), place_logits(places)
    truth = torch.from_numpy(objects), torch.from_numpy(places)
    loss, _ = _loss(maps, logits, *truth, VOCABULARY)
    assert loss.item() < 1e-3
    readings = Judge(Told(maps, logits), VOCABULARY, "cpu").read(pictures)
    assert set(mean_shares(truths, readings).values()) == {1.0}
    for scene, reading in zip(truths, readings, strict=True):
        boxes = sorted(tuple(np.round(found.box, 5)) for found in reading.objects)
        np.testing.assert_allclose(boxes, sorted(scene.boxes), atol=1e-5)


def test_a_second_peak_within_an_object_is_no_second_object():
    objects = np.array([[0, 0.5, 0.5, 0.5, 3, 0]], np.float32)
    maps = perfect_maps(objects, 1)
    maps[0, :, 20, 18], maps[0, 0, 20, 18] = maps[0, :, 16, 16].clone(), 5.0
    (reading,) = Judge(Told(maps, torch.zeros(1, 10)), VOCABULARY, "cpu").read(
        np.zeros((1, 128, 128, 3), np.uint8)
    )
    assert [found.noun for found in reading.objects] == [VOCABULARY.nouns[3]]


@needs_font
def test_shifts_move_objects_with_the_picture():
    scene = scenes.sample_scene(np.random.default_rng(1), objects=1)
    picture = scenes.draw(scene, np.random.default_rng(1))
    for seed in range(6):
        spoiled, shift = judge_module._spoiled(picture, np.random.default_rng(seed))
        assert spoiled.shape == picture.shape
        assert spoiled.dtype == np.uint8
        assert (np.abs(shift) * 128 <= judge_module.SHIFT).all()
        dx, dy = (shift * 128).astype(int)
        rows, columns = np.arange(32, 96) + dy, np.arange(32, 96) + dx
        there = spoiled[rows][:, columns].astype(float)
        assert np.corrcoef(there.ravel(), picture[32:96, 32:96].ravel())[0, 1] > 0.5


@needs_font
def test_it_learns_a_few_pictures_by_heart():
    torch.manual_seed(0)
    model = Detector(VOCABULARY)
    pictures, objects, places = _batch(0, 0, 4)
    inputs, truth = to_tensor(pictures), (torch.from_numpy(objects), torch.from_numpy(places))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss, _ = _loss(*model(inputs), *truth, VOCABULARY)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@needs_font
def test_training_writes_a_folder_that_reads_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge_module, "BATCH", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(judge_module, "FRESH", 4)
    monkeypatch.setattr(judge_module, "THRESHOLD", 0.0)
    for steps in (1, 2):
        train_judge(tmp_path / "judge", tmp_path, Budget(steps=steps), 0, "cpu")
    assert "right on 4 fresh scenes" in capsys.readouterr().out
    assert {f.name for f in tmp_path.iterdir()} == {"judge", "judge.pt"}
    weights = load_file(tmp_path / "judge" / "judge.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16, torch.int64}
    judge = Judge.open(tmp_path / "judge")
    judge.save(tmp_path / "copy")
    pictures = _batch(9, 0, 4)[0]
    read = judge.read(pictures)
    assert read == Judge.open(tmp_path / "copy").read(pictures)
    assert all(reading.objects for reading in read)


def test_a_judge_reads_by_the_names_in_its_own_folder(tmp_path):
    own = Vocabulary(("cat", "dog"), (None, "red"), ("on grass",))
    Judge(Detector(own), own, "cpu").save(tmp_path / "judge")
    assert Judge.open(tmp_path / "judge").vocabulary == own
    names = json.loads((tmp_path / "judge" / "config.json").read_text(encoding="utf-8"))
    assert names["colours"] == [None, "red"]


def test_a_missing_judge_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-starter judge"):
        Judge.open(tmp_path / "none")
