"""Ten ways to spoil a picture at graded strength, one for each quality metric.

They give the metric texts a meaning in the starter world: CLIP learns that a hazy picture is nearer
to "Hazy photo". Pictures are float arrays (H, W, 3) in 0..1; strength is 0 (untouched) to 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Picture = NDArray[np.float32]


def degrade(picture: Picture, metric: str, strength: float, rng: np.random.Generator) -> Picture:
    """Spoil a picture in what `metric` measures; KeyError for a metric without a degradation."""
    spoiled = DEGRADATIONS[metric](picture, strength, rng) if strength > 0 else picture
    return np.clip(spoiled, 0.0, 1.0).astype(np.float32)


def _image(picture: Picture) -> Image.Image:
    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


def _array(image: Image.Image) -> Picture:
    return np.asarray(image, np.float32) / np.float32(255)


def low_resolution(picture: Picture, strength: float, _: np.random.Generator) -> Picture:
    """Definition: fewer pixels, seen as blocks."""
    height, width = picture.shape[:2]
    factor = 1.5 + 5 * strength
    small = _image(picture).resize(
        (int(width / factor), int(height / factor)), Image.Resampling.BOX
    )
    return _array(small.resize((width, height), Image.Resampling.NEAREST))


def lost_detail(picture: Picture, strength: float, _: np.random.Generator) -> Picture:
    """Detail: fine structure is flattened while edges stay, and tones become few."""
    size = 3 if strength < 0.5 else 5  # larger medians take too long
    flat = _array(_image(picture).filter(ImageFilter.MedianFilter(size)))
    levels = 24 - 19 * strength
    return (np.round(flat * levels) / levels).astype(np.float32)


def haze(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """Clarity: a pale veil lies over the picture."""
    veil = rng.uniform(0.72, 0.95)
    return picture + (0.15 + 0.7 * strength) * (veil - picture)


def blur(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """Sharpness: out of focus."""
    radius = (0.5 + 3.5 * strength) * rng.uniform(0.9, 1.1)
    return _array(_image(picture).filter(ImageFilter.GaussianBlur(radius)))


def clashing_colours(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """Harmony: hues turned by a different angle in every region."""
    height, width = picture.shape[:2]
    angle = _smooth(rng, (height, width), 3) * np.pi * (0.3 + 1.2 * strength)
    grey = picture.mean(-1, keepdims=True)
    chroma = picture - grey
    turned = np.stack([np.roll(chroma, k, axis=-1) for k in (1, 2)])
    cosine, sine = np.cos(angle)[..., None], np.sin(angle)[..., None]
    rotated = chroma * cosine + (turned[0] - turned[1]) / np.sqrt(3) * sine
    return grey + rotated * (1 + 0.8 * strength)


def warped_shapes(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """Realism: shapes are bent."""
    height, width = picture.shape[:2]
    reach = (0.01 + 0.07 * strength) * height
    shift_y, shift_x = (_smooth(rng, (height, width), 6) * reach for _ in range(2))
    rows, columns = np.mgrid[0:height, 0:width]
    y = np.clip(rows + shift_y, 0, height - 1).round().astype(int)
    x = np.clip(columns + shift_x, 0, width - 1).round().astype(int)
    return picture[y, x]


def grey(picture: Picture, strength: float, _: np.random.Generator) -> Picture:
    """Color: colour fades."""
    return picture + (0.2 + 0.8 * strength) * (picture.mean(-1, keepdims=True) - picture)


def inconsistent_parts(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """Consistency: patches trade places."""
    spoiled = picture.copy()
    height, width = picture.shape[:2]
    for _ in range(1 + round(6 * strength)):
        side = int(rng.integers(height // 7, height // 4))
        (y0, y1), (x0, x1) = rng.integers(0, height - side, 2), rng.integers(0, width - side, 2)
        patch = spoiled[y0 : y0 + side, x0 : x0 + side].copy()
        spoiled[y0 : y0 + side, x0 : x0 + side] = spoiled[y1 : y1 + side, x1 : x1 + side]
        spoiled[y1 : y1 + side, x1 : x1 + side] = patch[:, ::-1]
    return spoiled


def bad_layout(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """Layout: everything is pushed off the frame, or crowded into a corner of it."""
    height, width = picture.shape[:2]
    if rng.random() < 0.5:
        share = 0.1 + 0.4 * strength
        shift = int(share * height) * int(rng.choice((-1, 1)))
        axis = int(rng.integers(2))
        index = np.clip(np.arange(picture.shape[axis]) + shift, 0, picture.shape[axis] - 1)
        return np.take(picture, index, axis=axis)
    factor = 1 - 0.25 - 0.35 * strength
    small = _image(picture).resize((int(width * factor), int(height * factor)))
    canvas = np.broadcast_to(np.median(picture, axis=(0, 1)), picture.shape).copy()
    top = int(rng.choice((0, height - small.height)))
    left = int(rng.choice((0, width - small.width)))
    canvas[top : top + small.height, left : left + small.width] = _array(small)
    return canvas


def cut_objects(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """Integrity: pieces are erased with the colours around them."""
    spoiled = picture.copy()
    height, width = picture.shape[:2]
    border = np.median(picture[:, [0, 1, -2, -1]], axis=1)[:, None]  # a colour for every row
    background = np.broadcast_to(border, picture.shape)
    for _ in range(1 + round(3 * strength)):
        tall = int(height * rng.uniform(0.12, 0.2 + 0.15 * strength))
        wide = int(width * rng.uniform(0.12, 0.2 + 0.15 * strength))
        busy = np.abs(spoiled - background).sum(-1)
        centres = np.argwhere(busy > 0.25)
        if not len(centres):
            break
        y, x = centres[rng.integers(len(centres))] - (tall // 2, wide // 2)
        area = np.s_[max(y, 0) : y + tall, max(x, 0) : x + wide]
        spoiled[area] = background[area]
    return spoiled


def _smooth(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> NDArray[np.float32]:
    """Return a smooth random field in about -1..1 with `cells` bumps a side."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC), np.float32)


DEGRADATIONS: dict[str, Callable[[Picture, float, np.random.Generator], Picture]] = {
    "Definition": low_resolution,
    "Detail": lost_detail,
    "Clarity": haze,
    "Sharpness": blur,
    "Harmony": clashing_colours,
    "Realism": warped_shapes,
    "Color": grey,
    "Consistency": inconsistent_parts,
    "Layout": bad_layout,
    "Integrity": cut_objects,
}
