"""From latents to pixels: whole, or in tiles that overlap and blend where they do.

A decoder holds all of its picture in memory several times over: the one of Stable Diffusion takes
about 2.8 GB for 512 x 512 pixels. Tiles bound that by their own size, and cost a little time for
what is decoded twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edge_agent.errors import GenerationError

Decode = Callable[[np.ndarray], np.ndarray]  # latents (1, c, h, w) to a sample (1, 3, H, W)

SMALL_TILE = 32  # cells a side where memory is short: 256 pixels
LARGEST_WHOLE = 128  # cells a side up to which pictures are decoded whole: SDXL's own 1024 pixels
LARGE_TILE = 64  # cells a side for what is larger
OVERLAP = 4  # a tile shares at least one part in so many with the next
# Decoders overshoot [-1, 1], the range of pixels, by a little; far beyond it nothing was drawn.
_OVERSHOOT = 2.0


def decode(run: Decode, latents: np.ndarray, tile: int | None = None) -> np.ndarray:
    """Return the (H, W, 3) uint8 pixels of unscaled `latents` (1, c, h, w).

    `tile` are the cells a side that `run` is given at once; None: all, unless the picture is larger
    than LARGEST_WHOLE. Raises GenerationError when what comes out is no picture.
    """
    rows, columns = latents.shape[2:]
    if tile is None and rows * columns > LARGEST_WHOLE**2:
        tile = LARGE_TILE
    if tile is None or max(rows, columns) <= tile:
        sample = run(latents)[0]
    else:
        sample = _in_tiles(run, latents, tile)
    sample = sample.astype(np.float32, copy=False)
    _check(sample)
    pixels = (np.clip(sample.transpose(1, 2, 0), -1.0, 1.0) + 1.0) * 127.5
    return np.asarray(pixels.round().astype(np.uint8))


def _in_tiles(run: Decode, latents: np.ndarray, tile: int) -> np.ndarray:
    """Return the sample (3, H, W), decoded in tiles of one shape and blended in float32."""
    rows, columns = latents.shape[2:]
    height, width = min(tile, rows), min(tile, columns)
    drawn = {
        (top, left): run(latents[:, :, top : top + height, left : left + width])[0]
        for top in _starts(rows, height)
        for left in _starts(columns, width)
    }
    scale = drawn[0, 0].shape[1] // height  # pixels a cell
    total = np.zeros((3, rows * scale, columns * scale), np.float32)
    weights = np.zeros(total.shape[1:], np.float32)
    for (top, left), part in drawn.items():
        weight = np.outer(_ramp(top, height, rows, scale), _ramp(left, width, columns, scale))
        down = slice(top * scale, (top + height) * scale)
        across = slice(left * scale, (left + width) * scale)
        total[:, down, across] += weight * part
        weights[down, across] += weight
    return total / weights


def _starts(cells: int, tile: int) -> list[int]:
    """Return where tiles begin, evenly spread, so that each shares enough with the next."""
    more = math.ceil((cells - tile) / (tile - _shared(tile)))
    return [round(index * (cells - tile) / more) for index in range(more)] + [cells - tile]


def _ramp(start: int, tile: int, cells: int, scale: int) -> np.ndarray:
    """Return the weights of a tile's pixels along one side: less where another tile goes on.

    None is zero, and none falls at the border of the picture.
    """
    along = (np.arange(tile * scale, dtype=np.float32) + 0.5) / (_shared(tile) * scale)
    weight = np.ones_like(along)
    if start > 0:
        weight = np.minimum(weight, along)
    if start + tile < cells:
        weight = np.minimum(weight, along[::-1])
    return weight


def _shared(tile: int) -> int:
    """Return how many cells a tile shares with the next, at the least."""
    return max(tile // OVERLAP, 1)


def _check(sample: np.ndarray) -> None:
    """Refuse a sample (3, H, W) that is no picture, however dark one may be.

    A picture's values differ somewhere, also where all of them are below black: only one that has
    the same colour to the last bit, or lies all beyond what decoders overshoot, is refused.
    """
    if not np.isfinite(sample).all():
        raise GenerationError(
            "the decoder returned pixels that are not finite numbers; try a lower --guidance, or "
            "export with --precision fp32; otherwise the weights are damaged"
        )
    kept = sample.clip(-_OVERSHOOT, _OVERSHOOT).reshape(3, -1)
    if kept.shape[1] > 1 and (kept == kept[:, :1]).all():
        red, green, blue = ((kept[:, 0].clip(-1, 1) + 1) * 127.5).round().astype(int)
        raise GenerationError(
            f"the decoder returned one colour ({red}, {green}, {blue}) in all pixels; export with "
            "--precision fp32; otherwise the weights are damaged"
        )
