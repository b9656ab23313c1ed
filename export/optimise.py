"""Do onnxruntime's graph optimisation once, here, so that sessions on the device open fast.

Optimising is most of the time a session takes to open (18 s of a 20 s start for an 866 M UNet).
The device loads the result with optimisation off; weights lie in a file of their own beside it.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort

from export.files import MIN_EXTERNAL_BYTES

# Extended and not all: the layouts of the last level depend on this machine's vector width.
EXTENDED = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
BASIC = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # the same for all providers
# OpenVINO reads every activation fused into a Gemm as a ReLU.
NOT_FOR_ALL = ["GemmActivationFusion"]


def optimise(traced: Path, optimised: Path, level: ort.GraphOptimizationLevel = EXTENDED) -> None:
    """Write the optimised model of `traced` to `optimised`, weights to `<optimised>.data`."""
    optimised.parent.mkdir(parents=True, exist_ok=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(optimised)
    for key, value in {
        "session.optimized_model_external_initializers_file_name": optimised.name + ".data",
        "session.optimized_model_external_initializers_min_size_in_bytes": str(MIN_EXTERNAL_BYTES),
    }.items():
        options.add_session_config_entry(key, value)
    ort.InferenceSession(
        traced, options, providers=["CPUExecutionProvider"], disabled_optimizers=NOT_FOR_ALL
    )


def opset_of(model: Path) -> int:
    """Return the version of the standard operator set a model uses."""
    proto = onnx.load(model, load_external_data=False)
    return next(int(i.version) for i in proto.opset_import if i.domain in ("", "ai.onnx"))
