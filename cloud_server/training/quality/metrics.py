"""Metrics as data: a name, the text of a good and of a bad picture, and a weight."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud_server.errors import DataError

RESERVED = ("Alignment", "prompt", "model", "seed")  # columns of their own in a file of labels
_TEXTS = ("name", "positive", "negative")


@dataclass(frozen=True, slots=True)
class Metric:
    """One quality metric: a text pair and its weight in the PRS."""

    name: str
    positive: str
    negative: str
    weight: float


def load_metrics(path: Path | None = None) -> tuple[Metric, ...]:
    """Read the metrics from a TOML file, by default the ten of the paper.

    Weights count in proportion. Raises DataError naming the file and the entry that is wrong.
    """
    file = path or Path(__file__).with_name("metrics.toml")
    try:
        read = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the metrics in {file}: {error}") from error
    entries = read.get("metric")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{file} holds no metric; write one [[metric]] or more, as metrics.toml")
    if unknown := sorted(read.keys() - {"metric"}):
        raise DataError(f"{file} sets unknown {unknown[0]!r}; it may hold [[metric]] only")
    metrics = tuple(_metric(entry, f"{file}: metric {i}") for i, entry in enumerate(entries, 1))
    seen: set[str] = set()
    for i, metric in enumerate(metrics, 1):
        if metric.name in seen:
            raise DataError(f"{file}: metric {i} is a second {metric.name!r}; rename one of them")
        seen.add(metric.name)
    return metrics


def _metric(entry: Any, where: str) -> Metric:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {entry!r}; write it as a table [[metric]]")
    if name := entry.get("name"):
        where += f" ({name})"
    for key in (*_TEXTS, "weight"):
        if key not in entry:
            raise DataError(f"{where} has no {key}; it needs {', '.join(_TEXTS)} and weight")
    if unknown := sorted(entry.keys() - {*_TEXTS, "weight"}):
        raise DataError(f"{where} sets unknown {unknown[0]!r}; remove it")
    for key in _TEXTS:
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise DataError(f"{where} has {key} = {entry[key]!r}; it needs a text there")
    weight = entry["weight"]
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight <= 0:
        raise DataError(f"{where} has weight = {weight!r}; it needs a number above 0")
    if entry["name"] in RESERVED:
        raise DataError(f"{where} has a name that means something else here; choose another")
    if entry["positive"] == entry["negative"]:
        raise DataError(f"{where} has the same text twice; the poles must differ")
    return Metric(entry["name"], entry["positive"], entry["negative"], float(weight))
