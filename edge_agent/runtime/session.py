"""A network in onnxruntime: run it, stop it in the middle, and hear of trouble in words."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from edge_agent.errors import BundleError, Cancelled, ConfigError, GenerationError
from edge_agent.runtime import providers
from edge_agent.runtime.network import (
    Backend,
    Shapes,
    cast,
    first_line,
    is_out_of_memory,
    name_of,
    out_of_memory,
    run_error,
)
from edge_agent.types import Cancellation, Memory, Provider

ENGINE = f"onnxruntime {ort.__version__}"
_LOAD_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    MemoryError,
)
_RUN_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    MemoryError,
)
_QUIET = 4  # onnxruntime's "fatal": what it reports is raised as well, and stderr is the user's
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


def default_threads() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Session:
    """One ONNX network in onnxruntime.

    `optimized` says that the file is to run as it is, as one does that was optimised at export:
    loading it then skips the optimiser, which is most of the time to open a session. `shapes`
    fixes the inputs' sizes, for a provider that wants that; `cache` is a folder for what the
    provider compiles. Raises BundleError when the file does not load, ConfigError when the
    provider does not start, GenerationError when memory runs out.
    """

    def __init__(
        self,
        path: Path,
        *,
        provider: Provider = Provider.CPU,
        threads: int | None = None,
        optimized: bool = False,
        memory: Memory = Memory.NORMAL,
        shapes: Shapes | None = None,
        cache: Path | None = None,
    ) -> None:
        self.path = path
        options = _options(provider, threads or default_threads(), optimized, memory)
        if shapes is not None:
            for dimension, size in _dimensions(path, shapes).items():
                options.add_free_dimension_override_by_name(dimension, size)
        wanted = providers.for_onnxruntime(provider, cache, memory)
        self._session = _load(path, options, wanted)
        taken = self._session.get_providers()
        if taken[0] != wanted[0][0]:
            raise ConfigError(
                f"onnxruntime could not start {provider} for {path} and would have used "
                f"{', '.join(taken)}; check its driver and libraries, or choose --provider cpu"
            )
        self.inputs: dict[str, np.dtype[Any]] = {
            node.name: np.dtype(_DTYPES[node.type]) for node in self._session.get_inputs()
        }
        # Weights that were not laid out anew are summed in another order, and rounded so.
        engine = f"{ENGINE}, low memory" if memory is Memory.LOW else ENGINE
        self.backend = Backend(provider, engine, nodes=_nodes(self._session, provider))
        # DirectML allows one run at a time.
        self._turn = Lock() if provider is Provider.DIRECTML else nullcontext()

    def run(
        self, feeds: Mapping[str, np.ndarray], cancellation: Cancellation | None = None
    ) -> list[np.ndarray]:
        """Run the network on arrays, cast to its own types, and return its outputs in order.

        Raises Cancelled when `cancellation` is set before or during the run, GenerationError when
        the run fails.
        """
        options = ort.RunOptions()
        options.log_severity_level = _QUIET
        forget: Callable[[], None] | None = None
        if cancellation is not None:
            forget = cancellation.on_cancel(lambda: setattr(options, "terminate", True))
        try:
            if cancellation is not None and cancellation.cancelled:
                raise Cancelled("stopped")
            with self._turn:
                outputs: list[np.ndarray] = self._session.run(
                    None, cast(feeds, self.inputs), options
                )
        except _RUN_ERRORS as err:
            if cancellation is not None and cancellation.cancelled:
                raise Cancelled("stopped") from err
            raise run_error(self.path, "onnxruntime", err) from err
        finally:
            if forget is not None:
                forget()
        return outputs


def _options(
    provider: Provider, threads: int, optimized: bool, memory: Memory
) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting threads of one session must not burn the cores that the next session runs on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if memory is Memory.LOW:
        options.enable_cpu_mem_arena = False
        # Weights stay pages of the file, which the system may take back, instead of copies.
        options.add_session_config_entry("session.disable_prepacking", "1")
    if provider is Provider.DIRECTML:
        options.enable_mem_pattern = False
    if provider is not Provider.CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _load(
    path: Path, options: ort.SessionOptions, wanted: list[tuple[str, dict[str, str]]]
) -> ort.InferenceSession:
    try:
        # Without its "fallback" to other providers, which is told to nobody but stdout.
        return ort.InferenceSession(str(path), options, providers=wanted, enable_fallback=0)
    except _LOAD_ERRORS as err:
        if is_out_of_memory(err):
            raise out_of_memory(name_of(path)) from err
        raise BundleError(
            f"{ENGINE} cannot load {path} ({first_line(err)}); "
            "run `python -m export` to write it again"
        ) from err


def _dimensions(path: Path, shapes: Shapes) -> dict[str, int]:
    """Return the size of each free dimension of the network's inputs, by its name."""
    options = _options(Provider.CPU, 1, True, Memory.LOW)  # only looked at: opens in no time
    named: dict[str, int] = {}
    for node in _load(path, options, [(providers.CPU_NAME, {})]).get_inputs():
        for dimension, size in zip(node.shape, shapes.get(node.name, node.shape), strict=True):
            if isinstance(dimension, str) and named.setdefault(dimension, size) != size:
                raise GenerationError(
                    f"{path} has one dimension {dimension!r} of two sizes, {named[dimension]} "
                    f"and {size}; choose --provider cpu"
                )
    return named


def _nodes(session: ort.InferenceSession, provider: Provider) -> dict[str, int]:
    """Count nodes by who took them, most first."""
    if provider is Provider.CPU or not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    taken: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        taken[part.ep_name.removesuffix("ExecutionProvider")] += len(part.get_nodes())
    return dict(taken.most_common())
