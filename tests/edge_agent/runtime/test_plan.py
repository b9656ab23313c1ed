"""`auto` takes what measured fastest and answers rightly, and only of this very device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.bundle import Component, open_bundle
from edge_agent.runtime import providers
from edge_agent.runtime.plan import Choice, Measured, Plan, candidates
from edge_agent.types import Provider
from edge_agent.verified import FileRecord

CPU, FAST, EXACT = Provider.CPU, Provider.OPENVINO, Provider.OPENVINO_F32


@pytest.fixture(autouse=True)
def with_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing loads no engine, so that it needs none."""
    monkeypatch.setattr(providers, "available", lambda: [CPU, FAST, EXACT])
    monkeypatch.setattr(providers, "engine_of", lambda provider: f"{provider.base} 1.0")


@pytest.fixture
def part(tiny_bundle: Path) -> Component:
    return open_bundle(tiny_bundle).component("unet")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(Provider.AUTO, 2, tmp_path / "cache")


def test_until_measured_auto_is_the_cpu(plan: Plan, part: Component) -> None:
    assert plan.choose(part) == Choice(CPU, "not measured here yet")


def test_files_of_16_bits_do_not_wait_for_a_measurement(plan: Plan, part: Component) -> None:
    half = replace(part, precision="fp16")
    assert plan.choose(half).provider is FAST
    assert plan.choose(half, precise=True).provider is EXACT


def test_files_of_16_bits_are_not_for_the_cpu_however_fast(plan: Plan, part: Component) -> None:
    half = replace(part, precision="fp16")
    plan.remember(half, {CPU: Measured(1.0, 200.0), FAST: Measured(2.0, 45.0)})
    assert plan.choose(half) == Choice(FAST, "best of 2 measured here")
    assert plan.choose(half, precise=True).provider is EXACT


def test_files_of_16_bits_go_to_a_gpu_first(
    plan: Plan, part: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = replace(part, precision="fp16")
    monkeypatch.setattr(providers, "available", lambda: [CPU, FAST, EXACT, Provider.CUDA])
    assert plan.choose(half).provider is Provider.CUDA
    monkeypatch.setattr(providers, "available", lambda: [CPU])
    assert plan.choose(half).provider is CPU


def test_files_in_8_bits_throughout_are_for_openvino(
    plan: Plan, part: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = replace(part, precision="w8a8")
    assert plan.choose(low) == Choice(FAST, "not measured here yet")
    monkeypatch.setattr(providers, "available", lambda: [CPU])
    assert plan.choose(low) == Choice(CPU, "w8a8 is made for openvino: not here")


def test_auto_is_the_fastest(plan: Plan, part: Component, tmp_path: Path) -> None:
    plan.remember(part, {CPU: Measured(2.0, 200.0), FAST: Measured(1.0, 45.0)})
    again = Plan(Provider.AUTO, 2, tmp_path / "cache")
    assert again.choose(part) == Choice(FAST, "best of 2 measured here")


def test_another_engine_must_be_worth_loading(plan: Plan, part: Component) -> None:
    plan.remember(part, {CPU: Measured(0.030, 200.0), FAST: Measured(0.015, 45.0)})
    assert plan.choose(part) == Choice(CPU, "best of 2 measured here")
    plan.remember(part, {CPU: Measured(0.040, 200.0)})
    assert plan.choose(part).provider is FAST


def test_what_is_faster_but_wrong_or_failed_is_not_taken(plan: Plan, part: Component) -> None:
    plan.remember(
        part,
        {CPU: Measured(2.0, 200.0), FAST: Measured(0.1, 12.0), EXACT: Measured(error="no")},
    )
    assert plan.choose(part).provider is CPU


def test_what_decides_is_never_left_to_fewer_bits(plan: Plan, part: Component) -> None:
    plan.remember(
        part, {CPU: Measured(3.0, 200.0), FAST: Measured(1.0, 45.0), EXACT: Measured(2.0, 120.0)}
    )
    assert plan.choose(part, precise=True).provider is EXACT
    assert candidates(precise=True) == [CPU, EXACT]


@pytest.mark.parametrize(
    ("wanted", "stands_in"),
    [
        (Provider.OPENVINO, Provider.OPENVINO_F32),
        (Provider.TENSORRT, Provider.CUDA),
        (Provider.COREML, Provider.CPU),
        (Provider.CUDA, Provider.CUDA),
        (Provider.CPU, Provider.CPU),
    ],
)
def test_what_is_asked_for_is_taken_measured_or_not(
    tmp_path: Path, part: Component, wanted: Provider, stands_in: Provider
) -> None:
    plan = Plan(wanted, 2, tmp_path)
    assert plan.choose(part) == Choice(wanted, "asked for")
    assert plan.choose(part, precise=True).provider is stands_in


def test_a_measurement_without_the_cpus_own_says_nothing(plan: Plan, part: Component) -> None:
    plan.remember(part, {FAST: Measured(1.0, 45.0)})
    assert plan.choose(part).provider is CPU


def test_another_device_version_model_or_number_of_threads_is_not_measured_yet(
    plan: Plan, part: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.remember(part, {CPU: Measured(2.0, 200.0), FAST: Measured(1.0, 45.0)})
    assert plan.choose(part).provider is FAST
    other = {name: FileRecord("0" * 64, one.size) for name, one in part.files.items()}
    assert plan.choose(replace(part, files=other)).provider is CPU
    assert Plan(Provider.AUTO, 3, tmp_path / "cache").choose(part).provider is CPU
    with monkeypatch.context() as patch:
        patch.setattr(providers, "device_of", lambda provider: "another")
        assert plan.choose(part).provider is CPU
    monkeypatch.setattr(providers, "engine_of", lambda provider: f"{provider.base} 2.0")
    assert plan.choose(part).provider is CPU


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "\0"])
def test_a_damaged_file_is_as_if_nothing_was_measured(
    plan: Plan, part: Component, tmp_path: Path, content: str
) -> None:
    plan.remember(part, {CPU: Measured(2.0, 200.0), FAST: Measured(1.0, 45.0)})
    file = tmp_path / "cache" / "measured.json"
    file.write_text(content)
    assert plan.choose(part).provider is CPU
    file.write_text(content)
    plan.remember(part, {CPU: Measured(2.0, 200.0), FAST: Measured(1.0, 45.0)})
    assert plan.choose(part).provider is FAST


def test_an_entry_of_another_version_of_ours_is_as_if_never_measured(
    plan: Plan, part: Component, tmp_path: Path
) -> None:
    plan.remember(part, {CPU: Measured(2.0, 200.0), FAST: Measured(1.0, 45.0)})
    file = tmp_path / "cache" / "measured.json"
    file.write_text(file.read_text().replace("seconds", "milliseconds"))
    assert plan.choose(part).provider is CPU


def test_measurements_of_others_are_kept(plan: Plan, part: Component) -> None:
    plan.remember(part, {CPU: Measured(2.0, 200.0)})
    plan.remember(replace(part, name="other"), {CPU: Measured(3.0, 200.0)})
    assert plan.measured(part, [CPU]) == {CPU: Measured(2.0, 200.0)}
