"""A picture as a PNG file with its own record inside, written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from itertools import chain
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
    try:
        if not folder.is_dir():
            raise OutputError(f"the folder {folder} does not exist; create it or choose another -o")
        if file.is_dir():
            raise OutputError(f"{file} is a folder; name a .png file with -o")
    except OSError as err:  # a folder that may not be looked into, a name that is too long
        raise _output_error(file, err) from err
    if not os.access(folder, os.W_OK):
        raise _output_error(file, OSError(errno.EACCES, os.strerror(errno.EACCES)))


def write_png(file: str | os.PathLike[str], image: Image, record: Mapping[str, Any]) -> None:
    """Write `image` with `record` in its `routet2i` text chunk; equal input gives equal bytes.

    The bytes go to a temporary file in the same folder that then takes the name, so that nobody
    ever sees half a picture. Raises OutputError.
    """
    with _written(Path(file), image, record) as temporary:
        os.replace(temporary, file)


def write_first(files: Iterator[Path], image: Image, record: Mapping[str, Any]) -> Path:
    """Write a picture as `write_png` does, to the first of `files` that is free, and return it.

    Where only one is offered it is replaced. Raises OutputError.
    """
    file, second = next(files), next(files, None)
    if second is None:
        write_png(file, image, record)
        return file
    with _written(file, image, record) as temporary:
        for free in chain([file, second], files):
            if _takes(temporary, free):
                return free
    raise AssertionError("names without end have one that is free")


def _takes(temporary: Path, file: Path) -> bool:
    """Give a file its name if nobody has it, also of those who try at this moment."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without links, such as a memory card's
        if file.exists():
            return False
        os.replace(temporary, file)
    return True


@contextlib.contextmanager
def _written(file: Path, image: Image, record: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary file beside `file` with all of the picture in it; it goes at the end."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(RECORD_KEY, json.dumps(record))  # ASCII, so a plain tEXt chunk holds it
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    temporary = file.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(temporary, "xb") as stream:
            stream.write(encoded.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    except OSError as err:
        raise _output_error(file, err) from err
    finally:
        remove(temporary)


def read_record(file: str | os.PathLike[str]) -> dict[str, Any]:
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
