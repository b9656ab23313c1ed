"""Two worlds to train a starter recogniser in: emoji in bad pictures, and Omniglot's drawings."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from cloud_server.errors import ModelError
from cloud_server.training.iciia.samples import SPLITS, Ints, Samples, random_turns, turned
from cloud_server.training.starter.scenes import FONT_PATHS, FontMissing
from edge_agent.recognition.pictures import Pixels

EMOJI_TEST: Final = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIDE: Final = 64  # of Omniglot's pictures
EMOJI_SIDE: Final = 96
# Of each class, split after split; what came later stands last, so that the rest stays as it was.
PICTURES_OF_A_CLASS: Final = (("train", 96), ("val", 6), ("test", 10), ("train", 192))
SMALLEST, NOISIEST = 0.2, 0.3  # emoji, of the side; spread of noise, of the range of pixels
CLASSES_OF_A_CLIENT: Final = 15
PICTURES_IN_A_CLIENT: Final = {"train": 6, "val": 6, "test": 5}  # of each of its classes
# A backbone knows the drawings that it learnt from by heart; a module that learnt from its answers
# to the same ones would never see it in doubt. So other people drew for the one than for the other.
DRAWERS: Final = {
    "lesson": range(1, 5),
    "train": range(5, 14),
    "val": range(14, 16),
    "test": range(16, 21),
}
VIEWS: Final = 6  # of each drawing that the module learns from
_LINE = re.compile(r"([0-9A-F ]+?)\s*; fully-qualified\s+# \S+ E[\d.]+ (.+)")
_CHUNK = 256  # pictures drawn by one generator


@dataclass(frozen=True, slots=True)
class Emoji:
    """A picture of the font: its Unicode name, the subgroup it is listed in, its character."""

    name: str
    subgroup: str
    character: str


def named_emoji(file: Path = EMOJI_TEST) -> list[Emoji]:
    """Return every emoji of one code point, in Unicode's order."""
    if not file.is_file():
        raise ModelError(f"{file} is missing; install the Debian package unicode-data")
    found, subgroup = [], ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif match := _LINE.fullmatch(line):
            points = [int(point, 16) for point in match[1].split()]
            if [point for point in points if point != 0xFE0F] == points[:1]:
                found.append(Emoji(match[2], subgroup, "".join(map(chr, points))))
    return found


def sprites(emoji: list[Emoji], side: int = EMOJI_SIDE) -> NDArray[np.uint8]:
    """Draw each emoji as RGBA, colour multiplied by opacity: (n, side, side, 4)."""
    path = next((path for path in FONT_PATHS if path.is_file()), None)
    if path is None:
        raise FontMissing
    font = ImageFont.truetype(str(path), 109)  # the one size that the font holds
    drawn = np.zeros((len(emoji), side, side, 4), np.uint8)
    for sprite, one in zip(drawn, emoji, strict=True):
        image = Image.new("RGBA", (136, 136))
        ImageDraw.Draw(image).text((0, 0), one.character, font=font, embedded_color=True)
        image = image.crop(image.getbbox() or (0, 0, 1, 1))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        pixels = np.asarray(image, np.float32)
        opacity = pixels[..., 3:] / 255
        whole = np.concatenate([pixels[..., :3] * opacity, pixels[..., 3:]], 2)
        sprite[top : top + image.height, left : left + image.width] = whole.round()
    return drawn


class EmojiWorld:
    """Emoji on random backgrounds: turned, scaled, tinted, blurred and noisy."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        named = named_emoji()
        drawn = sprites(named)
        # Where the font draws two characters alike, nobody could tell them apart.
        _, first = np.unique(drawn.reshape(len(drawn), -1), axis=0, return_index=True)
        kept = [i for i in sorted(first) if drawn[i, ..., 3].any()]
        self.emoji = [named[i] for i in kept]
        self._sprites = torch.from_numpy(drawn[kept]).permute(0, 3, 1, 2).contiguous()

    def samples(self) -> Samples:
        """Return the pictures of all splits, and clients by subgroup and by random classes."""
        c = len(self.emoji)
        counts = [n for _, n in PICTURES_OF_A_CLASS]
        labels = np.tile(np.arange(c), sum(counts))
        codes = [SPLITS.index(split) for split, _ in PICTURES_OF_A_CLASS]
        splits = np.repeat(np.array(codes, np.int8), [n * c for n in counts])
        groups = [one.subgroup for one in self.emoji]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        subgroup = np.array([numbers[name] for name in groups], np.int64)[labels]
        names = [one.name for one in self.emoji]
        about = f"emoji {self.seed} {PICTURES_OF_A_CLASS} {SMALLEST} {NOISIEST} {names}"
        return Samples(
            classes=tuple(one.name for one in self.emoji),
            labels=labels,
            splits=splits,
            clients={"subgroup": subgroup, "random": self._random_clients()},
            draw=lambda indices: self._stored(labels, indices),
            lesson=self._lesson,
            side=EMOJI_SIDE,
            digest=hashlib.sha256(about.encode()).hexdigest(),
        )

    def _random_clients(self) -> Ints:
        """Deal each split to clients of 15 random classes; no two splits share a client."""
        rng, c = np.random.default_rng((self.seed, 3)), len(self.emoji)
        clients: list[Ints] = []
        number = 0
        for split, pictures in PICTURES_OF_A_CLASS:
            for start in range(0, pictures, PICTURES_IN_A_CLIENT[split]):
                of_class = rng.permutation(c) // CLASSES_OF_A_CLIENT + number
                clients += [of_class] * min(PICTURES_IN_A_CLIENT[split], pictures - start)
                number = int(of_class.max()) + 1
        return np.concatenate(clients)

    def _stored(self, labels: Ints, indices: Ints) -> Pixels:
        # A picture depends on its chunk alone, so that any part of the world can be drawn again.
        drawn = np.empty((len(indices), EMOJI_SIDE, EMOJI_SIDE, 3), np.uint8)
        for chunk in np.unique(indices // _CHUNK):
            inside = np.flatnonzero(indices // _CHUNK == chunk)
            whole = labels[chunk * _CHUNK : (chunk + 1) * _CHUNK]
            rng = np.random.default_rng((self.seed, 1, int(chunk)))
            drawn[inside] = self.draw(whole, rng)[indices[inside] % _CHUNK]
        return drawn

    def _lesson(self, step: int, n: int) -> tuple[Pixels, Ints]:
        rng = np.random.default_rng((self.seed, 2, step))
        labels = rng.integers(len(self.emoji), size=n)
        return self.draw(labels, rng), labels

    def draw(self, labels: Ints, rng: np.random.Generator) -> Pixels:
        """Return one picture of each label, (n, 96, 96, 3)."""
        n = len(labels)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

        angle, size = uniform(-0.4, 0.4), uniform(SMALLEST, 1.0)
        cos, sin = angle.cos() / size, angle.sin() / size
        room = (1.05 - size) / size
        x, y = uniform(-1, 1) * room, uniform(-1, 1) * room
        turn = torch.stack([cos, -sin, x, sin, cos, y], 1).view(n, 2, 3)
        grid = F.affine_grid(turn, [n, 4, EMOJI_SIDE, EMOJI_SIDE], align_corners=False)
        sprite = self._sprites[torch.from_numpy(labels)].float().div_(255)
        sprite = F.grid_sample(sprite, grid, align_corners=False)
        colour, opacity = sprite[:, :3], sprite[:, 3:]
        grey = colour.mean(1, keepdim=True)
        colour = (grey + (colour - grey) * uniform(0.0, 1.0, 1, 1, 1)) * uniform(0.6, 1.2, 3, 1, 1)
        coarse, fine = uniform(0.1, 0.9, 3, 2, 2), uniform(-0.15, 0.15, 3, 8, 8)
        below = sum(
            F.interpolate(part, (EMOJI_SIDE, EMOJI_SIDE), mode="bilinear", align_corners=True)
            for part in (coarse, fine)
        )
        picture = below * (1 - opacity) + colour
        blurred = F.avg_pool2d(picture, 7, 1, 3, count_include_pad=False)
        picture = torch.lerp(picture, blurred, uniform(0.0, 1.0, 1, 1, 1))
        noise = torch.from_numpy(rng.standard_normal(picture.shape, np.float32))
        picture = picture + noise * uniform(0.0, NOISIEST, 1, 1, 1)
        whole = picture.mul(255).round().clamp(0, 255).byte()
        return whole.permute(0, 2, 3, 1).contiguous().numpy()


def omniglot(folder: Path) -> Samples:
    """Read Omniglot's two small background sets, zipped, from `folder`: one class a character.

    Splits are by drawer, the lessons' too. Clients are alphabets, or single people, each of whom
    drew one alphabet.
    """
    found: dict[tuple[str, str], dict[int, NDArray[np.uint8]]] = {}
    files = [folder / f"images_background_small{i}.zip" for i in (1, 2)]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing; fetch it from github brendenlake/omniglot")
        with _opened(file) as archive:
            for name in archive.namelist():
                if name.endswith(".png"):
                    _, alphabet, character, drawing = name.split("/")
                    image = Image.open(io.BytesIO(archive.read(name))).convert("L")
                    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
                    drawer = int(drawing.removesuffix(".png").split("_")[1])
                    # The sets share alphabets in part: drawings of both are the same files.
                    found.setdefault((alphabet, character), {})[drawer] = small
    classes = sorted(found)
    alphabets = sorted({alphabet for alphabet, _ in classes})
    rows = [
        (found[key][drawer], label, alphabets.index(key[0]), drawer, SPLITS.index(split))
        for split, drawers in DRAWERS.items()
        for _ in range(VIEWS if split == "train" else 1)
        for drawer in drawers
        for label, key in enumerate(classes)
    ]
    inks = np.stack([row[0] for row in rows])
    labels, alphabet, drawer, splits = np.array([row[1:] for row in rows], np.int64).T
    learnt = np.flatnonzero(splits == SPLITS.index("lesson"))
    turns = random_turns(np.random.default_rng(4), len(rows))
    turns[splits != SPLITS.index("train")] = np.eye(2, 3, dtype=np.float32)

    def draw(indices: Ints) -> Pixels:
        return turned(np.repeat(inks[indices, ..., None], 3, -1), turns[indices])

    def lesson(step: int, n: int) -> tuple[Pixels, Ints]:
        rng = np.random.default_rng((5, step))
        chosen = rng.choice(learnt, n)
        pictures = np.repeat(inks[chosen, ..., None], 3, -1)
        return turned(pictures, random_turns(rng, n)), labels[chosen]

    return Samples(
        classes=tuple(f"{alphabet} {character}" for alphabet, character in classes),
        labels=labels,
        splits=splits.astype(np.int8),
        clients={"alphabet": alphabet, "drawer": alphabet * 100 + drawer},
        draw=draw,
        lesson=lesson,
        side=SIDE,
        digest=hashlib.sha256(f"omniglot {VIEWS} {DRAWERS} {classes}".encode()).hexdigest(),
    )


def _opened(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError) as err:
        raise ModelError(f"{file} cannot be opened ({err}); fetch it again") from err
