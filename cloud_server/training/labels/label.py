"""Both models draw the same prompts with the same seeds, and CLIP scores every picture."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cloud_server.errors import DataError
from cloud_server.training.labels.painters import Painter
from cloud_server.training.labels.store import Store
from cloud_server.training.labels.table import MODELS, Labels, over_seeds
from cloud_server.training.labels.work import Batch, Scorer, Spread, Work, here

VERSIONS = ("routet2i-edge", "torch", "diffusers", "transformers", "open_clip_torch")


def label(
    edge: Painter,
    cloud: Painter,
    scorer: Scorer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    edge_seeds: Sequence[int] | None = None,
    batch: int = 16,
    spread: Spread = here,
) -> Labels:
    """Draw and score every prompt with every seed on both models, and keep the scores in `out`.

    The edge draws with `edge_seeds`, where given, which can be many where it is fast. Both models
    start a picture from the same noise, which differs from prompt to prompt. Every model has a
    store of its own, named by the digest of all that decides its labels but the seeds: a run that
    was killed goes on with the batches that are missing, more seeds cost only themselves, and a
    new edge model leaves the cloud's labels as they are.
    """
    if len(set(prompts)) < len(prompts):
        raise DataError("a prompt stands twice among those to label; give each once")
    edge_seeds = seeds if edge_seeds is None else edge_seeds
    every = sorted({*edge_seeds, *seeds})
    q, digests, models = [], [], {}
    for side, painter, known in zip(MODELS, (edge, cloud), (edge_seeds, seeds), strict=True):
        work = Work(painter, scorer, tuple(prompts))
        header = {"model": painter.digest, "scorer": scorer.digest, "prompts": list(prompts)}
        with Store(out, header) as store:
            scores = _label_one(side, work, known, store, batch, spread)
        q.append(over_seeds(scores, known, every))
        digests.append(store.digest)
        models[side] = {
            "name": painter.name,
            "digest": painter.digest,
            "settings": dict(painter.settings),
        }
    names = tuple(metric.name for metric in scorer.metrics)
    drawn = [list(seeds)] if list(edge_seeds) == list(seeds) else [list(seeds), list(edge_seeds)]
    digest = hashlib.sha256(json.dumps([digests, *drawn]).encode()).hexdigest()[:24]
    rounded = np.stack(q).astype(np.float32).astype(np.float64)  # as a file holds them
    return Labels(
        rounded,
        tuple(prompts),
        tuple(every),
        names,
        digest,
        tuple(scorer.metrics),
        {"models": models, "scorer": dict(scorer.origin), "versions": _versions()},
    )


def _label_one(
    side: str, work: Work, seeds: Sequence[int], store: Store, batch: int, spread: Spread
) -> NDArray[np.float64]:
    """Return the qualities (prompt, seed, metric) of one model."""
    wanted = [(prompt, seed) for prompt in range(len(work.prompts)) for seed in seeds]
    missing = [part for seed in seeds for part in _missing(len(work.prompts), seed, store, batch)]
    left = sum(map(len, missing))
    with tqdm(total=len(wanted), initial=len(wanted) - left, desc=side, unit="picture") as bar:
        for keys, scores in spread(work, missing) if missing else ():
            store.add(keys, scores)
            bar.update(len(keys))
    shape = (len(work.prompts), len(seeds), len(work.scorer.metrics))
    return np.array([store.scores[key] for key in wanted]).reshape(shape)


def _missing(prompts: int, seed: int, store: Store, batch: int) -> list[Batch]:
    """Return the batches of a seed that are not in the store, cut as an unbroken run cuts them.

    A picture that is drawn in another batch may differ in its last bits.
    """
    keys = [(prompt, seed) for prompt in range(prompts)]
    cuts = [keys[start : start + batch] for start in range(0, prompts, batch)]
    left = [tuple(key for key in cut if key not in store.scores) for cut in cuts]
    return [cut for cut in left if cut]


def _versions() -> dict[str, str]:
    """Return the versions of what draws and scores."""
    installed = {}
    for name in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):  # a clone that is not installed
            installed[name] = version(name)
    return installed
