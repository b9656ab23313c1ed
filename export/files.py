"""Files of models: JSON objects, digests to know them by, and files in two places."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization.onnx_model import ONNXModel

from export.errors import ExportError

MIN_EXTERNAL_BYTES = 1024  # of a tensor, to lie beside its graph


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raises ExportError naming the file when it is missing or damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else err
        raise ExportError(
            f"cannot read '{file}' ({reason}); fetch or train the model again"
        ) from err
    if not isinstance(value, dict):
        raise ExportError(f"'{file}' holds no JSON object; fetch or train the model again")
    return value


def digest_of(*paths: Path) -> str:
    """Return one sha256 over names and contents of files, and of the files in folders."""
    total = hashlib.sha256()
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                total.update(f"{file.name} {file_sha256(file)}\n".encode())
    return total.hexdigest()


def file_sha256(file: Path) -> str:
    """Return the hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where there are no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def hold(folder: Path) -> int:
    """Make a folder and hold it for this process until the descriptor returned is closed.

    Raises ExportError where another process, or another export of this one, holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(descriptor)
        raise ExportError(
            f"another export is writing to '{folder}'; wait for it or choose another folder with -o"
        ) from err
    return descriptor


def empty(folder: Path) -> None:
    """Remove all that a folder holds."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def save_beside(model: ONNXModel, file: Path) -> None:
    """Write a model with its weights in a file of their own beside it, so that 2 GB are no limit.

    `file` may be the one that it was read from.
    """
    model.topological_sort()
    beside = f"{file.name}.data"
    file.with_name(beside).unlink(missing_ok=True)  # onnx would write behind what is there
    onnx.save_model(
        model.model,
        file,
        save_as_external_data=True,
        location=beside,
        size_threshold=MIN_EXTERNAL_BYTES,
    )
