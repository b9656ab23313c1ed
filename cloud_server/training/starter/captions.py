"""Captions read back: the groups of objects that a caption of the starter world asks for."""

from __future__ import annotations

import re
from functools import cache

from cloud_server.training.starter.scenes import (
    COLOURS,
    COUNTS,
    NOUNS,
    PLURALS,
    SIZES,
    VARIANTS,
    Group,
    Scene,
)


@cache
def _pattern() -> tuple[re.Pattern[str], dict[str, int], dict[str, str], dict[str, str]]:
    counts = {
        said: number for number, word in COUNTS.items() for said in (word, *VARIANTS.get(word, ()))
    } | {"an": 1}
    sizes = {said: size for size in SIZES if size for said in (size, *VARIANTS.get(size, ()))}
    nouns = {noun: noun for noun in NOUNS} | {PLURALS.get(noun, noun + "s"): noun for noun in NOUNS}
    one_of = lambda words: "|".join(sorted(map(re.escape, words), key=len, reverse=True))  # noqa: E731
    text = (
        rf"\b({one_of(counts)}) (?:({one_of(sizes)}) )?(?:({one_of(COLOURS)}) )?"
        rf"({one_of(nouns)})\b"
    )
    return re.compile(text), counts, sizes, nouns


def read_groups(caption: str) -> tuple[Group, ...]:
    """Return the groups of objects in a caption, in its order; none in text of another world."""
    pattern, counts, sizes, nouns = _pattern()
    return tuple(
        Group(nouns[noun], counts[count], colour or None, sizes.get(size))
        for count, size, colour, noun in pattern.findall(caption)
    )


def read_scene(caption: str) -> Scene | None:
    """Return a scene of the objects in a caption, without place or relation; None if it has none.

    It is enough for a judge to say which of the objects asked for are in a picture.
    """
    groups = read_groups(caption)
    return Scene(groups, None, None, (), caption) if groups else None
