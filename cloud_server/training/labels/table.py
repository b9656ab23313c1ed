"""Labels: the quality of every picture, in memory and as one Parquet file.

The file has a row a picture, by model, prompt and seed, and a float32 column a metric, which keeps
seven digits; the schema's metadata say with which models, CLIP and texts it was made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cloud_server.errors import DataError
from cloud_server.training.quality import Metric

FORMAT = 1
MODELS = ("edge", "cloud")
_KEY = b"routet2i"
_INDEX = ("model", "prompt", "seed")


@dataclass(frozen=True, slots=True)
class Labels:
    """Qualities `q` (model, prompt, seed, metric), models in the order edge, cloud.

    Where a model drew a prompt with fewer seeds than there are, it has NaN for the others.
    `digest` tells these labels from those of other models, prompts, seeds or metrics. `described`
    has the text and weight of every metric, and `origin` what can be put in JSON of the models,
    the CLIP and the versions; both are empty where nobody knows.
    """

    q: NDArray[np.float64]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    digest: str
    described: tuple[Metric, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def drawn(self) -> NDArray[np.bool_]:
        """Which model drew which prompt with which seed, (model, prompt, seed)."""
        return np.asarray(np.isfinite(self.q).any(3))

    @property
    def mean(self) -> NDArray[np.float64]:
        """Qualities (model, prompt, metric), averaged over the seeds that a model drew it with."""
        drawn = self.drawn[..., None]
        return np.asarray(np.where(drawn, self.q, 0.0).sum(2) / drawn.sum(2), np.float64)

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weights (k,) of the metrics in a PRS, which sum to 1; equal where nobody knows."""
        known = [metric.weight for metric in self.described] or [1.0] * self.q.shape[-1]
        return np.asarray(known, np.float64) / np.sum(known)

    def check_trainable(self) -> None:
        """Raise DataError where nothing can be learnt: one prompt, or a metric without news."""
        if len(self.prompts) < 2:
            raise DataError("these labels have one prompt only; label two or more to train on them")
        every = zip(
            self.metrics, *(np.moveaxis(q, -1, 0) for q in (self.q, self.mean)), strict=True
        )
        for name, q, (edge, cloud) in every:
            if np.nanmin(q) == np.nanmax(q):
                raise DataError(
                    f"metric {name!r} is {np.nanmin(q):g} for every picture, so there is nothing "
                    "to learn from it; leave it out of the metrics or correct its texts"
                )
            if np.ptp(edge - cloud) == 0:
                raise DataError(
                    f"edge and cloud differ by the same on metric {name!r} for every prompt; are "
                    "they one model?"
                )


def write(labels: Labels, file: Path) -> None:
    """Write labels to a Parquet file, whole or not at all; equal labels give equal bytes."""
    drawn = labels.drawn
    grid = np.stack(np.nonzero(drawn)).astype(np.int32)
    values = (MODELS, labels.prompts, labels.seeds)
    columns: dict[str, pa.Array] = {
        name: pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(known))
        for name, codes, known in zip(_INDEX, grid, values, strict=True)
    }
    for name, q in zip(labels.metrics, np.moveaxis(labels.q, -1, 0), strict=True):
        columns[name] = pa.array(q[drawn].astype(np.float32))
    described = labels.described or [
        Metric(name, "", "", weight)
        for name, weight in zip(labels.metrics, labels.weights.tolist(), strict=True)
    ]
    facts = {
        "format": FORMAT,
        "digest": labels.digest,
        "metrics": [asdict(metric) for metric in described],
        **labels.origin,
    }
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(facts)})
    partial = file.with_name(f".{file.name}.partial")
    try:
        pq.write_table(
            table,
            partial,
            compression="zstd",
            use_dictionary=list(_INDEX),
            column_encoding=dict.fromkeys(labels.metrics, "BYTE_STREAM_SPLIT"),
        )
        os.replace(partial, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DataError(f"cannot write {file}: {error.strerror or error}") from error


def read(file: Path) -> Labels:
    """Read what `write` wrote, rows in any order. Raises DataError for anything else."""
    table, facts = _opened(file)
    described = _described(facts, file)
    names = tuple(metric.name for metric in described)
    for name in (*_INDEX, *names):
        if name not in table.column_names:
            raise DataError(f"{file} has no column {name!r}, which its metadata promise")
    for name in _INDEX:
        if table[name].null_count:
            raise DataError(f"{file} has a row without {name}; label again or drop the row")
    rows = list(zip(*(table[name].to_pylist() for name in _INDEX), strict=True))
    q = _qualities(table, names, rows, file)
    models = {model for model, _, _ in rows}
    for model in MODELS:
        if model not in models:
            raise DataError(f"{file} has no labels of the model {model!r}; it needs edge and cloud")
    prompts = tuple(dict.fromkeys(prompt for _, prompt, _ in rows))
    by_model = [sorted({seed for m, _, seed in rows if m == model}) for model in MODELS]
    wanted = [
        (m, p, s) for m, known in zip(MODELS, by_model, strict=True) for p in prompts for s in known
    ]
    if len(rows) != len(wanted) or set(rows) != set(wanted):
        raise DataError(
            f"{file} has {len(rows)} rows and not one for each of {len(prompts)} prompts with "
            "{} seeds of the edge and {} of the cloud; label again".format(*map(len, by_model))
        )
    seeds = tuple(sorted({*by_model[0], *by_model[1]}))
    kinds = (MODELS, prompts, seeds)
    places = [{value: i for i, value in enumerate(values)} for values in kinds]
    at = [[place[row[i]] for row in rows] for i, place in enumerate(places)]
    spread = np.full((*map(len, kinds), len(names)), np.nan)
    spread[tuple(at)] = q
    origin = {k: v for k, v in facts.items() if k not in ("format", "digest", "metrics")}
    digest = str(facts.get("digest", ""))
    return Labels(spread, prompts, seeds, names, digest, described, origin)


def join(parts: Sequence[Labels]) -> Labels:
    """Return labels of the same models on different prompts as one.

    A prompt that stands in several is taken from the first of them. Raises DataError for labels
    of other models, or that were scored otherwise.
    """
    first, *others = parts
    if not others:
        return first
    for part in others:
        if part.origin.get("models") != first.origin.get("models"):
            raise DataError("labels of other models cannot be joined; label again with the same")
        if judge_of(part) != judge_of(first):
            raise DataError("labels by another CLIP cannot be joined; label again with the same")
        if part.described != first.described or part.metrics != first.metrics:
            raise DataError("labels of other metrics cannot be joined; label again with the same")
    seeds = sorted({seed for part in parts for seed in part.seeds})
    prompts: list[str] = []
    q = []
    for part in parts:
        known = set(prompts)
        rows = [row for row, prompt in enumerate(part.prompts) if prompt not in known]
        q.append(over_seeds(part.q[:, rows], part.seeds, seeds))
        prompts += [part.prompts[row] for row in rows]
    digest = hashlib.sha256(json.dumps([part.digest for part in parts]).encode()).hexdigest()[:24]
    return replace(
        first, q=np.concatenate(q, 1), prompts=tuple(prompts), seeds=tuple(seeds), digest=digest
    )


def over_seeds(
    q: NDArray[np.float64], known: Sequence[int], seeds: Sequence[int]
) -> NDArray[np.float64]:
    """Spread qualities (..., known, metric) over ascending `seeds`, NaN for those not known."""
    spread = np.full((*q.shape[:-2], len(seeds), q.shape[-1]), np.nan)
    spread[..., np.searchsorted(seeds, known), :] = q
    return spread


def judge_of(labels: Labels) -> dict[str, Any]:
    """Return what scored the pictures, but for which prompts alignment compared theirs with."""
    scorer = dict(labels.origin.get("scorer", {}))
    alignment = scorer.get("alignment") or {}
    return scorer | {"alignment": {k: v for k, v in alignment.items() if k != "seed"}}


def _qualities(
    table: pa.Table, names: tuple[str, ...], rows: list[tuple[str, str, int]], file: Path
) -> NDArray[np.float64]:
    """Return the qualities (row, metric) of a file, all of them numbers."""
    columns = []
    for name in names:
        kind = table[name].type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise DataError(f"{file} has {kind} in column {name!r}; it needs numbers")
        columns.append(table[name].to_numpy().astype(np.float64))
    q = np.stack(columns, -1)
    for row, column in np.argwhere(~np.isfinite(q)):
        model, prompt, seed = rows[row]
        raise DataError(
            f"{file} has {q[row, column]} as {names[column]} of {prompt!r} ({model}, seed {seed}); "
            "every quality must be a number"
        )
    return q


def read_for_training(*files: Path) -> Labels:
    """Read labels that something can be learnt from, joined where there are several files.

    Raises DataError, also where nothing can be learnt or the files do not go together.
    """
    try:
        labels = join([read(file) for file in files])
        labels.check_trainable()
    except DataError as error:
        where = ", ".join(map(str, files))
        raise DataError(str(error) if where in str(error) else f"{where}: {error}") from error
    return labels


def _opened(file: Path) -> tuple[pa.Table, dict[str, Any]]:
    try:
        with pq.ParquetFile(file) as opened:
            table = opened.read()
    except (OSError, pa.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise DataError(f"cannot read the labels in {file}: {said}") from error
    written = (table.schema.metadata or {}).get(_KEY)
    facts = _parsed(written or b"")
    if facts is None:
        raise DataError(
            f"{file} is a Parquet file but holds no labels; cloud-server label writes them"
        )
    if facts.get("format") != FORMAT:
        raise DataError(
            f"{file} has format {facts.get('format')!r} and this version reads {FORMAT}; "
            "label again with it"
        )
    return table, facts


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        facts = json.loads(text)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) else None


def _described(facts: Mapping[str, Any], file: Path) -> tuple[Metric, ...]:
    try:
        described = tuple(Metric(**entry) for entry in facts["metrics"])
    except (KeyError, TypeError):
        described = ()
    if not described:
        raise DataError(f"{file} does not describe its metrics; label again")
    seen = set[str]()
    for metric in described:
        if metric.name in seen:
            raise DataError(f"{file} describes the metric {metric.name!r} twice; label again")
        seen.add(metric.name)
        weight = metric.weight
        if not isinstance(weight, int | float) or not 0 < weight < np.inf:
            raise DataError(
                f"{file} gives the metric {metric.name!r} the weight {weight!r}; it needs a number "
                "above 0"
            )
    return described
