"""Whether a picture shows what was asked for: its own prompt against others.

RouteT2I has no such metric; none of its ten looks at the prompt.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from cloud_server.errors import DataError

ALIGNMENT = "Alignment"
ALIGNMENT_WEIGHT = 0.5  # what is drawn counts as much as how it looks
DISTRACTORS = 32


@dataclass(frozen=True, slots=True)
class Alignment:
    """The alignment metric: its share of all weight, and the prompts that distract.

    For every prompt `count` others are drawn with `seed`; which ones depends on the prompt and on
    `prompts`, and on nothing that was drawn before.
    """

    weight: float
    prompts: tuple[str, ...]
    count: int = DISTRACTORS
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise DataError(f"alignment has the weight {self.weight:g}; give one between 0 and 1")
        if len(set(self.prompts)) < 2:
            raise DataError(
                "alignment needs two different prompts or more, to tell one from the others; "
                "give more prompts or --alignment 0"
            )

    def distractors(self, prompt: str) -> list[int]:
        """Return where in `prompts` those lie that distract from `prompt`, at most `count`."""
        known = hashlib.sha256(prompt.encode()).digest()[:8]
        rng = np.random.default_rng([self.seed, int.from_bytes(known)])
        drawn = rng.choice(len(self.prompts), min(self.count + 1, len(self.prompts)), replace=False)
        return [i for i in drawn.tolist() if self.prompts[i] != prompt][: self.count]
