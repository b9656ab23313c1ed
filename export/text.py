"""The text encoders of a bundle: of the pipeline, of the router, and whether the two are one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
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
        ids, others = (each.tokenizer.encode(prompt).input_ids for each in (a, b))
        if not np.array_equal(ids, others):
            return False
        read = torch.from_numpy(ids)
        similar = cosine_similarity(a.tower(read)[0], b.tower(read)[0], dim=-1)
        if similar.min() < SAME_COSINE:
            return False
    return True
