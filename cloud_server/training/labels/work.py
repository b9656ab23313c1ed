"""Drawing and scoring by batches: in this process, or in several.

What a batch comes to depends on the batch alone, so that who does it, and when, changes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cloud_server.errors import ServerError
from cloud_server.training.labels.painters import Painter
from cloud_server.training.labels.store import Key
from cloud_server.training.quality import Metric

if TYPE_CHECKING:
    from PIL.Image import Image

_SEED_STRIDE = 1_000_003
DIGITS = 7


class Scorer(Protocol):
    """What labelling needs of `QualityScorer`."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metrics, in the order of the scores, with weights that sum to 1."""
        ...

    @property
    def digest(self) -> str:
        """What tells the scores of the metrics' texts by this scorer from any other's."""
        ...

    @property
    def origin(self) -> Mapping[str, Any]:
        """What scores, fit for JSON."""
        ...

    def score(self, pictures: Sequence[Image], prompts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """Return the qualities (B, k) of pictures drawn for prompts."""
        ...


Batch = tuple[Key, ...]
Scores = list[list[float]]
Spread = Callable[["Work", Sequence[Batch]], Iterator[tuple[Batch, Scores]]]
"""Yields every batch with its scores, in any order."""


@dataclass(frozen=True, slots=True)
class Work:
    """All that it takes to label any batch."""

    painter: Painter
    scorer: Scorer
    prompts: tuple[str, ...]

    def __call__(self, batch: Batch) -> Scores:
        """Draw a batch and return its scores."""
        asked = [self.prompts[prompt] for prompt, _ in batch]
        pictures = self.painter.draw(asked, [noise(*key) for key in batch])
        q = self.scorer.score(pictures, asked)
        return [[round(float(value), DIGITS) for value in row] for row in q]


def noise(prompt: int, seed: int) -> int:
    """Return the seed of a picture's noise: no two prompts share one, both models do."""
    return seed * _SEED_STRIDE + prompt


def seed_of(noise: int) -> int:
    """Return the seed that a picture was drawn with, by the seed of its noise."""
    return noise // _SEED_STRIDE


def here(work: Work, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Scores]]:
    """Do everything in this process."""
    for batch in batches:
        yield batch, work(batch)


def in_processes(workers: int, threads: int = 1) -> Spread:
    """Return what spreads work over processes, each with a painter and scorer of its own.

    Raises ServerError when a process dies; what it did not return is not done.
    """

    def spread(work: Work, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Scores]]:
        # Spawned: gRPC and torch do not survive a fork.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            min(workers, len(batches)), context, initializer=_begin, initargs=(work, threads)
        )
        try:
            batch_of = {pool.submit(_do, batch): batch for batch in batches}
            for done in as_completed(batch_of):
                yield batch_of[done], done.result()
        except BrokenProcessPool as error:
            raise ServerError(
                "a worker process died, out of memory perhaps; what is labelled is kept, so run "
                "the same command again, with fewer --workers or a smaller --batch"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return spread


_work: Work | None = None


def _begin(work: Work, threads: int) -> None:
    global _work
    import torch

    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = work


def _end_with_parent() -> None:
    """End this worker when the run that it works for was killed: nobody takes its results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _do(batch: Batch) -> Scores:
    assert _work is not None
    return _work(batch)
