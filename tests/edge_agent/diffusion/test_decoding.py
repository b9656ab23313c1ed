"""Pictures decoded in tiles are those decoded whole, without seams; and what is no picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.diffusion import decoding
from edge_agent.diffusion.decoding import decode
from edge_agent.errors import GenerationError
from tests import families

SCALE = 8
STARTER = Path(__file__).parents[3] / "models" / "starter" / "edge" / "vae"
Run = Callable[[np.ndarray], np.ndarray]


def noise(rows: int, columns: int, channels: int = 4) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(5))
    return rng.standard_normal((1, channels, rows, columns), np.float32)


def local(latents: np.ndarray) -> np.ndarray:
    """Decode each cell by itself: tiles cannot differ from the whole."""
    return (latents[:, :3] / 4).repeat(SCALE, axis=2).repeat(SCALE, axis=3)


def in_torch(vae: torch.nn.Module) -> Run:
    @torch.inference_mode()
    def run(latents: np.ndarray) -> np.ndarray:
        drawn = vae.decode(torch.from_numpy(np.ascontiguousarray(latents)))
        return np.asarray(drawn.sample)

    return run


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


@pytest.mark.parametrize("tile", [2, 5, 8, 16])
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (8, 40), (5, 5), (9, 3), (3, 31), (33, 16)])
def test_tiles_cover_every_size_once_in_one_shape(size: tuple[int, int], tile: int) -> None:
    shapes = []

    def run(latents: np.ndarray) -> np.ndarray:
        shapes.append(latents.shape[2:])
        return local(latents)

    latents = noise(*size)
    tiled = decode(run, latents, tile)
    assert set(shapes) == {(min(tile, size[0]), min(tile, size[1]))}
    assert (len(shapes) == 1) is (max(size) <= tile)
    whole = decode(local, latents)
    assert tiled.shape == whole.shape == (size[0] * SCALE, size[1] * SCALE, 3)
    assert np.abs(tiled.astype(int) - whole).max() <= 1  # a sum of weights rounds


def test_only_pictures_over_the_limit_are_tiled_unasked() -> None:
    asked = []

    def run(latents: np.ndarray) -> np.ndarray:
        asked.append(latents.shape[2:])
        return local(latents)

    side = decoding.LARGEST_WHOLE
    decode(run, noise(side, side))
    decode(run, noise(side // 2, side * 2))
    assert asked == [(side, side), (side // 2, side * 2)]
    asked.clear()
    decode(run, noise(side, side + 1))
    assert set(asked) == {(decoding.LARGE_TILE, decoding.LARGE_TILE)}


@pytest.mark.parametrize(
    ("name", "tile", "least_db"),
    [("starter", 16, 44.0), ("starter", 32, 52.0), ("AutoencoderKL", 32, 30.0)],
)
def test_tiles_of_real_decoders_come_near_the_whole_and_show_no_seam(
    name: str, tile: int, least_db: float
) -> None:
    """The worst step in the error is not where tiles meet: the eye sees steps, not slopes."""
    if name == "starter":
        vae = families.diffusers.AutoencoderTiny.from_pretrained(STARTER).eval()
        with torch.inference_mode():
            latents = np.asarray(vae.encode(discs(48 * SCALE, 41 * SCALE)).latents)
    else:
        vae = families.kl_vae().eval()
        latents = noise(48, 41)
    run = in_torch(vae)
    whole = decode(run, latents)
    tiled = decode(run, latents, tile)
    assert psnr_db(tiled, whole) > least_db
    at_seams, elsewhere = steps_of_error(run, latents, tile)
    assert at_seams < elsewhere


def discs(height: int, width: int) -> torch.Tensor:
    """Return a picture (1, 3, h, w) of slopes and hard edges, from -1 to 1."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    picture = np.stack([x / width, y / height, 0.5 + 0.5 * np.sin(x / 9) * np.cos(y / 13)])
    for _ in range(12):
        row, column, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(8, 40)
        picture[:, (y - row) ** 2 + (x - column) ** 2 < radius**2] = rng.uniform(0, 1, (3, 1))
    return torch.from_numpy(2 * picture[None] - 1)


def steps_of_error(run: Run, latents: np.ndarray, tile: int) -> tuple[float, float]:
    """Return the largest step between neighbours of tiled minus whole, at tiles' edges and not."""
    error = decoding._in_tiles(run, latents, tile) - run(latents)[0]
    at_seams, elsewhere = [0.0], [0.0]
    for axis, cells in ((1, latents.shape[2]), (2, latents.shape[3])):
        starts = decoding._starts(cells, tile)
        edges = {SCALE * at - 1 for at in starts[1:]} | {
            SCALE * (at + tile) - 1 for at in starts[:-1]
        }
        others = tuple(each for each in range(3) if each != axis)
        steps = np.abs(np.diff(error, axis=axis)).max(axis=others)
        at_seams.append(float(steps[sorted(edges)].max()))
        elsewhere.append(float(np.delete(steps, sorted(edges)).max()))
    return max(at_seams), max(elsewhere)


def test_a_seam_would_be_seen_by_that_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles laid side by side, the weight of the second nothing where both are, show seams."""

    def cut(start: int, tile: int, cells: int, scale: int) -> np.ndarray:
        weight = np.ones(tile * scale, np.float32)
        if start > 0:
            weight[: (tile // decoding.OVERLAP) * scale] = 1e-6
        return weight

    monkeypatch.setattr(decoding, "_ramp", cut)
    at_seams, elsewhere = steps_of_error(in_torch(families.tiny_vae().eval()), noise(20, 20), 8)
    assert at_seams > elsewhere


@pytest.mark.parametrize("tile", [None, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(value: float, tile: int | None) -> None:
    def run(latents: np.ndarray) -> np.ndarray:
        sample = local(latents)
        sample[0, 0, 3, 3] = value
        return sample

    with pytest.raises(GenerationError, match=r"not finite numbers.*--precision fp32"):
        decode(run, noise(16, 16), tile)


@pytest.mark.parametrize(
    ("colour", "told"),
    [
        ((-1.0, -1.0, -1.0), "(0, 0, 0)"),
        ((0.0, 0.0, 0.0), "(128, 128, 128)"),
        ((1.0, -1.0, 1.0), "(255, 0, 255)"),
    ],
)
def test_one_colour_everywhere_is_no_picture(colour: tuple[float, ...], told: str) -> None:
    def run(latents: np.ndarray) -> np.ndarray:
        return np.zeros_like(local(latents)) + np.float32(colour).reshape(3, 1, 1)

    with pytest.raises(GenerationError) as caught:
        decode(run, noise(4, 4))
    assert told in str(caught.value)
    assert "--precision fp32" in str(caught.value)


def test_numbers_far_below_black_are_no_picture_but_a_dark_one_is() -> None:
    def run(latents: np.ndarray) -> np.ndarray:
        return local(latents) * 0.1 - depth

    depth = np.float32(1e4)
    with pytest.raises(GenerationError, match=r"one colour \(0, 0, 0\)"):
        decode(run, noise(4, 4))
    depth = np.float32(1.5)  # black all over, and yet drawn
    assert decode(run, noise(4, 4)).max() == 0


def test_half_precision_is_widened_before_it_is_blended() -> None:
    def run(latents: np.ndarray) -> np.ndarray:
        return local(latents).astype(np.float16)

    tiled = decode(run, noise(20, 20), 8)
    assert np.abs(tiled.astype(int) - decode(local, noise(20, 20))).max() <= 1
