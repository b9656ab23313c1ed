"""What a client's last pictures looked like: feature vectors in a small file, and nothing else.

The file is replaced as a whole under a lock, so a process that is killed loses at most the
picture it was at, and two processes may serve one client. It is bounded: the oldest leave.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from edge_agent.config import LONGEST_HISTORY
from edge_agent.errors import HistoryError

Features = NDArray[np.float32]
VERSION = 1
_MAGIC = b"RT2I-ICI"
_HEAD = struct.Struct("<8sIII32s")  # magic, version, width, count, digest of the backbone
_CHECK = struct.Struct("<I")
_NAME_BYTES = 120


@dataclass(frozen=True, slots=True)
class Kept:
    """The features (k, D) of a client, oldest first; `note` says why earlier ones were dropped.

    `version` is that of the file's format.
    """

    features: Features
    note: str | None = None
    version: int = VERSION


class History:
    """The history of `client` in `folder`, of features (D,) made by one backbone.

    `backbone` is the hex digest of its component: features of another mean something else.
    """

    def __init__(self, folder: Path, client: str, backbone: str, width: int) -> None:
        self.file = _file_of(folder, client)
        self._digest, self._width = bytes.fromhex(backbone), width

    def read(self) -> Kept:
        """Return what is there. Raises HistoryError when the file cannot be read at all."""
        try:
            raw = self.file.read_bytes()
        except FileNotFoundError:
            return Kept(np.zeros((0, self._width), np.float32))
        except OSError as err:
            raise _error(self.file, err) from err
        return self._parse(raw)

    def append(self, features: Features) -> Kept:
        """Add the features (n, D) of new pictures and return what was there before.

        Raises HistoryError when it cannot be written; the earlier history is then untouched.
        """
        try:
            with _locked(self.file.parent):
                before = self.read()
                kept = np.concatenate([before.features, features])[-LONGEST_HISTORY:]
                # No fsync: a kill does not need it, and after a power cut the checksum tells.
                partial = self.file.with_suffix(".partial")
                try:
                    partial.write_bytes(self._format(kept))
                    if before.version != VERSION:  # whoever goes back to it finds it again
                        os.replace(self.file, _aside(self.file))
                    os.replace(partial, self.file)
                except OSError:
                    with suppress(OSError):
                        partial.unlink()
                    raise
        except OSError as err:
            raise _error(self.file, err) from err
        return before

    def _format(self, features: Features) -> bytes:
        head = _HEAD.pack(_MAGIC, VERSION, self._width, len(features), self._digest)
        content = head + features.astype("<f4").tobytes()
        return content + _CHECK.pack(zlib.crc32(content))

    def _parse(self, raw: bytes) -> Kept:
        reason, version = self._reason_to_drop(raw)
        if reason:
            empty = np.zeros((0, self._width), np.float32)
            note = f"the history {self.file} {reason}; a fresh one begins"
            return Kept(empty, note, version)
        values = np.frombuffer(raw[_HEAD.size : -_CHECK.size], "<f4")
        return Kept(values.reshape(-1, self._width).astype(np.float32))

    def _reason_to_drop(self, raw: bytes) -> tuple[str | None, int]:
        """Return why a file cannot be gone on with, None if it can, and its version."""
        if len(raw) < _HEAD.size + _CHECK.size or not raw.startswith(_MAGIC):
            return "is damaged", VERSION
        _, version, width, count, digest = _HEAD.unpack_from(raw)
        if version != VERSION:
            aside = _aside(self.file).name
            return f"is of version {version}, and this is {VERSION}: it is kept as {aside}", version
        content, check = raw[: -_CHECK.size], raw[-_CHECK.size :]
        if _CHECK.pack(zlib.crc32(content)) != check:
            return "is damaged", VERSION
        if (digest, width) != (self._digest, self._width):
            return "was made by another backbone", VERSION
        whole = len(content) == _HEAD.size + 4 * width * count
        return None if whole else "is damaged", VERSION


def forget(folder: Path, client: str) -> bool:
    """Delete a client's history; return whether there was one. Raises HistoryError."""
    file = _file_of(folder, client)
    if not folder.is_dir():
        return False
    try:
        with _locked(folder):
            file.with_suffix(".partial").unlink(missing_ok=True)
            there = [one for one in (file, _aside(file)) if one.exists()]
            for one in there:
                one.unlink()
    except OSError as err:
        raise HistoryError(
            f"the history {file} could not be deleted ({err.strerror or err}); delete it by hand, "
            "as its owner"
        ) from err
    return bool(there)


def _aside(file: Path) -> Path:
    """Return where the last history of another version is kept; `forget` knows it."""
    return file.with_name(f"{file.name}.other-version")


def _file_of(folder: Path, client: str) -> Path:
    if not client:
        raise HistoryError("the client has no name; give one with --client")
    called = client.encode("utf-8", "surrogateescape")  # arguments need not be UTF-8
    name = quote(called, safe=" ")
    if len(name) > _NAME_BYTES:
        name = hashlib.sha256(called).hexdigest()
    return folder / f"{name}.history"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _error(file: Path, err: OSError) -> HistoryError:
    return HistoryError(
        f"the history {file} cannot be read or written ({err.strerror or err}); free some space, "
        "or name a folder of your own with --histories"
    )
