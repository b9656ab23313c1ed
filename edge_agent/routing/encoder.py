"""A prompt as the text encoder sees it: token ids, which of them are the prompt, hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from edge_agent.bundle import REBUILD
from edge_agent.errors import BundleError


class Session(Protocol):
    """A network that is ready to run; outputs come in the order of the bundle's `outputs`."""

    def run(self, feeds: dict[str, NDArray[Any]], /) -> list[NDArray[Any]]:
        """Run the network once on arrays by input name."""
        ...


@dataclass(frozen=True, slots=True)
class Tokens:
    """`input_ids` (1, n) int64 and `mask` (1, n) float32, 1 on the tokens of the prompt itself.

    `dropped` counts the prompt's tokens that did not fit into the context.
    """

    input_ids: NDArray[np.int64]
    mask: NDArray[np.float32]
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens with their hidden states (1, n, d) and the pooled state (1, d), float32.

    `penultimate` (1, n, d) are the states before the last layer, where the encoder gives them.
    """

    input_ids: NDArray[np.int64]
    mask: NDArray[np.float32]
    hidden: NDArray[np.float32]
    pooled: NDArray[np.float32]
    dropped: int = 0
    penultimate: NDArray[np.float32] | None = None


class Tokenizer:
    """CLIP's tokenizer: start token, prompt, end token, padding, always `context_length` long."""

    def __init__(self, file: Path, context_length: int, pad_id: int) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(
                f"the tokenizer {file} cannot be read ({error}); {REBUILD}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Someone who types "<|endoftext|>" means those characters, not the end of the prompt.
        self._tokenizer.encode_special_tokens = True
        frame = self._tokenizer.encode("").ids
        if len(frame) != 2:
            raise BundleError(
                f"the tokenizer {file} puts {len(frame)} tokens around a prompt instead of a start "
                f"and an end token; {REBUILD}"
            )
        self._start, self._end = frame
        self.context_length = context_length
        self.pad_id = pad_id

    def encode(self, prompt: str) -> Tokens:
        """Split a prompt into tokens; those beyond the context are dropped and counted."""
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        # A vocabulary may use a control token for what it does not know.
        ids = [i for i in ids if i not in (self._start, self._end)]
        kept = ids[: self.context_length - 2]
        row = np.full((1, self.context_length), self.pad_id, np.int64)
        row[0, : len(kept) + 2] = [self._start, *kept, self._end]
        mask = np.zeros((1, self.context_length), np.float32)
        mask[0, 1 : len(kept) + 1] = 1.0
        return Tokens(row, mask, len(ids) - len(kept))


class TextEncoder:
    """Tokenizer and text encoder; one run serves the router and, where shared, the UNet."""

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        self._session = session
        self._tokenizer = tokenizer

    def encode(self, prompt: str) -> Encoded:
        """Run the text encoder on one prompt."""
        tokens = self._tokenizer.encode(prompt)
        hidden, pooled, *more = self._session.run({"input_ids": tokens.input_ids})
        penultimate = more[0] if more else None
        return Encoded(tokens.input_ids, tokens.mask, hidden, pooled, tokens.dropped, penultimate)
