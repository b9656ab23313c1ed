"""The contact sheet: every picture of the demonstration with its prompt and where it was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

TILE, MARGIN, GAP, CAPTION, HEADER = 256, 32, 24, 84, 96
COLUMNS = 4
PAPER, CARD, INK, FAINT = (244, 243, 239), (255, 255, 255), (32, 33, 36), (110, 112, 118)
SCALE = 4  # corners are drawn this much larger, then reduced, for smooth edges


@dataclass(frozen=True, slots=True)
class Tile:
    """One picture, what was asked for, and the coloured word about where it was drawn."""

    image: Image.Image
    prompt: str
    drawn_on: str
    colour: tuple[int, int, int]
    note: str


def contact_sheet(tiles: Sequence[Tile], title: str, subtitle: str) -> Image.Image:
    """Lay the tiles out in rows of four under a title."""
    rows = -(-len(tiles) // COLUMNS)
    width = 2 * MARGIN + COLUMNS * TILE + (COLUMNS - 1) * GAP
    height = HEADER + rows * (TILE + CAPTION) + (rows - 1) * GAP + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 24), title, INK, _font(30))
    draw.text((MARGIN, 62), subtitle, FAINT, _font(16))
    for index, tile in enumerate(tiles):
        row, column = divmod(index, COLUMNS)
        x, y = MARGIN + column * (TILE + GAP), HEADER + row * (TILE + CAPTION + GAP)
        _place(sheet, tile, x, y)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow carries it: nothing to install or download


def _place(sheet: Image.Image, tile: Tile, x: int, y: int) -> None:
    card = Image.new("RGB", (TILE, TILE + CAPTION), CARD)
    card.paste(tile.image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC))
    draw = ImageDraw.Draw(card)
    font = _font(14)
    for line, words in enumerate(_wrapped(tile.prompt, font, TILE - 24, lines=2)):
        draw.text((12, TILE + 9 + 19 * line), words, INK, font)
    label, small = tile.drawn_on, _font(13)
    long = round(small.getlength(label))
    draw.rounded_rectangle((12, TILE + 53, 28 + long, TILE + 74), 10, tile.colour)
    draw.text((20, TILE + 63), label, CARD, small, anchor="lm")
    draw.text((TILE - 12, TILE + 63), tile.note, FAINT, small, anchor="rm")
    sheet.paste(card, (x, y), _rounded(card.size, 14))


def _rounded(size: tuple[int, int], radius: int) -> Image.Image:
    large = Image.new("L", (size[0] * SCALE, size[1] * SCALE))
    box = (0, 0, large.width - 1, large.height - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, radius * SCALE, 255)
    return large.resize(size, Image.Resampling.LANCZOS)


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int
) -> list[str]:
    """Break `text` into at most `lines` lines of `width` pixels, the last cut by an ellipsis."""
    out = [""]
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if font.getlength(longer) <= width or not out[-1]:
            out[-1] = longer
        else:
            out.append(word)
    if len(out) > lines:
        last = out[lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1].rstrip()
        out[lines - 1] = last + "…"
    return out[:lines]
