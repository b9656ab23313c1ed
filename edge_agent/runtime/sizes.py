"""Which sizes a network was compiled for, kept so that another process opens it ahead of its run.

A provider that compiles for a size needs the shapes of all inputs, of which only some are known
before a prompt is read.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from edge_agent.runtime.network import Shapes

MOST = 8  # sizes of one network; the one that was used last comes first


def remembered(file: Path, known: Shapes) -> Shapes | None:
    """Return the shapes last used that agree with the `known` ones, None where none do."""
    for shapes in _read(file):
        if known.items() <= shapes.items():
            return shapes
    return None


def remember(file: Path, shapes: Shapes) -> None:
    """Note that the network was opened for these shapes; what cannot be written is not known."""
    before = _read(file)
    if before[:1] == [shapes]:
        return
    kept = [shapes, *(other for other in before if other != shapes)][:MOST]
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(kept), encoding="utf-8")
        partial.replace(file)


def _read(file: Path) -> list[Shapes]:
    try:
        return [
            {name: tuple(map(int, shape)) for name, shape in each.items()}
            for each in json.loads(file.read_bytes())
        ]
    except (OSError, ValueError, TypeError, AttributeError):
        return []  # of nobody, or of another version
