"""The scores of one model so far: a file of JSON lines that a kill cannot spoil.

Its first line says all that decides a score; each line after it holds the scores of a batch, is
written at once and reaches the disk before the next batch is begun.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cloud_server.errors import DataError, ServerError

Key = tuple[int, int]
"""A picture: index of its prompt, seed."""


class Store:
    """The scores (k,) of pictures of one model in `folder`, named by the digest of `header`.

    A context manager: inside it the file is open for this process alone. Raises ServerError where
    another has it.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self._header = json.dumps(header, sort_keys=True)
        self.digest = hashlib.sha256(self._header.encode()).hexdigest()
        self.file = folder / f"labels-{self.digest[:12]}.jsonl"
        self.scores: dict[Key, list[float]] = {}

    def __enter__(self) -> Self:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._lines = self.file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lines.close()
            raise ServerError(
                f"another run is writing {self.file}; wait for it or choose another --work"
            ) from error
        try:
            self._resume()
        except BaseException:
            self._lines.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # of a line that could not be written, which was said
            self._lines.close()

    def add(self, keys: Sequence[Key], scores: Sequence[Sequence[float]]) -> None:
        """Keep the scores of some pictures, for good when this returns."""
        self._write(json.dumps({"at": keys, "q": scores}))
        self.scores.update(zip(keys, map(list, scores), strict=True))

    def _write(self, line: str) -> None:
        try:
            self._lines.write(line + "\n")
            self._lines.flush()
            os.fsync(self._lines.fileno())
        except OSError as error:
            raise ServerError(
                f"{self.file} cannot be written ({error.strerror}); make room and run the same "
                "command again, or choose another --work"
            ) from error

    def _resume(self) -> None:
        """Read what is there, cutting off a half-written line."""
        self._lines.seek(0)
        text = self._lines.read()
        whole = text[: text.rfind("\n") + 1]
        self._lines.truncate(len(whole))  # json.dumps writes ASCII: characters are bytes
        if not whole:
            self._write(self._header)
            return
        for number, line in enumerate(whole.splitlines()[1:], start=2):
            try:
                record = json.loads(line)
                keys = [(int(prompt), int(seed)) for prompt, seed in record["at"]]
                self.scores.update(zip(keys, record["q"], strict=True))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.file} is damaged at line {number} ({error}); remove that line"
                ) from error
