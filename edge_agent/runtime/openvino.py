"""A network in OpenVINO, which reads the same files as onnxruntime and has its own engine.

On x86 processors with bfloat16 it computes in that unless told otherwise. What it compiles is kept
in a cache folder without the weights: about a megabyte a network. The weights stay in the bundle;
of large networks that compute in 16 bits there is a copy beside, one for all sizes, in 16 bits too.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_agent.errors import BundleError, Cancelled, GenerationError
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
from edge_agent.types import Cancellation, Provider

if TYPE_CHECKING:
    import openvino

DEVICE = "CPU"
FORM = 3  # raise when networks are compiled into something else, so that nothing older is taken
# With AMX its attention takes 1.3 times as long by heads of 40 values as by heads of 64, and 1.2
# times by heads of 80 as by 96. Where there are few keys that is less than what widening costs.
HEAD_MULTIPLE, LEAST_KEYS = 32, 256
# Weights of so many bytes are worth a second file: half of the reading at each start, and of the
# memory. Smaller networks open in a fraction of a second as they are.
LEAST_HALVED = 256 << 20
UNUSED_DAYS = 30  # after which such a file goes, when another is written


@once
def version() -> str | None:
    """Return the installed version of OpenVINO, None without one; does not load it."""
    from importlib import metadata  # takes its time to load, and the CPU needs none of it

    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return None


@once
def _core() -> openvino.Core:
    # Its conversion tools, which we do not use, report every import to Google Analytics. It goes on
    # without them where they are missing, and so they are while it is imported.
    tools = "openvino.tools.ovc"
    missing = tools not in sys.modules
    if missing:
        sys.modules[tools] = None  # type: ignore[assignment]  # how Python is told of an absence
    try:
        import openvino
    finally:
        if missing:
            del sys.modules[tools]
    return openvino.Core()


class OpenVinoSession:
    """One ONNX network compiled by OpenVINO for the processor.

    `inputs` are their names in the ONNX file: where 16-bit inputs are cast OpenVINO has others
    too. `f32` computes in 32 bits where the device would take fewer. `shapes` fixes their sizes.
    `compiled` is the file where the compiled network is kept: its name must stand for the model's
    digest, versions, device, threads and shapes. `halved` is the file, ending in .xml, where a
    large network is kept with weights of 16 bits if it computes in 16 bits: its name must stand
    for the model's digest and versions. Raises BundleError when the network cannot be compiled,
    GenerationError when memory runs out.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        inputs: Sequence[str] = (),
        f32: bool = False,
        shapes: Shapes | None = None,
        compiled: Path | None = None,
        halved: Path | None = None,
    ) -> None:
        self.path = path
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "CACHE_MODE": "OPTIMIZE_SIZE",  # what is exported leaves the weights where they are
        }
        if f32:
            config["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            in_16_bits = not f32 and _computes_in_16_bits()
            source = _halve(path, halved) if halved is not None and in_16_bits else path
            if compiled is not None and source != path:
                compiled = compiled.with_suffix(".half.blob")  # it points into other weights
            self._compiled = _read(source, compiled, config)
            if self._compiled is None:
                model = _core().read_model(source)
                if shapes is not None:
                    model.reshape({name: list(shape) for name, shape in shapes.items()})
                if _multiplies_by_tiles(in_16_bits):
                    _widen_heads(model)
                self._compiled = _core().compile_model(model, DEVICE, config)
                _write(self._compiled, compiled)
        except (RuntimeError, MemoryError) as err:
            if is_out_of_memory(err):
                raise out_of_memory(name_of(path)) from err
            raise BundleError(
                f"OpenVINO {version()} cannot load {path} ({first_line(err)}); "
                "choose --provider cpu, or run `python -m export` to write it again"
            ) from err
        ports = {_name_of(port, inputs): port for port in self._compiled.inputs}
        self.inputs: dict[str, np.dtype[Any]] = {
            name: np.dtype(port.get_element_type().to_dtype()) for name, port in ports.items()
        }
        self._shapes = {name: port.get_partial_shape() for name, port in ports.items()}
        self.backend = Backend(
            Provider.OPENVINO_F32 if f32 else Provider.OPENVINO,
            f"openvino {version()}",
            precision=self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
        )

    def run(
        self, feeds: Mapping[str, np.ndarray], cancellation: Cancellation | None = None
    ) -> list[np.ndarray]:
        """Run the network on arrays, cast to its own types, and return its outputs in order.

        Raises Cancelled when `cancellation` is set before or during the run, GenerationError when
        the run fails.
        """
        request = self._compiled.create_infer_request()
        forget: Callable[[], None] | None = None
        if cancellation is not None:
            forget = cancellation.on_cancel(request.cancel)
        try:
            if cancellation is not None and cancellation.cancelled:
                raise Cancelled("stopped")
            self._check(feeds)
            # Not infer(), which hears of no cancellation.
            request.start_async(cast(feeds, self.inputs))
            request.wait()
            # The request's own memory ends with it.
            return [request.get_tensor(port).data.copy() for port in self._compiled.outputs]
        except (RuntimeError, MemoryError) as err:
            if cancellation is not None and cancellation.cancelled:
                raise Cancelled("stopped") from err
            raise run_error(self.path, "OpenVINO", err) from err
        finally:
            if forget is not None:
                forget()

    def _check(self, feeds: Mapping[str, np.ndarray]) -> None:
        # OpenVINO itself computes something of inputs that are missing or of a wrong shape.
        for name, wanted in self._shapes.items():
            found = feeds[name].shape if name in feeds else None
            if found is None or not _fits(found, wanted):
                raise GenerationError(
                    f"OpenVINO failed in {self.path} ({name} has the shape {found} and not "
                    f"{wanted}); check the --size, or run `edge-agent doctor`"
                )


def _name_of(port: Any, names: Sequence[str]) -> str:
    return next((name for name in names if name in port.get_names()), port.get_any_name())


@once
def _computes_in_16_bits() -> bool:
    precision = _core().get_property(DEVICE, "INFERENCE_PRECISION_HINT")
    return str(precision.get_type_name()) in ("bf16", "f16")


@once
def _multiplies_by_tiles(in_16_bits: bool) -> bool:
    try:
        return in_16_bits and "amx_bf16" in Path("/proc/cpuinfo").read_text(
            encoding="utf-8", errors="replace"
        )
    except OSError:  # no Linux: heads stay as they are, which is slower by some percent
        return False


def _fits(shape: tuple[int, ...], wanted: openvino.PartialShape) -> bool:
    return len(wanted) == len(shape) and all(
        each.is_dynamic or each.get_length() == size
        for each, size in zip(wanted, shape, strict=True)
    )


def _widen_heads(model: openvino.Model) -> None:
    """Fill up queries, keys and values (B, heads, n, d) with zeros to a d that is fast.

    The scale is an input of its own, so that the function stays what it was.
    """
    from openvino import opset13 as ops

    for node in model.get_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or node.get_input_size() < 5:
            continue
        keys = node.input(1).get_partial_shape()
        if keys[2].is_dynamic or keys[3].is_dynamic or keys[2].get_length() < LEAST_KEYS:
            continue
        width = keys[3].get_length()
        missing = -width % HEAD_MULTIPLE
        if not missing:
            continue
        readers = node.output(0).get_target_inputs()
        for each in map(node.input, range(3)):
            nothing, more = np.zeros(4, np.int64), np.array([0, 0, 0, missing])
            zero = ops.convert_like(ops.constant(np.float32(0)), each.get_source_output())
            wide = ops.pad(each.get_source_output(), nothing, more, "constant", zero)
            each.replace_source_output(wide.output(0))
        first, end, step, axis = (np.array([value]) for value in (0, width, 1, 3))
        narrow = ops.slice(node, first, end, step, axis)
        for reader in readers:
            reader.replace_source_output(narrow.output(0))
    model.validate_nodes_and_infer_types()


def _halve(path: Path, halved: Path) -> Path:
    """Return `halved`, written if it is not there, or `path` where that brings nothing.

    Weights that 16-bit floats cannot hold stay in 32 bits. Nothing is written to a disk that would
    have less than the 32-bit weights left.
    """
    import openvino

    weights, copy = _weights(path), _weights(halved)
    try:
        if not weights.is_file() or weights.stat().st_size < LEAST_HALVED:
            return path
        if halved.is_file() and copy.is_file():
            for file in (halved, copy):
                os.utime(file)  # it was used
            return halved
        halved.parent.mkdir(parents=True, exist_ok=True)
        _prune(halved.parent)
        if shutil.disk_usage(halved.parent).free < 2 * weights.stat().st_size:
            return path
        with tempfile.TemporaryDirectory(dir=halved.parent, suffix=".partial") as folder:
            new = Path(folder) / halved.name
            openvino.save_model(_core().read_model(path), new, compress_to_fp16=True)
            _core().read_model(new)  # which finds out if not all could be written
            _weights(new).replace(copy)
            new.replace(halved)
    except (OSError, RuntimeError):
        return path  # as it is without a cache
    return halved


def _prune(folder: Path) -> None:
    """Delete halved networks that no start has used for long, and what a kill left half-written."""
    for found in folder.iterdir():
        if found.suffix not in (".xml", ".bin", ".partial"):
            continue
        with contextlib.suppress(OSError):
            if time.time() - found.stat().st_mtime > UNUSED_DAYS * 86400:
                shutil.rmtree(found) if found.is_dir() else found.unlink()


def _weights(path: Path) -> Path:
    """Return the file of the weights of a network, in ONNX or in OpenVINO's own format."""
    own = path.suffix == ".xml"
    return path.with_suffix(".bin") if own else path.with_name(path.name + ".data")


def _read(path: Path, compiled: Path | None, config: Mapping[str, Any]) -> Any:
    """Return the network as it was compiled before, None if it was not or cannot be read."""
    if compiled is None or not compiled.is_file():
        return None
    weights = _weights(path)
    lying = {"WEIGHTS_PATH": str(weights)} if weights.is_file() else {}
    try:
        blob = io.BytesIO(compiled.read_bytes())
        return _core().import_model(blob, DEVICE, {**config, **lying})
    except (OSError, RuntimeError):
        return None  # it is compiled again, and written again


def _write(model: openvino.CompiledModel, compiled: Path | None) -> None:
    # What cannot be kept, on a full disk or in a folder of someone else, is compiled again.
    if compiled is not None:
        with contextlib.suppress(OSError):
            compiled.parent.mkdir(parents=True, exist_ok=True)
            partial = compiled.with_name(f"{compiled.name}.{os.getpid()}.partial")
            partial.write_bytes(model.export_model().getvalue())
            partial.replace(compiled)
