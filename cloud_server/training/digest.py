"""By what a model folder is known, wherever it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

_TELLING = (".bin", ".json", ".model", ".safetensors", ".txt")


def folder_digest(folder: Path) -> str:
    """Return one SHA-256 over the weights and settings of a model folder."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in _TELLING:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{file.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()
