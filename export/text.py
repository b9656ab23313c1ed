"""The text encoders of a bundle: of the pipeline, of the router, and whether the two are one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cloud_server.errors import ModelError
from cloud_server.training.encoders import TextEncoder, open_encoder
from export.errors import ExportError

PROBES = ("", "two red apples to the left of a cat", "Ein Haus, 3 Bäume & 1 Auto!", "夜の城 🌙")
SAME_COSINE = 0.9999  # weights stored in half precision stay above 0.99999


def open_text(source: str | Path) -> TextEncoder:
    """Open a text encoder in any format that a router can be trained on; raises ExportError."""
    try:
        return open_encoder(source)
    except ModelError as err:
        raise ExportError(str(err)) from err


def gives(encoder: TextEncoder, prompt: str, state: Sequence[float]) -> bool:
    """Tell whether the pooled state of `prompt` is this one (d,), within half precision."""
    similar = cosine_similarity(torch.tensor(encoder.state(prompt)), torch.tensor(state), dim=0)
    return bool(similar >= SAME_COSINE)


@torch.inference_mode()
def are_one(a: TextEncoder, b: TextEncoder) -> bool:
    """Tell whether two text encoders give the same states for the same prompts."""
    if a.tower.width != b.tower.width:
        return False
    for prompt in PROBES:
        (words, states), (others, their_states) = _read(a, prompt), _read(b, prompt)
        if not np.array_equal(words, others):
            return False
        similar = cosine_similarity(states, their_states, dim=-1)
        if len(similar) and similar.min() < SAME_COSINE:
            return False
    return True


def _read(encoder: TextEncoder, prompt: str) -> tuple[NDArray[np.int64], Tensor]:
    """Return ids (n,) and states (n, d) of the words; one of the two may pad and the other not."""
    tokens = encoder.tokenizer.encode(prompt)
    states, _ = encoder.tower(torch.from_numpy(tokens.input_ids))
    return tokens.input_ids[tokens.mask > 0], states[torch.from_numpy(tokens.mask) > 0]
