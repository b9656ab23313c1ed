"""Labels for pictures, adapted to their client by its own earlier pictures (ICIIA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_agent.bundle import Bundle, RecognizerSpec
from edge_agent.config import LONGEST_HISTORY
from edge_agent.errors import REBUILD, BundleError, PictureError
from edge_agent.recognition.history import Features, History
from edge_agent.recognition.pictures import Pixels, read_picture, square
from edge_agent.runtime.networks import Networks
from edge_agent.types import Memory, Provider

if TYPE_CHECKING:
    from PIL.Image import Image

TOGETHER = 16  # pictures of a folder that are each other's context


@dataclass(frozen=True, slots=True)
class Label:
    """A class and how probable it is, 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Recognition:
    """What is in `file`, the likeliest first.

    `history` pictures of the client were looked at; `adapted` says whether they had a say, which
    they have not where they are too few. `note` is for the owner.
    """

    file: Path
    labels: tuple[Label, ...]
    adapted: bool
    history: int
    note: str | None = None


class Recognizer:
    """The recogniser of a bundle; `histories` is the folder of its clients' histories.

    `history` is how many earlier pictures are looked at, 0 to 60, by default what the bundle
    was trained for; more are never kept. Raises BundleError when the bundle has no recogniser.
    """

    def __init__(
        self,
        bundle: Bundle,
        histories: Path,
        *,
        history: int | None = None,
        top: int = 5,
        provider: Provider = Provider.AUTO,
        memory: Memory = Memory.NORMAL,
        threads: int | None = None,
    ) -> None:
        if bundle.recognizer is None:
            raise BundleError(
                f"the bundle {bundle.path} has no recogniser; run `python -m export "
                "--recognizer FOLDER` to add one"
            )
        self._spec: RecognizerSpec = bundle.recognizer
        self._histories, self._top = histories, top
        self._length = self._spec.history if history is None else history
        if not 0 <= self._length <= LONGEST_HISTORY:
            raise ValueError(f"a history of {self._length} is not from 0 to {LONGEST_HISTORY}")

        self._networks = Networks(bundle, provider=provider, memory=memory, threads=threads)
        # Features of today are compared with those that were kept: in 32 bits all of them.
        self._backbone, self._head, self._adapted = (
            self._networks.get(name, precise=True)
            for name in (self._spec.backbone, self._spec.head, self._spec.adapted)
        )

    def recognize(self, file: Path, client: str) -> Recognition:
        """Recognise one picture after those that the client had before, and remember it.

        Raises PictureError, and then nothing is remembered, or HistoryError.
        """
        (one,) = self._together({file: self._read(file)}, client)
        return one

    def recognize_all(
        self, files: Sequence[Path], client: str
    ) -> Iterator[Recognition | PictureError]:
        """Recognise pictures 16 at a time, each with the others for context beside the history.

        A picture that cannot be read comes as its error, and the others go on without it.
        """
        for start in range(0, len(files), TOGETHER):
            read: dict[Path, Pixels] = {}
            for file in files[start : start + TOGETHER]:
                try:
                    read[file] = self._read(file)
                except PictureError as err:
                    yield err
            if read:
                yield from self._together(read, client)

    def tags(self, image: Image) -> tuple[Label, ...]:
        """Return what the backbone alone sees in a picture, whoever's it is; nothing is kept."""
        pixels = square(image, self._spec.side, self._spec.crop)
        (features,) = self._backbone.run({"pictures": pixels[None]})
        (logits,) = self._head.run({"features": features})
        return self._labels(logits[0])

    def _read(self, file: Path) -> Pixels:
        return read_picture(file, self._spec.side, self._spec.crop)

    def _together(self, pictures: Mapping[Path, Pixels], client: str) -> list[Recognition]:
        spec = self._spec
        # What cannot answer is to say so before anything is remembered.
        self._networks.open_now(self._backbone, self._head, self._adapted)
        (features,) = self._backbone.run({"pictures": np.stack(list(pictures.values()))})
        if features.shape[1] != spec.width:
            raise BundleError(
                f"the recogniser's features have {features.shape[1]} numbers and not "
                f"{spec.width}; {REBUILD}"
            )
        kept = History(self._histories, client, spec.digest, spec.width).append(features)
        before = kept.features[max(0, len(kept.features) - self._length) :]
        logits, adapted = self._logits(features, before)
        context = len(before) + len(pictures) - 1 if self._length else 0
        return [
            Recognition(file, self._labels(row), adapted, context, kept.note)
            for file, row in zip(pictures, logits, strict=True)
        ]

    def _labels(self, logits: Features) -> tuple[Label, ...]:
        names = self._spec.classes
        if len(logits) != len(names):
            raise BundleError(
                f"the recogniser answers with {len(logits)} numbers for {len(names)} classes; "
                f"{REBUILD}"
            )
        odds = np.exp(logits - logits.max(), dtype=np.float64)
        best = np.argsort(-logits, kind="stable")[: self._top]
        return tuple(Label(names[i], float(odds[i] / odds.sum())) for i in best)

    def _logits(self, features: Features, before: Features) -> tuple[Features, bool]:
        """Return logits (n, C) of new features, and whether their context had a say."""
        least, context = self._spec.least_history, len(before) + len(features) - 1
        if least is None or context < least or self._length == 0:
            return self._head.run({"features": features})[0], False
        return self._adapted.run({"before": before, "features": features})[0], True
