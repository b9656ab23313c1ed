"""Whether a picture shows what was asked for: its own prompt against others.

RouteT2I has no such metric; none of its ten looks at the prompt. How it is measured was chosen on
the starter pair by how far two seeds agree on edge minus cloud (r, over 832 prompts; about 0.06 to
either side), by how far the models lie apart (d, the mean of edge minus cloud in its own spread,
over 3,000), and by what a judge that is not CLIP says of the same (j, correlation over 700):

    cosine with the own prompt alone                 r 0.40  d 0.52  j 0.33
    softmax, CLIP's own scale, 128 random others     r 0.28  d 0.28  j 0.25
    softmax, a quarter of it, 128 random others      r 0.38  d 0.49  j 0.26   (the default)
    softmax, a quarter of it, 32 of the nearest 100  r 0.41  d 0.46  j 0.24
    mean pairwise sigmoid, CLIP's own scale, 128     r 0.20  d 0.16  j 0.25
    mean pairwise sigmoid, a quarter of it, 128      r 0.38  d 0.36  j 0.34
    cosine less the mean cosine of 128 others        r 0.39  d 0.49  j 0.31

With the CLIP of that day no form beats the cosine, which a `count` of 0 gives.
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
