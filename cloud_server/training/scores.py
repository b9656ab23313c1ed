"""A table of scores as labels: human ratings, or any other judgement of pictures by any models.

A CSV file with the columns prompt, model, metric and score, one row a rating, scores from 0 to 1.
Any two of its models can be edge and cloud; what it says of the others helps to learn the pair.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloud_server.errors import DataError
from cloud_server.training.labels import Labels
from cloud_server.training.quality import Metric

Floats = NDArray[np.float64]
COLUMNS = ("prompt", "model", "metric", "score")


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores `table` (N, models, metrics), NaN where there is none; `digest` is the file's."""

    table: Floats
    prompts: tuple[str, ...]
    models: tuple[str, ...]
    metrics: tuple[str, ...]
    digest: str
    file: Path

    def pair(self, edge_model: str, cloud_model: str, metrics: Sequence[str] = ()) -> Labels:
        """Return the labels of two models, one picture each, on `metrics` or on all they share.

        Prompts that lack a score of either model are left out. Raises DataError for a name that
        is not in the table, or when no prompt is left.
        """
        for kind, name in (("edge", edge_model), ("cloud", cloud_model)):
            self._known(f"{kind} model", name, self.models)
        for name in metrics:
            self._known("metric", name, self.metrics)
        if edge_model == cloud_model:
            raise DataError(
                f"edge and cloud are both {edge_model}; name two of {', '.join(self.models)}"
            )
        both = self.table[:, [self.models.index(edge_model), self.models.index(cloud_model)]]
        shared = np.flatnonzero(~np.isnan(both).all(0).any(0))  # metrics that both have
        chosen = tuple(metrics) or tuple(self.metrics[i] for i in shared)
        q = both[:, :, [self.metrics.index(name) for name in chosen]]  # (N, 2, k)
        complete = np.flatnonzero(~np.isnan(q).any((1, 2)))
        if not chosen or not len(complete):
            raise DataError(
                f"{self.file} has no prompt that {edge_model} and {cloud_model} are both rated "
                f"on for {', '.join(chosen) or 'any metric'}; choose other models or metrics"
            )
        prompts = tuple(self.prompts[i] for i in complete)
        choice = repr((self.digest, edge_model, cloud_model, chosen))
        digest = hashlib.sha256(choice.encode()).hexdigest()[:12]
        return Labels(
            np.moveaxis(q[complete], 1, 0)[:, :, None],
            prompts,
            (0,),
            chosen,
            digest,
            tuple(Metric(name, "", "", 1 / len(chosen)) for name in chosen),
            {"models": {"edge": {"name": edge_model}, "cloud": {"name": cloud_model}}},
        )

    def seldom_rated(self, labels: Labels, edge_model: str, cloud_model: str) -> tuple[str, int]:
        """Return the metric of a pair's labels that fewest prompts are rated on, and how many."""
        both = self.table[:, [self.models.index(edge_model), self.models.index(cloud_model)]]
        rated = (~np.isnan(both).any(1)).sum(0)
        name = min(labels.metrics, key=lambda name: rated[self.metrics.index(name)])
        return name, int(rated[self.metrics.index(name)])

    def related(self, labels: Labels, edge_model: str, cloud_model: str) -> Floats:
        """Return what else is known of the prompts of a pair's labels (N, m): all other scores.

        One column for each other model and metric with more than one value, NaN where missing.
        """
        pair = (self.models.index(edge_model), self.models.index(cloud_model))
        used = [self.metrics.index(name) for name in labels.metrics]
        at = {prompt: row for row, prompt in enumerate(self.prompts)}
        rest = self.table[[at[prompt] for prompt in labels.prompts]].copy()
        rest[np.ix_(range(len(rest)), pair, used)] = np.nan
        columns = rest.reshape(len(rest), -1)
        varied = [len(np.unique(column[~np.isnan(column)])) > 1 for column in columns.T]
        return columns[:, varied]

    def _known(self, kind: str, name: str, names: Sequence[str]) -> None:
        if name not in names:
            raise DataError(f"{self.file} has no {kind} {name!r}; it has {', '.join(names)}")


def read_scores(file: Path) -> Scores:
    """Read a table of scores. Raises DataError that names the line at fault."""
    try:
        content = file.read_bytes()
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
        rows = list(_rows(text, file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the scores in {file}: {error}") from error
    if not rows:
        raise DataError(f"{file} has no scores; it needs rows of {', '.join(COLUMNS)}")
    prompts = tuple(dict.fromkeys(row[0] for row in rows))
    models, metrics = (tuple(sorted({str(row[i]) for row in rows})) for i in (1, 2))
    at = [{name: i for i, name in enumerate(each)} for each in (prompts, models, metrics)]
    table = np.full([len(each) for each in at], np.nan)
    for *words, score in rows:
        place = tuple(index[word] for index, word in zip(at, words, strict=True))
        if not np.isnan(table[place]):
            raise DataError(
                f"{file} rates {words[1]} on {words[2]} twice for {words[0]!r}; "
                "average repeated ratings first"
            )
        table[place] = score
    return Scores(table, prompts, models, metrics, hashlib.sha256(content).hexdigest(), file)


def _rows(lines: Iterable[str], file: Path) -> Iterable[tuple[str, str, str, float]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise DataError(
                f"{file} has no column {missing[0]!r} but {', '.join(reader.fieldnames or ())}; "
                f"its first line must name {', '.join(COLUMNS)}"
            )
        for row in reader:
            where = f"line {reader.line_num} of {file}"
            if empty := next((name for name in COLUMNS if not row[name]), None):
                raise DataError(f"{where} has no {empty}; fill it in or drop the line")
            try:
                score = float(row["score"])
            except ValueError:
                score = math.nan
            if not math.isfinite(score):
                raise DataError(
                    f"the score {row['score']!r} in {where} is not a number; correct or drop it"
                )
            if not 0 <= score <= 1:
                raise DataError(
                    f"the score {score:g} of {row['metric']} in {where} is outside 0 to 1; bring "
                    "the metric to that scale first, the best possible score being 1"
                )
            yield row["prompt"], row["model"], row["metric"], score
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {file} is not CSV ({error})") from error
