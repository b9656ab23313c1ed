"""How much a prompt asks for: its nouns, the paper's cheap cue for what the edge draws badly."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cloud_server.training.starter.captions import read_groups

OBJECTS, NOUNS = "objects", "nouns"


def count_nouns(prompts: Sequence[str]) -> tuple[NDArray[np.float64], str]:
    """Return a number per prompt (N,) and what was counted.

    In captions of the starter world these are the objects asked for ("two red apples": 2), else the
    words that TextBlob's pattern tagger takes for nouns, by a lexicon of English.
    """
    groups = [read_groups(prompt) for prompt in prompts]
    if all(groups):
        return np.array([float(sum(g.count for g in of_one)) for of_one in groups]), OBJECTS
    from textblob.en.taggers import PatternTagger

    tagger = PatternTagger()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its lexicon's file open
        tags = [tagger.tag(prompt) for prompt in prompts]
    return np.array([float(sum(t.startswith("NN") for _, t in of_one)) for of_one in tags]), NOUNS


def count_words(prompts: Sequence[str]) -> NDArray[np.float64]:
    """Return the number of words of every prompt (N,)."""
    return np.array([float(len(prompt.split())) for prompt in prompts])
