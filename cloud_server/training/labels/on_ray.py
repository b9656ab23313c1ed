"""Labelling spread over a cluster with Ray Data: the same batches, the same scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from cloud_server.errors import ServerError
from cloud_server.training.labels.work import Batch, Scores, Spread, Work

Row = dict[str, str]


def on_ray(workers: int, threads: int = 1, *, gpus: float = 0.0) -> Spread:
    """Return what spreads work over `workers` actors, with `threads` CPUs and `gpus` GPUs each.

    It joins the cluster that RAY_ADDRESS names, or begins one here. Every node needs this package,
    and the models at the same place. Raises ServerError where ray is missing or a batch fails.
    """
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise ServerError(
            "--ray needs the package 'ray', which is not installed; in a clone of the project run "
            "pip install -c constraints.txt '.[cloud,ray]'"
        ) from error

    def spread(work: Work, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Scores]]:
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        # A block a batch, so that each comes back, and is kept, as soon as it is done.
        rows = ray.data.from_items(
            [{"batch": json.dumps(batch)} for batch in batches], override_num_blocks=len(batches)
        )
        done = rows.map(
            _Labeller,
            fn_constructor_args=(work, threads),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(batches))),
            num_cpus=threads,
            num_gpus=gpus,
        )
        try:
            for row in done.iter_rows():
                batch = tuple((prompt, seed) for prompt, seed in json.loads(row["batch"]))
                yield batch, json.loads(row["scores"])
        except ray.exceptions.RayError as error:
            raise ServerError(
                f"ray could not label a batch ({str(error).strip().splitlines()[-1]}); what is "
                "labelled is kept, so run the same command again"
            ) from error

    return spread


class _Labeller:
    """An actor with a painter and a scorer of its own."""

    def __init__(self, work: Work, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._work = work

    def __call__(self, row: Row) -> Row:
        """Label one batch; Ray's rows hold both as JSON."""
        batch = tuple((prompt, seed) for prompt, seed in json.loads(row["batch"]))
        return {"batch": row["batch"], "scores": json.dumps(self._work(batch))}
