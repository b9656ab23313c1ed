"""What the judge reads in a picture, and how much of a scene that is.

A judged share is None where the scene does not ask for it, so that it stands in no mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cloud_server.training.starter.scenes import Box, Scene


@dataclass(frozen=True, slots=True)
class Found:
    """An object in a picture; `colour` is None for the colours the thing has of its own.

    `box` is (x0, y0, x1, y1) in shares of the picture, `score` in 0..1 how sure the judge is.
    """

    noun: str
    colour: str | None
    box: Box
    score: float = 1.0

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, (x, y)."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True, slots=True)
class Reading:
    """What is in a picture: the objects found, the surest first, and the likeliest place."""

    objects: tuple[Found, ...]
    place: str


def match(scene: Scene, reading: Reading) -> list[list[Found]]:
    """Return what was found for each group of a scene, at most as many as it asks for.

    Nouns must be right. Of several objects of a noun, groups first take those of their own colour,
    and then the surest.
    """
    left = list(reading.objects)
    taken: list[list[Found]] = [[] for _ in scene.groups]

    def take(fits: Callable[[Found, int], bool]) -> None:
        for index, group in enumerate(scene.groups):
            mine = [found for found in left if found.noun == group.noun and fits(found, index)]
            for found in mine[: group.count - len(taken[index])]:
                taken[index].append(found)
                left.remove(found)

    take(lambda found, index: found.colour == scene.groups[index].colour)
    take(lambda found, index: True)
    return taken


def objects_right(scene: Scene, reading: Reading) -> float:
    """Return the share of the objects asked for that were found, each counted by itself."""
    return sum(len(found) for found in match(scene, reading)) / scene.objects


def colours_right(scene: Scene, reading: Reading) -> float | None:
    """Return the share of found objects in the colour asked for; None if none was asked or found.

    A red apple that has an apple's own colours instead of all being red counts as wrong.
    """
    right = [
        found.colour == group.colour
        for group, mine in zip(scene.groups, match(scene, reading), strict=True)
        if group.colour
        for found in mine
    ]
    return sum(right) / len(right) if right else None


def counts_right(scene: Scene, reading: Reading) -> float:
    """Return the share of the nouns asked for that were found exactly as often as asked."""
    nouns = [found.noun for found in reading.objects]
    asked: dict[str, int] = {}
    for group in scene.groups:
        asked[group.noun] = asked.get(group.noun, 0) + group.count
    return sum(nouns.count(noun) == count for noun, count in asked.items()) / len(asked)


def relation_right(scene: Scene, reading: Reading) -> float | None:
    """Return 1 if the relation holds, 0 if not, None if the scene has none.

    It holds if the centre of every object found for the first group stands in it to the centre of
    every other object found; where a group was not found at all, it does not.
    """
    if scene.relation is None:
        return None
    first, *others = match(scene, reading)
    if not first or not all(others):
        return 0.0
    axis, sign = _DIRECTIONS[scene.relation]
    ours = [sign * found.centre[axis] for found in first]
    theirs = [sign * found.centre[axis] for mine in others for found in mine]
    return float(max(ours) < min(theirs))


def place_right(scene: Scene, reading: Reading) -> float | None:
    """Return 1 if the place is the one asked for, 0 if not, None if the scene names none."""
    return None if scene.place is None else float(reading.place == scene.place)


_DIRECTIONS: Final = {
    "to the left of": (0, 1.0),
    "to the right of": (0, -1.0),
    "above": (1, 1.0),
    "below": (1, -1.0),
}
MEASURES: Final[dict[str, Callable[[Scene, Reading], float | None]]] = {
    "objects": objects_right,
    "colours": colours_right,
    "counts": counts_right,
    "relations": relation_right,
    "places": place_right,
}
