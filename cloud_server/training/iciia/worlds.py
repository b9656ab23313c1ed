"""Two worlds to train a starter recogniser in: emoji and Omniglot's drawings, in bad pictures."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from cloud_server.errors import ModelError
from cloud_server.training.iciia.samples import SPLITS, Ints, Samples
from cloud_server.training.starter.scenes import FONT_PATHS, FontMissing
from edge_agent.recognition.pictures import Pixels

EMOJI_TEST: Final = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIDE: Final = 96  # of every picture
# Of each class, split after split; what came later stands last, so that the rest stays as it was.
PICTURES_OF_A_CLASS: Final = (("train", 96), ("val", 6), ("test", 10), ("train", 192))
CLASSES_OF_A_CLIENT: Final = 15
PICTURES_IN_A_CLIENT: Final = {"train": 6, "val": 6, "test": 5}  # of each of its classes
DRAWERS: Final = {"train": range(1, 14), "val": range(14, 16), "test": range(16, 21)}
VIEWS: Final = {"train": 16, "val": 4, "test": 4}  # of each drawing
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


def sprites(emoji: list[Emoji]) -> NDArray[np.uint8]:
    """Draw each emoji as RGBA, colour multiplied by opacity: (n, 96, 96, 4)."""
    path = next((path for path in FONT_PATHS if path.is_file()), None)
    if path is None:
        raise FontMissing
    font = ImageFont.truetype(str(path), 109)  # the one size that the font holds
    drawn = np.zeros((len(emoji), SIDE, SIDE, 4), np.uint8)
    for sprite, one in zip(drawn, emoji, strict=True):
        image = Image.new("RGBA", (136, 136))
        ImageDraw.Draw(image).text((0, 0), one.character, font=font, embedded_color=True)
        image = image.crop(image.getbbox() or (0, 0, 1, 1))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        left, top = (SIDE - image.width) // 2, (SIDE - image.height) // 2
        pixels = np.asarray(image, np.float32)
        opacity = pixels[..., 3:] / 255
        whole = np.concatenate([pixels[..., :3] * opacity, pixels[..., 3:]], 2)
        sprite[top : top + image.height, left : left + image.width] = whole.round()
    return drawn


@dataclass(frozen=True, slots=True)
class Camera:
    """Takes bad pictures of sprites: turned, scaled, tinted, blurred, noisy, on any background.

    `smallest` is of the side, `slant` the most that is sheared away, `tint` multiplies colours,
    `paper` is how dark and how light backgrounds are and `noisiest` the spread of noise, both of
    the range of pixels. `sprites` are RGBA, (S, 4, 96, 96), colour times opacity.
    """

    sprites: Tensor = field(repr=False)
    smallest: float
    noisiest: float
    slant: float
    tint: tuple[float, float]
    paper: tuple[float, float]
    seed: int

    def stored(self, subjects: Ints, indices: Ints) -> Pixels:
        """Return the pictures of these indices of a world whose picture i is of `subjects[i]`."""
        # A picture depends on its chunk alone, so that any part of the world can be drawn again.
        drawn = np.empty((len(indices), SIDE, SIDE, 3), np.uint8)
        for chunk in np.unique(indices // _CHUNK):
            inside = np.flatnonzero(indices // _CHUNK == chunk)
            whole = subjects[chunk * _CHUNK : (chunk + 1) * _CHUNK]
            rng = np.random.default_rng((self.seed, 1, int(chunk)))
            drawn[inside] = self.take(whole, rng)[indices[inside] % _CHUNK]
        return drawn

    def lesson(self, subjects: Ints, step: int, n: int) -> tuple[Pixels, Ints]:
        """Return n pictures of random ones of these subjects, and which they are of."""
        rng = np.random.default_rng((self.seed, 2, step))
        chosen = subjects[rng.integers(len(subjects), size=n)]
        return self.take(chosen, rng), chosen

    def take(self, subjects: Ints, rng: np.random.Generator) -> Pixels:
        """Return one picture of each subject, a sprite's number: (n, 96, 96, 3)."""
        n = len(subjects)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

        angle, size = uniform(-0.4, 0.4), uniform(self.smallest, 1.0)
        cos, sin = angle.cos() / size, angle.sin() / size
        room = (1.05 - size) / size
        x, y = uniform(-1, 1) * room, uniform(-1, 1) * room
        shear = uniform(-self.slant, self.slant) if self.slant else 0.0
        turn = torch.stack([cos, shear - sin, x, sin, cos, y], 1).view(n, 2, 3)
        grid = F.affine_grid(turn, [n, 4, SIDE, SIDE], align_corners=False)
        sprite = self.sprites[torch.from_numpy(subjects)].float().div_(255)
        sprite = F.grid_sample(sprite, grid, align_corners=False)
        colour, opacity = sprite[:, :3], sprite[:, 3:]
        grey = colour.mean(1, keepdim=True)
        saturation, tint = uniform(0.0, 1.0, 1, 1, 1), uniform(*self.tint, 3, 1, 1)
        colour = (grey + (colour - grey) * saturation) * tint
        coarse, fine = uniform(*self.paper, 3, 2, 2), uniform(-0.15, 0.15, 3, 8, 8)
        below = sum(
            F.interpolate(part, (SIDE, SIDE), mode="bilinear", align_corners=True)
            for part in (coarse, fine)
        )
        picture = below * (1 - opacity) + colour
        blurred = F.avg_pool2d(picture, 7, 1, 3, count_include_pad=False)
        picture = torch.lerp(picture, blurred, uniform(0.0, 1.0, 1, 1, 1))
        noise = torch.from_numpy(rng.standard_normal(picture.shape, np.float32))
        picture = picture + noise * uniform(0.0, self.noisiest, 1, 1, 1)
        whole = picture.mul(255).round().clamp(0, 255).byte()
        return whole.permute(0, 2, 3, 1).contiguous().numpy()


class EmojiWorld:
    """Every emoji of one code point, in bad pictures.

    Lessons are of somewhat better ones, as those were by which the committed backbone was trained.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        named = named_emoji()
        drawn = sprites(named)
        # Where the font draws two characters alike, nobody could tell them apart.
        _, first = np.unique(drawn.reshape(len(drawn), -1), axis=0, return_index=True)
        kept = [i for i in sorted(first) if drawn[i, ..., 3].any()]
        self.emoji = [named[i] for i in kept]
        self._lessons = Camera(
            torch.from_numpy(drawn[kept]).permute(0, 3, 1, 2).contiguous(),
            smallest=0.2,
            noisiest=0.3,
            slant=0.0,
            tint=(0.6, 1.2),
            paper=(0.1, 0.9),
            seed=seed,
        )
        self._camera = replace(self._lessons, smallest=0.17, noisiest=0.33)

    def samples(self) -> Samples:
        """Return the pictures of all splits, and clients by subgroup and by random classes."""
        c, camera, lessons = len(self.emoji), self._camera, self._lessons
        counts = [n for _, n in PICTURES_OF_A_CLASS]
        labels = np.tile(np.arange(c), sum(counts))
        codes = [SPLITS.index(split) for split, _ in PICTURES_OF_A_CLASS]
        splits = np.repeat(np.array(codes, np.int8), [n * c for n in counts])
        groups = [one.subgroup for one in self.emoji]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        subgroup = np.array([numbers[name] for name in groups], np.int64)[labels]
        names = tuple(one.name for one in self.emoji)
        return Samples(
            classes=names,
            labels=labels,
            splits=splits,
            clients={"subgroup": subgroup, "random": self._random_clients()},
            draw=lambda indices: camera.stored(labels, indices),
            lesson=lambda step, n: lessons.lesson(np.arange(c), step, n),
            side=SIDE,
            digest=_digest(camera, lessons, PICTURES_OF_A_CLASS, names),
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


def omniglot(folder: Path) -> Samples:
    """Read Omniglot's two small background sets, zipped, from `folder`: one class a character.

    Their drawings, in ink on paper, in bad pictures: of each as many as VIEWS, and others for the
    lessons, by the same drawers as the training split. Splits are by drawer. Clients are
    alphabets, or single people, each of whom drew one alphabet.
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
                    found.setdefault((alphabet, character), {})[drawer] = 255 - small
    classes = sorted(found)
    alphabets = sorted({alphabet for alphabet, _ in classes})
    drawings = [(label, drawer) for label, key in enumerate(classes) for drawer in found[key]]
    opacity = np.stack([found[classes[label]][drawer] for label, drawer in drawings])
    camera = Camera(
        torch.from_numpy(opacity)[:, None].expand(-1, 4, -1, -1),
        smallest=0.35,
        noisiest=0.3,
        slant=0.2,
        tint=(0.0, 0.35),
        paper=(0.4, 0.95),
        seed=0,
    )
    character, drawer = np.array(drawings, np.int64).T
    of_split = {
        split: np.flatnonzero(np.isin(drawer, drawers)) for split, drawers in DRAWERS.items()
    }
    subjects = np.concatenate([np.tile(of_split[split], n) for split, n in VIEWS.items()])
    codes = [np.full(len(of_split[split]) * n, SPLITS.index(split)) for split, n in VIEWS.items()]
    alphabet = np.array([alphabets.index(name) for name, _ in classes])[character[subjects]]

    def lesson(step: int, n: int) -> tuple[Pixels, Ints]:
        pictures, chosen = camera.lesson(of_split["train"], step, n)
        return pictures, character[chosen]

    return Samples(
        classes=tuple(f"{alphabet} {character}" for alphabet, character in classes),
        labels=character[subjects],
        splits=np.concatenate(codes).astype(np.int8),
        clients={"alphabet": alphabet, "drawer": alphabet * 100 + drawer[subjects]},
        draw=lambda indices: camera.stored(subjects, indices),
        lesson=lesson,
        side=SIDE,
        digest=_digest(camera, VIEWS, DRAWERS, classes),
    )


def _digest(*about: object) -> str:
    return hashlib.sha256(f"{about}".encode()).hexdigest()


def _opened(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError) as err:
        raise ModelError(f"{file} cannot be opened ({err}); fetch it again") from err
