"""Which providers there are here, and what onnxruntime is told to start each of them.

Options and their reasons: onnxruntime's documentation of its execution providers. Those of CUDA,
TensorRT, CoreML and DirectML were never run by us, for want of the devices.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
from functools import cache as once
from pathlib import Path

import onnxruntime as ort

from edge_agent.errors import ConfigError
from edge_agent.runtime import openvino
from edge_agent.types import Memory, Provider

CPU_NAME = "CPUExecutionProvider"
_NAMES = {
    Provider.CPU: CPU_NAME,
    Provider.CUDA: "CUDAExecutionProvider",
    Provider.TENSORRT: "TensorrtExecutionProvider",
    Provider.COREML: "CoreMLExecutionProvider",
    Provider.DIRECTML: "DmlExecutionProvider",
}
_HOW = {
    Provider.OPENVINO: "install it with `pip install openvino`",
    Provider.OPENVINO_F32: "install it with `pip install openvino`",
    Provider.CUDA: "install onnxruntime-gpu in the place of onnxruntime",
    Provider.TENSORRT: "install onnxruntime-gpu in the place of onnxruntime, and TensorRT",
    Provider.COREML: "onnxruntime has it on macOS only",
    Provider.DIRECTML: "install onnxruntime-directml in the place of onnxruntime, on Windows",
}
# Builds of onnxruntime that all install the one package `onnxruntime`, each over the other.
_BUILDS = {
    "onnxruntime",
    "onnxruntime-directml",
    "onnxruntime-gpu",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-silicon",
    "onnxruntime-training",
    "onnxruntime-vitisai",
    "onnxruntime-webgpu",
    "ort-nightly",
    "ort-nightly-directml",
    "ort-nightly-gpu",
}
SITE = Path(ort.__file__).parent.parent
# Shapes fixed at the first run: these compile for one size, and often refuse to know none.
STATIC = {
    Provider.OPENVINO,
    Provider.OPENVINO_F32,
    Provider.TENSORRT,
    Provider.COREML,
    Provider.DIRECTML,
}


def builds(site: Path | None = None) -> list[str]:
    """Return the builds of onnxruntime installed beside the one in use, with their versions."""
    found = []
    for folder in (site or SITE).glob("*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").partition("-")
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in _BUILDS:
            found.append(f"{name} {version}")
    return sorted(found)


def installed() -> list[str]:
    """Return the engines installed here, with their versions."""
    found = openvino.version()
    return [*builds(), *([] if found is None else [f"openvino {found}"])]


def conflict(site: Path | None = None) -> str | None:
    """Say in one sentence that several builds of onnxruntime are installed, if so."""
    several = builds(site)
    if len(several) < 2:
        return None
    names = " ".join(one.partition(" ")[0] for one in several)
    return (
        f"{' and '.join(several)} are installed over each other and break each other; "
        f"`pip uninstall {names}`, then install one of them"
    )


def available() -> list[Provider]:
    """Return the providers that can be asked for here, the CPU first."""
    compiled_in = ort.get_available_providers()
    found = [provider for provider, name in _NAMES.items() if name in compiled_in]
    if openvino.version() is not None:
        found[1:1] = [Provider.OPENVINO, Provider.OPENVINO_F32]
    return found


def check(provider: Provider) -> None:
    """Raise ConfigError when `provider` is absent, or onnxruntime is installed several times."""
    if told := conflict():
        raise ConfigError(told)
    here = available()
    if provider is not Provider.AUTO and provider not in here:
        raise ConfigError(
            f"provider {provider} is not installed here ({', '.join(here)} are); "
            f"{_HOW[provider]}, or choose --provider auto"
        )


def for_onnxruntime(
    provider: Provider, cache: Path | None, memory: Memory
) -> list[tuple[str, dict[str, str]]]:
    """Return onnxruntime's providers with their options, in the order of their priority.

    Nodes that the first cannot take fall to the next one, in the end to the CPU.
    """
    cpu: tuple[str, dict[str, str]] = (CPU_NAME, {})
    if provider is Provider.CPU:
        return [cpu]
    cuda = (_NAMES[Provider.CUDA], _cuda(memory))
    if provider is Provider.CUDA:
        return [cuda, cpu]
    if provider is Provider.TENSORRT:
        return [(_NAMES[provider], _tensorrt(cache, memory)), cuda, cpu]
    if provider is Provider.COREML:
        return [(_NAMES[provider], _coreml(cache)), cpu]
    if provider is Provider.DIRECTML:
        return [(_NAMES[provider], {}), cpu]
    raise ValueError(f"{provider} is none of onnxruntime's")


def _cuda(memory: Memory) -> dict[str, str]:
    options = {
        # The exhaustive search of the default takes long at the first run, and much memory.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The default doubles the arena each time it is too small.
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",  # other streams may race (onnxruntime #4829)
    }
    if memory is Memory.LOW:
        options["cudnn_conv_use_max_workspace"] = "0"
    return options


def _tensorrt(cache: Path | None, memory: Memory) -> dict[str, str]:
    options = {
        "trt_fp16_enable": "1",
        "trt_layer_norm_fp32_fallback": "1",  # sums over a row overflow 16 bits
    }
    if memory is Memory.LOW:
        # On a Jetson the processor and the GPU share this memory.
        options |= {"trt_auxiliary_streams": "0", "trt_context_memory_sharing_enable": "1"}
    if cache is not None:
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(cache),
        }
    return options


def _coreml(cache: Path | None) -> dict[str, str]:
    options = {
        "ModelFormat": "MLProgram",
        "MLComputeUnits": "ALL",
        "RequireStaticInputShapes": "1",
        "AllowLowPrecisionAccumulationOnGPU": "0",
    }
    if cache is not None:
        options["ModelCacheDirectory"] = str(cache)  # else every start compiles again
    return options


def engine_of(provider: Provider) -> str:
    """Return everything with a version that compiled networks and measurements depend on."""
    if provider.base == Provider.OPENVINO:
        return f"openvino {openvino.version()}, form {openvino.FORM}"
    engine = f"onnxruntime {ort.__version__}"
    return f"{engine}, TensorRT {_tensorrt_version()}" if provider is Provider.TENSORRT else engine


def device_of(provider: Provider) -> str:
    """Return the name of the device that `provider` computes on, as exactly as it is known."""
    if provider in (Provider.CUDA, Provider.TENSORRT):
        return _nvidia_name()
    # CoreML and DirectML choose by themselves among what the machine has.
    return _processor_name()


@once
def _processor_name() -> str:
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.processor() or platform.machine()} on {platform.platform()}"
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", about, re.MULTILINE))
    # Virtual machines name unlike processors alike; what they can do tells them apart.
    can = facts.get("flags") or facts.get("Features") or ""
    mark = hashlib.sha256(can.encode()).hexdigest()[:8]
    return f"{facts.get('model name') or platform.machine()} ({mark})"


@once
def _nvidia_name() -> str:
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        if found := re.search(r"^Model:\s*(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            return found[1]
    jetson = Path("/proc/device-tree/model")
    return jetson.read_text(encoding="utf-8").rstrip("\0") if jetson.is_file() else "an NVIDIA GPU"


@once
def _tensorrt_version() -> str:
    for name in ("libnvinfer.so.10", "libnvinfer.so.8", "libnvinfer.so", "nvinfer_10.dll"):
        try:
            return str(ctypes.CDLL(name).getInferLibVersion())
        except (OSError, AttributeError):
            continue
    return "of an unknown version"
