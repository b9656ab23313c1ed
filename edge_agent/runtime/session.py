"""A network in onnxruntime: run it, stop it in the middle, and hear of trouble in words."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from edge_agent.errors import BundleError, Cancelled, GenerationError
from edge_agent.types import Cancellation

_LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_RUN_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
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


def runtime_facts() -> dict[str, Any]:
    """Return onnxruntime's version and the execution providers compiled into it."""
    return {"onnxruntime": ort.__version__, "available_providers": ort.get_available_providers()}


class Session:
    """One ONNX network on the CPU.

    `optimized` says that the file was optimised at export: loading it then skips the optimiser,
    which is most of the time to open a session. Raises BundleError when the file does not load.
    """

    def __init__(self, path: Path, *, threads: int | None = None, optimized: bool = False) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = threads or default_threads()
        options.inter_op_num_threads = 1
        # Waiting threads of one session must not burn the cores that the next session runs on.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.path = path
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except _LOAD_ERRORS as err:
            raise BundleError(
                f"onnxruntime {ort.__version__} cannot load {path} ({_first_line(err)}); "
                "run `python -m export` to write it again"
            ) from err
        self.inputs: dict[str, np.dtype[Any]] = {
            node.name: np.dtype(_DTYPES[node.type]) for node in self._session.get_inputs()
        }
        self.providers: list[str] = self._session.get_providers()

    def run(
        self, feeds: Mapping[str, np.ndarray], cancellation: Cancellation | None = None
    ) -> list[np.ndarray]:
        """Run the network and return its outputs in order.

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
            outputs: list[np.ndarray] = self._session.run(None, dict(feeds), options)
        except _RUN_ERRORS as err:
            if cancellation is not None and cancellation.cancelled:
                raise Cancelled("stopped") from err
            raise _run_error(self.path, err) from err
        finally:
            if forget is not None:
                forget()
        return outputs


def _run_error(path: Path, err: Exception) -> GenerationError:
    message = _first_line(err)
    if "allocate" in message or "bad_alloc" in message:
        return GenerationError(
            f"{path.stem if path.stem != 'model' else path.parent.name} ran out of memory; "
            "ask for a smaller --size or close other programs"
        )
    return GenerationError(
        f"onnxruntime failed in {path} ({message}); check the --size, or run `edge-agent doctor`"
    )


def _first_line(err: Exception) -> str:
    return str(err).strip().partition("\n")[0][:300]
