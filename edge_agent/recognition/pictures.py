"""A picture file as the recogniser sees it: upright, in RGB, cut square, of one size."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_agent.errors import PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
_ORIENTATION = 0x0112
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def pictures_in(folder: Path) -> list[Path]:
    """Return the picture files of a folder by name; raise PictureError when there is none."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    except OSError as err:
        raise PictureError(
            f"the folder {folder} cannot be read ({err.strerror}); check its owner"
        ) from err
    if not files:
        raise PictureError(
            f"the folder {folder} holds no picture; put some there ({', '.join(SUFFIXES)})"
        )
    return files


def read_picture(file: Path, side: int, crop: float = 1.0) -> Pixels:
    """Return a picture (side, side, 3), its middle square, of which `crop` of each side is kept.

    EXIF's rotation is honoured, of an animation the first frame is taken, what is transparent
    lies on white. Raises PictureError naming the file.
    """
    from PIL import Image, UnidentifiedImageError

    if file.exists() and not (file.is_file() or file.is_dir()):
        raise PictureError(f"{file} is no file but a pipe or device; name a picture")
    try:
        with _only_bombs_warn(), Image.open(file) as opened:
            opened.draft("RGB", (side, side))  # a JPEG is decoded no larger than it is needed
            pixels = square(_upright(opened), side, crop)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise PictureError(
            f"{file} has more than {Image.MAX_IMAGE_PIXELS} pixels, which are too many to read; "
            "make it smaller"
        ) from err
    except UnidentifiedImageError as err:
        raise PictureError(f"{file} is not a picture; name a PNG, JPEG or WebP file") from err
    except IsADirectoryError as err:
        raise PictureError(f"{file} is a folder; name a picture") from err
    except (OSError, SyntaxError, ValueError, EOFError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise PictureError(f"{file} cannot be read as a picture ({reason}); replace it") from err
    return pixels


def square(image: Image, side: int, crop: float = 1.0) -> Pixels:
    """Return the middle square of a picture that is upright already, (side, side, 3)."""
    from PIL import Image, ImageOps

    margin = (1.0 - crop) / 2.0
    fitted = ImageOps.fit(_in_rgb(image), (side, side), Image.Resampling.BICUBIC, margin)
    return np.asarray(fitted)


@contextmanager
def _only_bombs_warn() -> Iterator[None]:
    """Refuse from where Pillow only warns of the size, about 89 million pixels.

    What else it warns of, odd EXIF for one, leaves the pixels as they are.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _upright(image: Image) -> Image:
    """Turn a picture as its EXIF says; not ImageOps, which trips over what else is odd there."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        turn = turns.get(int(image.getexif().get(_ORIENTATION, 1)))
    except (struct.error, SyntaxError, TypeError, ValueError, KeyError, AttributeError):
        turn = None  # an EXIF block that cannot be read says nothing
    return image if turn is None else image.transpose(turn)


def _in_rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own way from these modes cuts at 255; 16-bit pictures keep their upper byte.
        # Of 32 bits nobody says where white is: the next of the usual ends of the scale.
        values = np.asarray(image, np.float32)
        most = values.max(initial=0.0) if image.mode in ("I", "F") else 65535.0
        ends = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        brightest = next((end for end in ends if most <= end), most)
        image = Image.fromarray((values / brightest * 255.0).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(below, image)
    return image.convert("RGB")
