"""Whether a picture shows what was asked for: its own prompt against others.

RouteT2I has no such metric; none of its ten looks at the prompt. How it is measured was chosen on
the starter pair by how far two seeds agree on edge minus cloud (r, over 312 prompts; about 0.1 to
either side) and by how far the models lie apart (d, the mean of edge minus cloud in its own spread,
over 3,000):

    cosine with the own prompt alone                 r 0.46  d 0.52
    softmax, CLIP's own scale, 128 random others     r 0.33  d 0.28
    softmax, a quarter of it, 128 random others      r 0.48  d 0.49   (the default)
    softmax, a quarter of it, 32 of the nearest 100  r 0.50  d 0.46
    mean pairwise sigmoid, CLIP's own scale, 128     r 0.13  d 0.16
    cosine less the mean cosine of 128 others        r 0.43  d 0.49

A judge that is not CLIP agrees most with the cosine (correlation over 700 prompts 0.33, with the
default 0.26); a `count` of 0 gives that.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from cloud_server.errors import DataError

ALIGNMENT = "Alignment"
ALIGNMENT_WEIGHT = 0.5  # what is drawn counts as much as how it looks
DISTRACTORS = 128
SHARPNESS = 0.25  # of CLIP's own scale, at which one near distractor decides


@dataclass(frozen=True, slots=True)
class Alignment:
    """The alignment metric: its share of all weight, and the prompts that distract.

    For every prompt `count` others are drawn with `seed`; which ones depends on the prompt and on
    `prompts`, and on nothing that was drawn before. With a `count` of 0 there are none, and the
    metric is the cosine of picture and prompt.
    """

    weight: float
    prompts: tuple[str, ...]
    count: int = DISTRACTORS
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise DataError(f"alignment has the weight {self.weight:g}; give one between 0 and 1")
        if self.count and len(set(self.prompts)) < 2:
            raise DataError(
                "alignment needs two different prompts or more, to tell one from the others; "
                "give more prompts, --distractors 0 or --alignment 0"
            )

    def distractors(self, prompt: str) -> list[int]:
        """Return where in `prompts` those lie that distract from `prompt`, at most `count`."""
        known = hashlib.sha256(prompt.encode()).digest()[:8]
        rng = np.random.default_rng([self.seed, int.from_bytes(known)])
        drawn = rng.choice(len(self.prompts), min(self.count + 1, len(self.prompts)), replace=False)
        return [i for i in drawn.tolist() if self.prompts[i] != prompt][: self.count]
