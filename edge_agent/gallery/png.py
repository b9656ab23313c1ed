"""A picture as a PNG file with its own record inside, written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.errors import OutputError

if TYPE_CHECKING:
    from PIL.Image import Image

RECORD_KEY = "routet2i"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def check_folder(file: Path) -> None:
    """Raise OutputError when `file` could not be written, before minutes go into drawing it."""
    folder = file.parent
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist; create it or choose another -o")
    if file.is_dir():
        raise OutputError(f"{file} is a folder; name a .png file with -o")
    if not os.access(folder, os.W_OK):
        raise _output_error(file, OSError(errno.EACCES, os.strerror(errno.EACCES)))


def write_png(file: Path, image: Image, record: Mapping[str, Any]) -> None:
    """Write `image` with `record` in its `routet2i` text chunk; equal input gives equal bytes.

    The bytes go to a temporary file in the same folder that then takes the name, so that nobody
    ever sees half a picture. Raises OutputError.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(RECORD_KEY, json.dumps(record))  # ASCII, so a plain tEXt chunk holds it
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "xb") as stream:
            stream.write(encoded.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as err:
        remove(temporary)
        raise _output_error(file, err) from err
    except BaseException:
        remove(temporary)
        raise


def read_record(file: Path) -> dict[str, Any]:
    """Return the record inside a picture; raise OutputError when it carries none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            image.load()
            record = json.loads(getattr(image, "text", {})[RECORD_KEY])
    except OSError as err:
        reason = "is not a picture" if isinstance(err, UnidentifiedImageError) else err.strerror
        raise OutputError(f"{file} cannot be read ({reason}); name a PNG file") from err
    except (KeyError, ValueError) as err:
        raise OutputError(
            f"{file} carries no record; only pictures written by edge-agent do"
        ) from err
    return dict(record)


def remove(file: Path) -> None:
    """Delete a file if it is there and may be deleted."""
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)


def _output_error(file: Path, err: OSError) -> OutputError:
    if err.errno in _FULL:
        return OutputError(
            f"there is no room for {file} ({err.strerror}); free some space or choose another -o"
        )
    if err.errno in _DENIED:
        return OutputError(
            f"the folder {file.parent} is not writable ({err.strerror}); choose another -o"
        )
    return OutputError(f"cannot write {file} ({err.strerror}); choose another -o")
