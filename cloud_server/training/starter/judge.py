"""The judge: a small detector that reads objects, colours, numbers and places from a picture.

It evaluates what the starter models draw, and nothing is trained with it. It shares neither weights
nor data order with them, so that it can contradict the CLIP that the router's labels come from.
Centres are found in a heatmap (Zhou et al. 2019, "Objects as points"), one for all nouns; noun,
colour and box are read where a centre is.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cloud_server.errors import ModelError
from cloud_server.training.loop import Budget, Prefetch, fit
from cloud_server.training.precision import autocast
from cloud_server.training.starter.autoencoder import to_tensor
from cloud_server.training.starter.degradations import degrade
from cloud_server.training.starter.reading import Found, Reading, shares
from cloud_server.training.starter.scenes import (
    COLOURS,
    NOUNS,
    PLACES,
    Pixels,
    Scene,
    draw,
    sample_scene,
)
from cloud_server.training.weights import save_weights

BATCH = {"cpu": 64, "cuda": 256}
FRESH = 256  # scenes that a checkpoint is measured on
CELLS = 32  # a side of the heatmap; centres of boxes lie on its grid
UNSEEN = 0.25  # share of scenes whose pairings the models never see: the judge must know them too
SPOILED = 0.6  # share of pictures that are made less than perfect
# What spoils a picture and leaves true what the scene says of it.
HARMLESS = ("Definition", "Detail", "Clarity", "Sharpness", "Realism")
SHIFT = 5  # pixels
THRESHOLD = 0.3  # of a centre
APART = 0.4  # of the larger side: nearer centres are one object
OFFSET, SIDE = slice(1, 3), 3  # channels; channel 0 is the heatmap


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a judge tells apart; its first colour, None, stands for a thing's own colours."""

    nouns: tuple[str, ...] = NOUNS
    colours: tuple[str | None, ...] = (None, *COLOURS)
    places: tuple[str, ...] = tuple(PLACES)


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.around = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.around(x) + self.norms[1](self.second(inner)))


class Detector(nn.Module):
    """Pictures (B, 3, 128, 128) in [-1, 1] to maps (B, C, 32, 32) and place logits (B, places).

    The channels of a map: centre, offset x and y in cells, log of the side in cells, nouns,
    colours. 3.5 M parameters.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, 2, 2)
        self.fine = nn.Sequential(Block(32, 64, 2), Block(64, 64))  # (B, 64, 32, 32)
        self.middle = nn.Sequential(Block(64, 128, 2), Block(128, 128))  # (B, 128, 16, 16)
        self.coarse = nn.Sequential(Block(128, 256, 2), Block(256, 256))  # (B, 256, 8, 8)
        self.from_coarse = nn.Conv2d(256, 128, 1)
        self.join_middle = Block(128, 128)
        self.from_fine = nn.Conv2d(64, 128, 1)
        self.join_fine = Block(128, 128)
        channels = SIDE + 1 + len(vocabulary.nouns) + len(vocabulary.colours)
        self.head = nn.Conv2d(128, channels, 1)
        self.place = nn.Linear(256, len(vocabulary.places))
        with torch.no_grad():
            assert self.head.bias is not None
            self.head.bias[0] = -4.0  # few cells are a centre

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(F.relu(self.stem(pictures)))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        joined = self.join_middle(middle + F.interpolate(self.from_coarse(coarse), scale_factor=2))
        joined = self.join_fine(self.from_fine(fine) + F.interpolate(joined, scale_factor=2))
        return self.head(joined), self.place(coarse.mean((2, 3)))


def train_judge(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Train a judge from nothing and write it to the folder `out`; a killed run resumes."""
    torch.manual_seed(seed)
    vocabulary = Vocabulary()
    model = Detector(vocabulary)
    kind = torch.device(device).type
    data = Prefetch(lambda step: _batch(seed, step, BATCH[kind]), device)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures, objects, places = data(step)
        inputs = to_tensor(pictures, device)
        with autocast(kind):
            maps, guesses = model(inputs)
        truth = torch.as_tensor(objects).to(device), torch.as_tensor(places).to(device)
        return _loss(maps.float(), guesses.float(), *truth, vocabulary)

    def save(ready: nn.Module) -> None:
        assert isinstance(ready, Detector)
        judge = Judge(ready, vocabulary, device)
        judge.save(out)
        pictures, scenes = _scenes(np.random.default_rng([seed, 1]), FRESH)
        right = shares(scenes, judge.read(pictures))
        known = {name: values[~np.isnan(values)] for name, values in right.items()}
        shown = ", ".join(f"{k} {v.mean():.1%}" for k, v in known.items() if len(v))
        print(f"\njudge: {shown} right on {FRESH} fresh scenes", flush=True)

    fit(
        "judge", model, loss_fn, lr=2e-3, budget=budget, work=work, device=device,
        ema=0.998, warmup=100, weight_decay=0.02, on_checkpoint=save, about={"seed": seed},
    )  # fmt: skip


def _scenes(rng: np.random.Generator, count: int) -> tuple[Pixels, list[Scene]]:
    """Return pictures (B, 128, 128, 3) and their scenes, seen and unseen pairings."""
    scenes = [sample_scene(rng, unseen=bool(rng.random() < UNSEEN)) for _ in range(count)]
    return np.stack([draw(scene, rng) for scene in scenes]), scenes


def _batch(seed: int, step: int, count: int) -> tuple[Pixels, np.ndarray, np.ndarray]:
    """Return pictures (B, 128, 128, 3), objects (N, 6) and places (B,), -1 where none is named.

    An object is (picture, x, y, side, noun, colour), its centre and side in 0..1.
    """
    rng = np.random.default_rng([seed, 0, step])
    pictures, scenes = _scenes(rng, count)
    objects, places = [], []
    for index, scene in enumerate(scenes):
        shift = np.zeros(2)
        if rng.random() < SPOILED:
            pictures[index], shift = _spoiled(pictures[index], rng)
        groups = [group for group in scene.groups for _ in range(group.count)]
        for group, (x0, y0, x1, y1) in zip(groups, scene.boxes, strict=True):
            x, y = (x0 + x1) / 2 + shift[0], (y0 + y1) / 2 + shift[1]
            colour = _COLOUR_IDS[group.colour]
            objects.append((index, x, y, x1 - x0, _NOUN_IDS[group.noun], colour))
        places.append(_PLACE_IDS[scene.place])
    return pictures, np.array(objects, np.float32), np.array(places)


_NOUN_IDS = {noun: i for i, noun in enumerate(NOUNS)}
_COLOUR_IDS = {colour: i for i, colour in enumerate((None, *COLOURS))}
_PLACE_IDS = {place: i for i, place in enumerate((None, *PLACES), start=-1)}


def _spoiled(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, np.ndarray]:
    """Return a picture that is shifted, softened or degraded, and its shift (x, y) in 0..1.

    A model's pictures are soft and off the grid; what they show must still be read.
    """
    size = picture.shape[0]
    shift = rng.integers(-SHIFT, SHIFT + 1, 2)
    columns, rows = (np.clip(np.arange(size) - by, 0, size - 1) for by in shift)
    picture = picture[rows][:, columns]
    if rng.random() < 0.5:
        metric = HARMLESS[rng.integers(len(HARMLESS))]
        unit = picture.astype(np.float32) / np.float32(255)
        spoiled = degrade(unit, metric, rng.random(), rng) * np.float32(255)
    else:
        small = round(size / rng.uniform(1.2, 3.5))
        image = Image.fromarray(picture).resize((small, small), Image.Resampling.BICUBIC)
        spoiled = np.array(image.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        spoiled += rng.normal(0, rng.uniform(0, 8), picture.shape)
    return spoiled.round().clip(0, 255).astype(np.uint8), shift / size


def _loss(
    maps: Tensor, guesses: Tensor, objects: Tensor, places: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of maps (B, C, 32, 32) and place logits (B, places), and what to show."""
    picture = objects[:, 0].long()
    cell = (objects[:, 1:3] * CELLS).round().long().clamp(0, CELLS - 1)  # (N, 2), x and y
    axis = torch.arange(CELLS, device=maps.device)
    far = (axis - cell[:, :1]).square()[:, None] + (axis - cell[:, 1:]).square()[:, :, None]
    spread = (objects[:, 3] * CELLS / 6).view(-1, 1, 1)
    humps = torch.exp(-far / (2 * spread.square()))  # (N, 32, 32), 1 at the centre
    wanted = torch.zeros_like(maps[:, 0]).index_add(0, picture, humps).clamp(max=1)
    chance = maps[:, 0].sigmoid()
    hit = F.logsigmoid(maps[:, 0]) * (1 - chance).square() * (wanted == 1)
    miss = F.logsigmoid(-maps[:, 0]) * chance.square() * (1 - wanted).pow(4)
    centres = -(hit + miss).sum() / len(objects)

    # Noun, colour and box are asked of the nine cells around a centre.
    near = torch.cartesian_prod(*(torch.arange(-1, 2, device=maps.device),) * 2)  # (9, 2)
    at = (cell[:, None] + near).clamp(0, CELLS - 1)  # (N, 9, 2)
    read = maps[picture[:, None], :, at[..., 1], at[..., 0]].flatten(0, 1)  # (9N, C)
    nouns, colours = read[:, SIDE + 1 :].split((len(vocabulary.nouns), len(vocabulary.colours)), 1)
    true = objects.repeat_interleave(9, 0)
    noun = F.cross_entropy(nouns, true[:, 4].long())
    colour = F.cross_entropy(colours, true[:, 5].long())
    offset = F.l1_loss(read[:, OFFSET], true[:, 1:3] * CELLS - at.flatten(0, 1))
    side = F.l1_loss(read[:, SIDE], (true[:, 3] * CELLS).log())
    # A sum over no place would be a mean of nothing.
    named = F.cross_entropy(guesses, places, ignore_index=-1, reduction="sum")
    place = named / (places >= 0).sum().clamp(min=1)
    parts = {"centres": centres, "noun": noun, "colour": colour, "place": place}
    shown = {name: part.item() for name, part in parts.items()}
    return centres + noun + colour + 0.3 * offset + side + 0.5 * place, shown


class Judge:
    """A trained detector, ready to read pictures."""

    def __init__(self, detector: Detector, vocabulary: Vocabulary, device: str) -> None:
        self.vocabulary = vocabulary
        self._detector, self._device = detector.to(device).eval(), device

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> Self:
        """Read what `save` wrote; ModelError, saying what to do, where there is none."""
        config = folder / "config.json"
        if not config.is_file():
            raise ModelError(
                f"there is no judge in '{folder}'; train one with cloud-server train-starter judge"
            )
        try:
            names = {k: tuple(v) for k, v in json.loads(config.read_text(encoding="utf-8")).items()}
            vocabulary = Vocabulary(**names)
            detector = Detector(vocabulary)
            detector.load_state_dict(load_file(folder / "judge.safetensors"))
        except (
            OSError,
            ValueError,
            TypeError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as err:
            raise ModelError(
                f"the judge in '{folder}' is damaged ({str(err).splitlines()[0]}); train it again "
                "with cloud-server train-starter judge"
            ) from err
        return cls(detector, vocabulary, device)

    def save(self, folder: Path) -> None:
        """Write half-precision weights and config.json, replacing `folder` as a whole."""
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {
            name: (value.half() if value.is_floating_point() else value).contiguous().cpu()
            for name, value in self._detector.state_dict().items()
        }
        save_weights(weights, partial / "judge.safetensors")
        v = self.vocabulary
        names = {"nouns": v.nouns, "colours": v.colours, "places": v.places}
        (partial / "config.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)

    @torch.inference_mode()
    def read(self, pictures: Pixels, batch: int = 64) -> list[Reading]:
        """Return what is in pictures (B, 128, 128, 3)."""
        readings: list[Reading] = []
        for start in range(0, len(pictures), batch):
            inputs = to_tensor(pictures[start : start + batch], self._device)
            maps, places = self._detector(inputs)
            chance = maps[:, 0].sigmoid()
            peak = chance == F.max_pool2d(chance[:, None], 3, 1, 1)[:, 0]
            maps[:, 0] = chance * peak
            readings += [
                self._reading(one, self.vocabulary.places[place])
                for one, place in zip(
                    maps.cpu().double().numpy(), places.argmax(1).tolist(), strict=True
                )
            ]
        return readings

    def _reading(self, maps: np.ndarray, place: str) -> Reading:
        """Read maps (C, 32, 32) whose first channel holds the peaks, the surest first."""
        rows, columns = np.nonzero(maps[0] > THRESHOLD)
        found: list[Found] = []
        nouns = len(self.vocabulary.nouns)
        for k in np.argsort(-maps[0, rows, columns], kind="stable"):
            cell = maps[:, rows[k], columns[k]]
            x, y = ((np.array([columns[k], rows[k]]) + cell[OFFSET]) / CELLS).tolist()
            half = float(np.exp(cell[SIDE])) / CELLS / 2
            noun, colour = cell[SIDE + 1 :][:nouns].argmax(), cell[SIDE + 1 + nouns :].argmax()
            one = Found(
                self.vocabulary.nouns[noun],
                self.vocabulary.colours[colour],
                (x - half, y - half, x + half, y + half),
                float(cell[0]),
            )
            if all(_apart(one, other) for other in found):
                found.append(one)
        return Reading(tuple(found), place)


def _apart(one: Found, other: Found) -> bool:
    distance = np.hypot(*np.subtract(one.centre, other.centre))
    return bool(distance > APART * max(f.box[2] - f.box[0] for f in (one, other)))
