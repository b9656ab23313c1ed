"""What is installed, what may be asked for, and what onnxruntime is told."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest

from edge_agent.errors import ConfigError
from edge_agent.runtime import openvino, providers
from edge_agent.runtime.session import Session
from edge_agent.types import Memory, Provider

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


def site(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / f"{name}.dist-info").mkdir(parents=True)
    return folder


def test_one_build_of_onnxruntime_is_found_here() -> None:
    assert providers.builds() == [f"onnxruntime {ort.__version__}"]
    assert providers.conflict() is None


def test_two_builds_are_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = site(tmp_path, "onnxruntime-1.31.1", "onnxruntime_gpu-1.31.0", "onnx-1.20.0")
    assert providers.builds(both) == ["onnxruntime 1.31.1", "onnxruntime-gpu 1.31.0"]
    monkeypatch.setattr(providers, "SITE", both)
    with pytest.raises(ConfigError, match="`pip uninstall onnxruntime onnxruntime-gpu`"):
        providers.check(Provider.CPU)


def test_packages_that_only_begin_alike_are_no_second_build(tmp_path: Path) -> None:
    names = ("onnxruntime-1.31.1", "onnxruntime_genai-0.9.0", "onnxruntime_extensions-0.14.0")
    assert providers.conflict(site(tmp_path, *names)) is None


def test_openvino_can_be_asked_for_where_it_is_installed() -> None:
    here = providers.available()
    assert here[0] is Provider.CPU
    assert (Provider.OPENVINO in here) == (openvino.version() is not None)
    for provider in (Provider.AUTO, *here):
        providers.check(provider)


@pytest.mark.parametrize(
    "provider", [Provider.CUDA, Provider.TENSORRT, Provider.COREML, Provider.DIRECTML]
)
def test_an_absent_provider_is_named_with_those_that_are_here(provider: Provider) -> None:
    if provider in providers.available():
        pytest.skip(f"{provider} is installed here")
    sentence = rf"provider {provider} is not installed here \(cpu.*--provider auto"
    with pytest.raises(ConfigError, match=sentence):
        providers.check(provider)


def test_without_openvino_its_two_names_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "version", lambda: None)
    with pytest.raises(ConfigError, match="install it with `pip install openvino`"):
        providers.check(Provider.OPENVINO_F32)


def test_a_provider_that_does_not_start_is_no_silent_fallback(tiny_bundle: Path) -> None:
    if Provider.CUDA in providers.available():
        pytest.skip("CUDA may start here")
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(ConfigError, match=r"could not start cuda for .*CPUExecutionProvider"),
    ):
        Session(tiny_bundle / "unet" / "model.onnx", provider=Provider.CUDA)


def names(chosen: list[tuple[str, dict[str, str]]]) -> list[str]:
    return [name for name, _ in chosen]


@pytest.mark.parametrize(
    ("provider", "wanted"),
    [
        (Provider.CPU, [providers.CPU_NAME]),
        (Provider.CUDA, [CUDA, providers.CPU_NAME]),
        (Provider.TENSORRT, [TENSORRT, CUDA, providers.CPU_NAME]),
        (Provider.COREML, ["CoreMLExecutionProvider", providers.CPU_NAME]),
        (Provider.DIRECTML, ["DmlExecutionProvider", providers.CPU_NAME]),
    ],
)
def test_nodes_fall_to_the_next_provider_in_the_end_to_the_cpu(
    provider: Provider, wanted: list[str]
) -> None:
    chosen = providers.for_onnxruntime(provider, None, Memory.NORMAL)
    assert names(chosen) == wanted
    assert set(wanted) <= set(ort.get_all_providers())


def test_tensorrt_keeps_engines_and_timings_where_it_is_told(tmp_path: Path) -> None:
    (_, options), *_ = providers.for_onnxruntime(Provider.TENSORRT, tmp_path, Memory.NORMAL)
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)
    assert options["trt_layer_norm_fp32_fallback"] == "1"
    assert "trt_auxiliary_streams" not in options


def test_little_memory_reaches_the_gpu_too() -> None:
    (_, tensorrt), (_, cuda), _ = providers.for_onnxruntime(Provider.TENSORRT, None, Memory.LOW)
    assert tensorrt["trt_auxiliary_streams"] == "0"
    assert cuda["cudnn_conv_use_max_workspace"] == "0"
    assert not any("cache" in key for key in tensorrt)


def test_coreml_compiles_once_and_for_fixed_sizes(tmp_path: Path) -> None:
    (_, options), _ = providers.for_onnxruntime(Provider.COREML, tmp_path, Memory.NORMAL)
    assert options["RequireStaticInputShapes"] == "1"
    assert options["ModelCacheDirectory"] == str(tmp_path)


def test_engines_and_devices_have_names() -> None:
    assert providers.engine_of(Provider.CPU) == f"onnxruntime {ort.__version__}"
    assert providers.engine_of(Provider.OPENVINO) == providers.engine_of(Provider.OPENVINO_F32)
    assert "TensorRT" in providers.engine_of(Provider.TENSORRT)
    assert providers.device_of(Provider.CPU) == providers.device_of(Provider.OPENVINO)
    assert providers.device_of(Provider.CPU)
    assert providers.device_of(Provider.CUDA)
