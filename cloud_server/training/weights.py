"""Weights as safetensors files that whoever may read the folder may read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_weights(
    weights: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the rights that any new file has here.

    The library's own are the owner's alone: a server under another account could not load them.
    """
    save_file(dict(weights), file, metadata=metadata)
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
