"""A file that shows what a picture is becoming, for as long as it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from edge_agent.errors import OutputError
from edge_agent.gallery.png import remove, write_png

if TYPE_CHECKING:
    from PIL.Image import Image


class PreviewFile:
    """`wanted`, or where that is in use `wanted` with a number; gone when the context is left.

    Each picture takes the place of the one before at once, so a viewer never reads half of one.
    """

    def __init__(self, wanted: Path) -> None:
        self._wanted = wanted
        self._path: Path | None = None
        self._given_up = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._path is not None:
            remove(self._path)

    def show(self, image: Image) -> str | None:
        """Write `image`; return what there is to tell: where it is, or why there is none.

        That is told once. A disk that takes no preview is no reason to stop drawing.
        """
        if self._given_up:
            return None
        told, self._path = self._path, self._path or _unused(self._wanted)
        try:
            write_png(self._path, image, {})
        except OutputError as err:
            self._given_up = True
            return f"no more previews: {err}"
        return None if told else f"see {self._path} while it is drawn"


def _unused(wanted: Path) -> Path:
    name, file, copy = wanted.name.removesuffix(".preview.png"), wanted, 1
    while file.exists():
        copy += 1
        file = wanted.with_name(f"{name}-{copy}.preview.png")
    return file
