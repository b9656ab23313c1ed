"""Pictures of every odd kind: read as they look, or refused in one clear sentence."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from edge_agent.errors import PictureError
from edge_agent.recognition.pictures import pictures_in, read_picture


def halves(*, side: int = 40) -> Image.Image:
    """Red on the left, blue on the right."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, : side // 2, 0] = pixels[:, side // 2 :, 2] = 200
    return Image.fromarray(pixels)


def test_the_middle_square_is_taken(tmp_path: Path) -> None:
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste(Image.new("RGB", (100, 100), "white"), (100, 0))
    wide.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 16)[:, 1:-1].min() == 255
    framed = Image.new("RGB", (100, 100), "black")
    framed.paste(Image.new("RGB", (80, 80), "white"), (10, 10))
    framed.save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png", 16, crop=0.8)[2:-2, 2:-2].min() > 240


def test_exif_turns_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: left becomes top
    halves().save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen = read_picture(tmp_path / "a.jpg", 8).astype(int)
    assert (seen[0, :, 0] > 150).all()
    assert (seen[-1, :, 2] > 150).all()


@pytest.mark.parametrize("turn", range(9))
def test_every_turn_of_exif_is_undone_as_pillow_would(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    pixels = np.random.default_rng(turn).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        wanted = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", 8), wanted)


def test_odd_exif_leaves_the_picture_readable(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "A camera"
    halves().save(tmp_path / "a.jpg", exif=exif, quality=95)
    whole = (tmp_path / "a.jpg").read_bytes()
    start = whole.index(b"Exif\0\0")
    end = start - 2 + int.from_bytes(whole[start - 2 : start])
    for place in range(start, end):
        for value in (0x00, 0x01, 0x12, 0xFF):
            changed = bytearray(whole)
            changed[place] = value
            (tmp_path / "b.jpg").write_bytes(changed)
            assert read_picture(tmp_path / "b.jpg", 8).shape == (8, 8, 3)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(PictureError, match="is no file but a pipe or device"):
        read_picture(tmp_path / "pipe.png", 8)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("white", [255, 65535, 1_000_000])
def test_where_nobody_says_what_white_is_the_usual_ends_count(
    tmp_path: Path, kind: type, white: int
) -> None:
    values = np.full((20, 20), white, kind)
    values[:, 10:] = white // 2
    Image.fromarray(values).save(tmp_path / "a.tif")
    seen = read_picture(tmp_path / "a.tif", 8).astype(int)
    assert np.abs(seen[:, :3] - 255).max() <= 3
    assert np.abs(seen[:, 5:] - 127).max() <= 3


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L", "P", "1", "LA", "RGBA", "I;16", "F", "YCbCr"])
def test_every_mode_is_read_as_it_looks(tmp_path: Path, mode: str) -> None:
    grey = np.full((20, 20), 180, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        options = {"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}
        options["dither"] = Image.Dither.NONE
        image = Image.fromarray(grey).convert("RGB").convert(mode, **options)
    file = tmp_path / ("a.tif" if mode in ("CMYK", "F", "YCbCr") else "a.png")
    image.save(file)
    seen = read_picture(file, 8).astype(int)
    assert seen.shape == (8, 8, 3)
    assert np.abs(seen - (255 if mode == "1" else 180)).max() <= 4


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 8).min() == 255


def test_of_an_animation_the_first_frame_is_seen(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    seen = read_picture(tmp_path / "a.gif", 8)
    assert seen[..., 0].min() > 240
    assert seen[..., 2].max() < 15


def test_a_single_pixel_is_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (9, 200, 30)).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", 8) == (9, 200, 30)).all()


def test_a_picture_of_400_million_pixels_is_refused_unread(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    file = tmp_path / "a.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(PictureError, match=r"a\.png has more than \d+ pixels.* make it smaller"):
        read_picture(file, 8)


def test_what_is_no_picture_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(PictureError, match=r"a\.png is not a picture; name a PNG"):
        read_picture(tmp_path / "a.png", 8)
    with pytest.raises(PictureError, match="is a folder; name a picture"):
        read_picture(tmp_path, 8)
    with pytest.raises(PictureError, match=r"none\.png cannot be read .*No such file"):
        read_picture(tmp_path / "none.png", 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_half_a_picture_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(PictureError, match=rf"a\.{suffix} "):
        read_picture(file, 64)


def test_a_folders_pictures_come_by_name_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    assert [file.name for file in pictures_in(tmp_path)] == ["a.jpg", "b.PNG", "c.webp"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(PictureError, match="holds no picture; put some there"):
        pictures_in(tmp_path / "empty")
