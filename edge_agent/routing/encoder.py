"""A prompt as the text encoder sees it: token ids, which of them are the prompt, hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from edge_agent.errors import REBUILD, BundleError


class Session(Protocol):
    """A network that is ready to run; outputs come in the order of the bundle's `outputs`."""

    def run(self, feeds: dict[str, NDArray[Any]], /) -> list[NDArray[Any]]:
        """Run the network once on arrays by input name."""
        ...


@dataclass(frozen=True, slots=True)
class Tokens:
    """`input_ids` (1, n) int64 and `mask` (1, n) float32, 1 on the prompt's tokens and their end.

    The end token, where the encoder has one, sums the prompt up in an encoder that reads forward.
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
    """A text encoder's own tokenizer: the prompt's tokens in the frame that the model expects.

    Up to `context_length` tokens; shorter prompts are filled up with `pad_id`, if there is one.
    Training reads prompts with this class too, so that ids and masks agree.
    """

    def __init__(self, file: Path, context_length: int, pad_id: int | None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            # CLIP frames a prompt by start and end, BERT by [CLS] and [SEP], T5 has an end only.
            framed = self._tokenizer.encode("a")
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(
                f"the tokenizer {file} cannot be read ({error}); {REBUILD}"
            ) from error
        # Someone who types "<|endoftext|>" means those characters, not the end of the prompt.
        self._tokenizer.encode_special_tokens = True
        words = [i for i, added in enumerate(framed.special_tokens_mask) if not added]
        if not words:
            raise BundleError(f"the tokenizer {file} finds no token in a word; {REBUILD}")
        self._before, self._after = framed.ids[: words[0]], framed.ids[words[-1] + 1 :]
        self.context_length = context_length
        self.pad_id = pad_id

    def encode(self, prompt: str) -> Tokens:
        """Split a prompt into tokens; those beyond the context are dropped and counted."""
        before, after = self._before, self._after
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        # A vocabulary may use a control token for what it does not know.
        ids = [i for i in ids if i not in before and i not in after]
        kept = ids[: self.context_length - len(before) - len(after)]
        row = [*before, *kept, *after]
        ends = [float(i == 0) for i in range(len(after))]
        mask = [0.0] * len(before) + [1.0] * len(kept) + ends
        if not row:  # a network needs something to read
            row, mask = [0], [0.0]
        if self.pad_id is not None:
            empty = self.context_length - len(row)
            row, mask = row + [self.pad_id] * empty, mask + [0.0] * empty
        return Tokens(np.array([row], np.int64), np.array([mask], np.float32), len(ids) - len(kept))


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
