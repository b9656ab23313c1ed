"""The starter world: captioned scenes of one to five objects, drawn from Noto Color Emoji.

A scene is sampled first (groups of objects, a relation, a place, one box per object, a caption)
and drawn second, so that captions and ground truth can be had without the font.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cloud_server.errors import ModelError

FONT_PATHS: Final = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji-color-fonts/NotoColorEmoji.ttf"),
)
GLYPHS: Final = {
    "dog": "🐕", "cat": "🐈", "horse": "🐎", "rabbit": "🐇", "turtle": "🐢", "fish": "🐟",
    "bird": "🐦", "butterfly": "🦋", "elephant": "🐘", "lion": "🦁", "pig": "🐖", "frog": "🐸",
    "cow": "🐄", "sheep": "🐑", "duck": "🦆", "owl": "🦉", "penguin": "🐧",
    "bee": "🐝", "ladybug": "🐞", "snail": "🐌", "crab": "🦀", "octopus": "🐙",
    "dolphin": "🐬", "tiger": "🐅", "monkey": "🐒", "panda": "🐼",
    "camel": "🐫", "giraffe": "🦒", "zebra": "🦓", "snake": "🐍", "dinosaur": "🦕",
    "unicorn": "🦄", "flamingo": "🦩", "parrot": "🦜",
    "apple": "🍎", "banana": "🍌", "pizza": "🍕", "cake": "🎂", "carrot": "🥕",
    "strawberry": "🍓", "lemon": "🍋", "watermelon": "🍉", "pineapple": "🍍", "pear": "🍐",
    "avocado": "🥑", "burger": "🍔", "donut": "🍩", "cookie": "🍪",
    "cupcake": "🧁", "lollipop": "🍭", "mushroom": "🍄", "cactus": "🌵", "tree": "🌳",
    "palm tree": "🌴", "sunflower": "🌻", "tulip": "🌷", "rose": "🌹", "maple leaf": "🍁",
    "house": "🏠", "castle": "🏰", "tent": "⛺", "church": "⛪",
    "volcano": "🌋", "car": "🚗", "bus": "🚌", "bicycle": "🚲", "train": "🚂", "truck": "🚚",
    "tractor": "🚜", "motorcycle": "🏍️", "rocket": "🚀", "sailboat": "⛵",
    "airplane": "✈️", "balloon": "🎈", "umbrella": "☂️", "sun": "☀️", "moon": "🌙", "star": "⭐",
    "snowflake": "❄️", "guitar": "🎸", "trumpet": "🎺",
    "drum": "🥁", "robot": "🤖", "snowman": "⛄", "ghost": "👻", "pumpkin": "🎃", "clock": "⏰",
    "key": "🔑", "book": "📕", "camera": "📷", "gift": "🎁", "crown": "👑",
    "top hat": "🎩", "shoe": "👟", "bell": "🔔", "anchor": "⚓",
    "heart": "❤️", "trophy": "🏆", "football": "⚽", "teddy bear": "🧸",
}  # fmt: skip
NOUNS: Final = tuple(GLYPHS)
PLURALS: Final = {
    "fish": "fish", "sheep": "sheep", "cactus": "cacti", "bus": "buses", 
    "octopus": "octopuses", "church": "churches",  "maple leaf": "maple leaves",
    "snowman": "snowmen", "butterfly": "butterflies", "strawberry": "strawberries",
     "volcano": "volcanoes",
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
# Other words for the same thing; every one takes its turn in captions.
VARIANTS: Final = {
    "a": ("one",), "two": ("2",), "three": ("3",), "four": ("4",), "and": ("with",),
    "small": ("little", "tiny"), "big": ("large", "huge"),
    "to the left of": ("left of", "on the left of"),
    "to the right of": ("right of", "on the right of"),
    "above": ("over", "on top of"), "below": ("under", "beneath"),
    "on grass": ("on the grass", "in a meadow"), "at night": ("in the night", "by night"),
    "in the desert": ("in a desert",), "in the snow": ("on snow", "in winter"),
    "on the beach": ("on a beach", "at the beach"), "at sunset": ("in the evening",),
    "under a blue sky": ("on a sunny day",), "in the forest": ("in a forest", "in the woods"),
    "on a white background": ("on white",), "in space": ("in outer space",),
}  # fmt: skip
HELD_OUT: Final = 12  # one pairing in so many is kept from training, to test composition
TOTALS: Final = (0.34, 0.28, 0.18, 0.12, 0.08)
GRID: Final = 16  # cells a side that boxes are made of, as many as an encoded picture has
SIZES: Final = {"small": 0.52, None: 0.82, "big": 1.1}
OPPOSITE: Final = dict(zip(RELATIONS, (*RELATIONS[1::-1], *RELATIONS[:1:-1]), strict=True))
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


class FontMissing(ModelError):
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

    def words(self, wording: int) -> str:
        """The words of a caption for this group; see `Scene.wording`."""
        noun = self.noun if self.count == 1 else PLURALS.get(self.noun, self.noun + "s")
        size = _said(self.size, wording) if self.size else None
        words = " ".join(word for word in (size, self.colour, noun) if word)
        count = _said(COUNTS[self.count], wording)
        return f"{'an' if count == 'a' and words[0] in 'aeiou' else count} {words}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in a picture; `boxes` holds one (x0, y0, x1, y1) in 0..1 per object, group by group.

    With a relation, the first group stands in it to all the others. `wording` chooses among words
    that mean the same; 0 takes the plainest.
    """

    groups: tuple[Group, ...]
    relation: str | None
    place: str | None
    boxes: tuple[Box, ...]
    caption: str
    prefix: str = ""
    place_first: bool = False
    wording: int = 0

    @property
    def objects(self) -> int:
        """The total number of objects."""
        return sum(group.count for group in self.groups)


def _said(words: str, wording: int) -> str:
    """`words` or, in a third of all wordings, one of their variants."""
    variants = VARIANTS[words]
    turn = zlib.crc32(f"{wording} {words}".encode()) % (3 * len(variants)) if wording else -1
    return variants[turn] if 0 <= turn < len(variants) else words


def _listed(groups: tuple[Group, ...], wording: int) -> str:
    words = [group.words(wording) for group in groups]
    together = _said("and", wording)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {together} {words[-1]}"


def describe(scene: Scene) -> str:
    """The caption of a scene."""
    what = _listed(scene.groups, scene.wording)
    if scene.relation:
        first, rest = scene.groups[:1], scene.groups[1:]
        how = _said(scene.relation, scene.wording)
        what = f"{_listed(first, scene.wording)} {how} {_listed(rest, scene.wording)}"
    if not scene.place:
        return scene.prefix + what
    where = _said(scene.place, scene.wording)
    if scene.place_first:
        return f"{where}, {scene.prefix}{what}"
    return f"{scene.prefix}{what} {where}"


def held_out(scene: Scene) -> bool:
    """Whether a scene holds a pairing that training never sees.

    Of all pairs of a noun and a colour, of a noun and a count over one, and of all triples of two
    nouns and their relation, one in `HELD_OUT` is kept back, whatever the seed.
    """
    pairings: list[tuple[str, ...]] = []
    pairings += [(group.noun, group.colour) for group in scene.groups if group.colour]
    pairings += [(group.noun, str(group.count)) for group in scene.groups if group.count > 1]
    if scene.relation:
        first, *rest = scene.groups
        pairings += [(first.noun, scene.relation, other.noun) for other in rest]
    return any(zlib.crc32(" ".join(pairing).encode()) % HELD_OUT == 0 for pairing in pairings)


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


def sample_scene(
    rng: np.random.Generator, objects: int | None = None, unseen: bool = False
) -> Scene:
    """A random scene of one to five objects (or exactly `objects`).

    It holds no pairing that is `held_out`, as in training, or at least one if `unseen`.
    """
    wanted = objects or int(rng.choice(5, p=TOTALS)) + 1
    while True:
        groups = _sample_groups(rng, wanted)
        related = len(groups) > 1 and rng.random() < 0.55
        relation = RELATIONS[rng.integers(4)] if related else None
        place = tuple(PLACES)[rng.integers(len(PLACES))] if rng.random() < 0.75 else None
        prefix = PREFIXES[rng.integers(1, len(PREFIXES))] if rng.random() < 0.2 else ""
        place_first, wording = rng.random() < 0.1, int(rng.integers(2**31))
        scene = Scene(groups, relation, place, (), "", prefix, place_first, wording)
        if held_out(scene) == unseen:
            boxes = _layout(rng, groups, relation)
            return replace(scene, boxes=boxes, caption=describe(scene))


def turned_round(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with its relation turned round: the same groups and words, on the other side."""
    relation = OPPOSITE[scene.relation] if scene.relation else None
    turned = replace(scene, relation=relation, boxes=_layout(rng, scene.groups, relation))
    return replace(turned, caption=describe(turned))


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


@lru_cache(maxsize=16384)
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
        wrong.append(replace(scene, relation=OPPOSITE[scene.relation]))
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
