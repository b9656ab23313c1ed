"""The starter world: captioned scenes of one to five objects, drawn from Noto Color Emoji.

A scene is sampled first (groups of objects, a relation, a place, one box per object, a caption)
and drawn second, so that captions and ground truth can be had without the font.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FONT_PATHS: Final = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji-color-fonts/NotoColorEmoji.ttf"),
)
GLYPHS: Final = {
    "dog": "🐕", "cat": "🐈", "horse": "🐎", "rabbit": "🐇", "turtle": "🐢", "fish": "🐟",
    "bird": "🐦", "butterfly": "🦋", "elephant": "🐘", "lion": "🦁", "pig": "🐖", "frog": "🐸",
    "apple": "🍎", "banana": "🍌", "pizza": "🍕", "cake": "🎂", "carrot": "🥕",
    "strawberry": "🍓", "mushroom": "🍄", "cactus": "🌵", "tree": "🌳", "palm tree": "🌴",
    "sunflower": "🌻", "tulip": "🌷", "house": "🏠", "castle": "🏰", "tent": "⛺", "car": "🚗",
    "bus": "🚌", "bicycle": "🚲", "train": "🚂", "rocket": "🚀", "sailboat": "⛵",
    "airplane": "✈️", "balloon": "🎈", "umbrella": "☂️", "sun": "☀️", "moon": "🌙", "star": "⭐",
    "guitar": "🎸", "robot": "🤖", "snowman": "⛄",
}  # fmt: skip
NOUNS: Final = tuple(GLYPHS)
PLURALS: Final = {
    "fish": "fish", "cactus": "cacti", "bus": "buses", "butterfly": "butterflies",
    "strawberry": "strawberries",
}  # fmt: skip
COLOURS: Final = {
    "red": (222, 40, 40), "green": (45, 165, 60), "blue": (45, 90, 225), "yellow": (246, 208, 35),
    "purple": (140, 60, 190), "pink": (246, 130, 180), "orange": (245, 135, 25),
    "white": (246, 246, 246), "black": (38, 38, 44),
}  # fmt: skip
RELATIONS: Final = ("to the left of", "to the right of", "above", "below")
PLACES: Final = {
    "on grass": "grass", "at night": "night", "in the desert": "desert", "in the snow": "snow",
    "on the beach": "beach", "at sunset": "sunset", "under a blue sky": "sky",
    "on a white background": "white", "in the forest": "forest", "in space": "space",
}  # fmt: skip
COUNTS: Final = {1: "a", 2: "two", 3: "three", 4: "four"}
PREFIXES: Final = ("", "a picture of ", "a photo of ", "an image of ", "a drawing of ")
TOTALS: Final = (0.34, 0.28, 0.18, 0.12, 0.08)
GRID: Final = 16  # cells a side that boxes are made of, as many as an encoded picture has
SIZES: Final = {"small": 0.52, None: 0.82, "big": 1.1}
_OPPOSITE: Final = dict(zip(RELATIONS, (*RELATIONS[1::-1], *RELATIONS[:1:-1]), strict=True))
_UNPLACED: Final = ("white", "sky", "grass", "snow", "beach", "sunset")
_ROWS: Final[dict[int, tuple[tuple[int, ...], ...]]] = {
    1: ((1,),),
    2: ((2,), (1, 1)),
    3: ((3,), (1, 2), (2, 1), (1, 1, 1)),
    4: ((2, 2), (4,), (1, 1, 1, 1), (1, 2, 1)),
    5: ((2, 3), (3, 2), (2, 1, 2), (1, 2, 2)),
}

Box = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]


class FontMissing(RuntimeError):
    """Noto Color Emoji is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "Noto Color Emoji was not found, and the scenes are drawn with it: "
            "install the Debian package fonts-noto-color-emoji."
        )


@dataclass(frozen=True, slots=True)
class Group:
    """`count` objects that share a noun, a colour and a size."""

    noun: str
    count: int = 1
    colour: str | None = None
    size: str | None = None

    def __str__(self) -> str:
        noun = self.noun if self.count == 1 else PLURALS.get(self.noun, self.noun + "s")
        words = " ".join(word for word in (self.size, self.colour, noun) if word)
        article = "an" if self.count == 1 and words[0] in "aeiou" else COUNTS[self.count]
        return f"{article} {words}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in a picture; `boxes` holds one (x0, y0, x1, y1) in 0..1 per object, group by group.

    With a relation, the first group stands in it to all the others.
    """

    groups: tuple[Group, ...]
    relation: str | None
    place: str | None
    boxes: tuple[Box, ...]
    caption: str
    prefix: str = ""
    place_first: bool = False

    @property
    def objects(self) -> int:
        """The total number of objects."""
        return sum(group.count for group in self.groups)


def _listed(groups: tuple[Group, ...]) -> str:
    words = [str(group) for group in groups]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def describe(scene: Scene) -> str:
    """The caption of a scene."""
    if scene.relation:
        what = f"{scene.groups[0]} {scene.relation} {_listed(scene.groups[1:])}"
    else:
        what = _listed(scene.groups)
    if not scene.place:
        return scene.prefix + what
    if scene.place_first:
        return f"{scene.place}, {scene.prefix}{what}"
    return f"{scene.prefix}{what} {scene.place}"


def _sample_groups(rng: np.random.Generator, objects: int) -> tuple[Group, ...]:
    groups: list[Group] = []
    while objects:
        together = objects > 1 and rng.random() < 0.35
        count = int(rng.integers(2, min(objects, 4) + 1)) if together else 1
        noun = NOUNS[rng.integers(len(NOUNS))]
        colour = tuple(COLOURS)[rng.integers(len(COLOURS))] if rng.random() < 0.4 else None
        size = ("small", "big")[rng.integers(2)] if rng.random() < 0.15 else None
        alike = [group for group in groups if group.noun == noun]
        if all(colour and group.colour and colour != group.colour for group in alike):
            groups.append(Group(noun, count, colour, size))
            objects -= count
    return tuple(groups)


def _cells(rng: np.random.Generator, count: int, area: Box) -> list[Box]:
    """`count` square-ish cells in rows within an area, reading order."""
    x0, y0, x1, y1 = area
    width, height = x1 - x0, y1 - y0
    room = {rows: min(width / max(rows), height / len(rows)) for rows in _ROWS[count]}
    good = [rows for rows in room if room[rows] > 0.85 * max(room.values())]
    rows = good[rng.integers(len(good))]
    tall = height / len(rows)
    return [
        (x0 + width * i / n, y0 + tall * row, x0 + width * (i + 1) / n, y0 + tall * (row + 1))
        for row, n in enumerate(rows)
        for i in range(n)
    ]


def _box(rng: np.random.Generator, cell: Box, size: str | None) -> Box:
    """A square box in a cell, of the size asked for, a little off its middle, inside the frame.

    Boxes lie on the grid of the autoencoder's latents: off it, every shift by a pixel gives a
    glyph other latents, which a small diffusion model would all have to learn.
    """
    x0, y0, x1, y1 = (GRID * edge for edge in cell)
    side = round(min(x1 - x0, y1 - y0, 0.76 * GRID) * SIZES[size])
    loose_x, loose_y = max(x1 - x0 - side, 0.0), max(y1 - y0 - side, 0.0)
    x = round((x0 + x1 - side) / 2 + loose_x * rng.uniform(-0.3, 0.3))
    y = round((y0 + y1 - side) / 2 + loose_y * rng.uniform(-0.3, 0.3))
    x, y = (min(max(v, 0), GRID - side) for v in (x, y))
    return x / GRID, y / GRID, (x + side) / GRID, (y + side) / GRID


def _layout(
    rng: np.random.Generator, groups: tuple[Group, ...], relation: str | None
) -> tuple[Box, ...]:
    sizes = [group.size for group in groups for _ in range(group.count)]
    low, high = 0.03, 0.97
    if relation is None:
        cells = _cells(rng, len(sizes), (low, low, high, high))
    else:
        first, rest = groups[0].count, len(sizes) - groups[0].count
        share = float(np.clip(np.sqrt(first) / (np.sqrt(first) + np.sqrt(rest)), 0.36, 0.64))
        leading = relation in ("to the left of", "above")
        cut = low + (high - low) * (share if leading else 1 - share)
        if relation in ("above", "below"):
            halves = ((low, low, high, cut), (low, cut, high, high))
        else:
            halves = ((low, low, cut, high), (cut, low, high, high))
        mine, theirs = halves if leading else halves[::-1]
        cells = _cells(rng, first, mine) + _cells(rng, rest, theirs)
    return tuple(_box(rng, cell, size) for cell, size in zip(cells, sizes, strict=True))


def sample_scene(rng: np.random.Generator, objects: int | None = None) -> Scene:
    """A random scene of one to five objects (or exactly `objects`)."""
    groups = _sample_groups(rng, objects or int(rng.choice(5, p=TOTALS)) + 1)
    related = len(groups) > 1 and rng.random() < 0.55
    relation = RELATIONS[rng.integers(4)] if related else None
    place = tuple(PLACES)[rng.integers(len(PLACES))] if rng.random() < 0.75 else None
    prefix = PREFIXES[rng.integers(1, len(PREFIXES))] if rng.random() < 0.2 else ""
    boxes = _layout(rng, groups, relation)
    scene = Scene(groups, relation, place, boxes, "", prefix, rng.random() < 0.1)
    return replace(scene, caption=describe(scene))


@cache
def _font() -> ImageFont.FreeTypeFont:
    for path in FONT_PATHS:
        if path.exists():
            return ImageFont.truetype(str(path), 109)
    raise FontMissing


@cache
def _sprite(noun: str, colour: str | None) -> Image.Image:
    """The glyph of a noun, cropped; tinted by its own light and shade if a colour is given."""
    if colour is None:
        image = Image.new("RGBA", (160, 140), (0, 0, 0, 0))
        ImageDraw.Draw(image).text((8, 4), GLYPHS[noun], font=_font(), embedded_color=True)
        return image.crop(image.getbbox())
    pixels = np.asarray(_sprite(noun, None)).astype(np.float32)
    light = pixels[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32)
    low, high = np.percentile(light[pixels[..., 3] > 128], [5, 95])
    shade = np.clip((light - low) / max(high - low, 60.0), 0, 1)[..., None]
    tint = np.array(COLOURS[colour], np.float32)
    dark = 0.62 if colour == "white" else 0.45
    rgb = np.where(
        shade < 0.5,
        tint * (dark + (1 - dark) * 2 * shade),
        tint + (255 - tint) * (shade - 0.5) * 0.7,
    )
    tinted = np.concatenate([rgb, pixels[..., 3:]], -1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(tinted)


@lru_cache(maxsize=8192)
def _fitted(noun: str, colour: str | None, side: int) -> Image.Image:
    """A sprite whose longer side has `side` pixels."""
    sprite = _sprite(noun, colour)
    scale = side / max(sprite.size)
    width, height = (max(1, round(v * scale)) for v in sprite.size)
    return sprite.resize((width, height), Image.Resampling.LANCZOS)


def _gradient(size: int, top: tuple[int, ...], bottom: tuple[int, ...]) -> NDArray[np.float32]:
    t = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    colours = np.array([top, bottom], np.float32)
    return np.repeat(colours[0] * (1 - t) + colours[1] * t, size, axis=1)


_SKY: Final = {
    "white": ((254, 254, 254), (254, 254, 254)), "sky": ((90, 165, 245), (195, 226, 255)),
    "night": ((8, 12, 48), (45, 48, 105)), "sunset": ((115, 60, 135), (255, 160, 85)),
    "space": ((14, 6, 28), (40, 14, 62)), "forest": ((150, 200, 140), (105, 165, 100)),
    "snow": ((175, 200, 225), (222, 232, 242)), "desert": ((135, 195, 240), (240, 225, 190)),
    "grass": ((120, 190, 250), (205, 232, 255)), "beach": ((120, 195, 250), (210, 236, 255)),
}  # fmt: skip
_GROUND: Final = {
    "grass": ((120, 200, 85), (70, 155, 50)), "desert": ((232, 190, 115), (212, 160, 85)),
    "snow": ((242, 246, 252), (228, 236, 247)), "beach": ((246, 228, 170), (235, 208, 140)),
    "night": ((28, 46, 44), (16, 28, 32)), "sunset": ((92, 60, 92), (55, 38, 68)),
    "forest": ((80, 120, 55), (55, 90, 40)),
}  # fmt: skip


def _background(kind: str, rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """A smooth picture (H, W, 3) of a place, in 0..255."""
    picture = _gradient(size, *_SKY[kind])
    xs = np.linspace(0, 1, size, dtype=np.float32)
    if kind == "forest":
        phase = rng.uniform(0, 2 * np.pi, 2)
        waves = np.cos(xs * 6 * 2 * np.pi + phase[0]) + 0.5 * np.cos(xs * 22 + phase[1])
        trunk = (1 / (1 + np.exp(-(waves - 0.75) * 6)))[None, :, None].astype(np.float32)
        picture += trunk * (np.array([88, 66, 44], np.float32) - picture) * 0.8
        leaves = np.clip(1 - np.linspace(0, 3.2, size, dtype=np.float32), 0, 1)[:, None, None]
        picture += leaves * (np.array([45, 105, 50], np.float32) - picture)
    if kind in ("night", "space"):
        blot = np.array([0.25, 0.6, 0.25], np.float32)
        spot = blot[:, None] * blot * 2.2
        for _ in range(7 if kind == "night" else 16):
            y = rng.integers(0, int(size * (0.55 if kind == "night" else 0.97)))
            x = rng.integers(0, size - 3)
            patch = picture[y : y + 3, x : x + 3]
            patch += spot[..., None] * (np.array([255, 250, 225], np.float32) - patch)
    if kind == "space":
        cx, cy = rng.uniform(0.2, 0.8, 2)
        far = np.exp(-((xs[None] - cx) ** 2 + (xs[:, None] - cy) ** 2) / 0.06)[..., None]
        picture += far * np.array([60, 20, 70], np.float32)
    if kind in _GROUND:
        hill = rng.uniform(0, 0.03) if kind in ("snow", "desert", "grass") else 0.0
        line = rng.uniform(0.56, 0.68) + hill * np.sin(xs * 5 + rng.uniform(0, 6))
        if kind == "beach":
            sea = np.clip((xs[:, None] - line + 0.14) * size, 0, 1)[..., None]
            picture += sea * (np.array([55, 140, 215], np.float32) - picture)
        mask = np.clip((xs[:, None] - line) * size, 0, 1)[..., None]
        picture += mask * (_gradient(size, *_GROUND[kind]) - picture)
    if kind != "white":
        picture *= rng.uniform(0.94, 1.04)
    return picture


def draw(scene: Scene, rng: np.random.Generator, size: int = 128) -> Pixels:
    """The picture of a scene, (size, size, 3)."""
    kind = PLACES[scene.place] if scene.place else _UNPLACED[rng.integers(len(_UNPLACED))]
    background = _background(kind, rng, size).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(background)
    kinds = [group for group in scene.groups for _ in range(group.count)]
    for group, (x0, y0, x1, y1) in zip(kinds, scene.boxes, strict=True):
        sprite = _fitted(group.noun, group.colour, max(4, round((x1 - x0) * size)))
        left = round((x0 + x1) / 2 * size - sprite.width / 2)
        top = round((y0 + y1) / 2 * size - sprite.height / 2)
        image.paste(sprite, (left, top), sprite)
    return np.asarray(image)


def _other(rng: np.random.Generator, options: tuple[str, ...], not_these: set[str]) -> str:
    left = [option for option in options if option not in not_these]
    return left[rng.integers(len(left))]


def caption_negatives(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Captions that are nearly right: one each of the changes that this scene allows.

    Swaps (relation turned round, colours or counts exchanged between groups) come first.
    """
    groups = scene.groups
    wrong: list[Scene] = []

    def put(index: int, group: Group) -> None:
        wrong.append(replace(scene, groups=(*groups[:index], group, *groups[index + 1 :])))

    if scene.relation:
        wrong.append(replace(scene, relation=_OPPOSITE[scene.relation]))
        if len(groups) == 2:
            wrong.append(replace(scene, groups=groups[::-1]))
    if len(groups) > 1:
        i, j = (int(k) for k in rng.choice(len(groups), 2, replace=False))
        a, b = groups[i], groups[j]
        for field in ("colour", "count"):
            if getattr(a, field) != getattr(b, field) and a.noun != b.noun:
                swapped = list(groups)
                swapped[i] = replace(a, **{field: getattr(b, field)})
                swapped[j] = replace(b, **{field: getattr(a, field)})
                wrong.append(replace(scene, groups=tuple(swapped)))
    i = int(rng.integers(len(groups)))
    group = groups[i]
    coloured = [k for k, g in enumerate(groups) if g.colour]
    if coloured:
        k = coloured[rng.integers(len(coloured))]
        used = {g.colour for g in groups if g.colour}
        put(k, replace(groups[k], colour=_other(rng, tuple(COLOURS), used)))
    put(i, replace(group, count=int(_other(rng, ("1", "2", "3", "4"), {str(group.count)}))))
    put(i, replace(group, noun=_other(rng, NOUNS, {g.noun for g in groups})))
    if scene.place:
        wrong.append(replace(scene, place=_other(rng, tuple(PLACES), {scene.place})))
    captions = (describe(other) for other in wrong)
    return [caption for caption in dict.fromkeys(captions) if caption != scene.caption]


def batches(seed: int, batch: int) -> Iterator[tuple[Pixels, list[str], list[Scene]]]:
    """Endless batches of images (B, 128, 128, 3), captions and scenes, batch i by (seed, i)."""
    index = 0
    while True:
        yield batch_at(seed, index, batch)
        index += 1


def batch_at(seed: int, index: int, batch: int) -> tuple[Pixels, list[str], list[Scene]]:
    """Batch number `index` of `batches`, for training that resumes."""
    rng = np.random.default_rng((seed, index))
    scenes = [sample_scene(rng) for _ in range(batch)]
    images = np.stack([draw(scene, rng) for scene in scenes])
    return images, [scene.caption for scene in scenes], scenes


def write_sheet(file: Path, seed: int) -> None:
    """Write 48 scenes as one PNG, to be looked at before anything is trained on them."""
    rows = [np.concatenate(list(batch_at(seed, i, 8)[0]), axis=1) for i in range(6)]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(file)
