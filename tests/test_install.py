"""Clean installs of the built wheels: a light device without torch, export outside the clone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.weight import BASE_LIMIT, weigh
from cloud_server.starter import PACKAGE

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def attempt(
    command: Sequence[object], folder: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`, away from the clone."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**clean, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def run(command: Sequence[object], folder: Path, **env: str) -> str:
    """Run a command that must succeed, and return what it prints."""
    ran = attempt(command, folder, **env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def build(project: Path, folder: Path) -> Path:
    """Build the wheel of a project into `folder`."""
    run([sys.executable, "-m", "build", "--wheel", "-o", folder, project], folder)
    (built,) = folder.glob("*.whl")
    return built


def unpack(wheel: Path, folder: Path) -> Path:
    """Install a wheel's own files into `folder`, to be put before everything else on the path."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel]
    run(command, wheel.parent)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT / "models", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def outside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(wheel, tmp_path_factory.mktemp("outside") / "packages")


@pytest.fixture(scope="module")
def bundle(outside: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter bundle, exported by the two wheels in an environment that has the extras."""
    folder = tmp_path_factory.mktemp("data")
    path = os.pathsep.join([str(outside), str(unpack(models, folder / "packages"))])
    command = [sys.executable, "-m", "export", "--quiet", "-o", folder / "bundle"]
    return Path(run(command, folder, PYTHONPATH=path).strip())


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with the wheel and what it depends on."""
    environment = tmp_path_factory.mktemp("base") / "venv"
    run([sys.executable, "-m", "venv", environment], environment.parent)
    pip = [environment / "bin" / "python", "-m", "pip", "install"]
    run([*pip, "-c", ROOT / "constraints.txt", wheel], environment.parent)
    return environment


def test_the_wheel_holds_the_packages_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "cloud_server", "edge_agent", "export", "protos",
    }  # fmt: skip
    assert not any(name.endswith((".safetensors", ".onnx")) for name in names)
    assert "cloud_server/training/quality/metrics.toml" in names
    assert "protos/t2i/v1/image_generation_pb2.pyi" in names


def test_the_other_wheel_holds_the_models_alone(wheel: Path, models: Path) -> None:
    names = zipfile.ZipFile(models).namelist()
    folders = {name.split("/")[2] for name in names if name.startswith(f"{PACKAGE}/starter/")}
    assert folders == {"CARD.md", "clip", "edge", "cloud", "router"}
    assert [name for name in names if name.endswith(".py")] == [f"{PACKAGE}/__init__.py"]
    assert models.name.split("-")[1] == wheel.name.split("-")[1]


def test_both_wheels_export_outside_the_clone(bundle: Path) -> None:
    assert (bundle / "bundle.json").is_file()


def test_without_the_models_export_says_how_to_get_them(outside: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export", "-o", "bundle"]
    ran = attempt(command, tmp_path, PYTHONPATH=str(outside))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("Error: the starter models are neither in ")
    assert "install the wheel routet2i-edge-models" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_light(base: Path, tmp_path: Path) -> None:
    run([sys.executable, "-m", "venv", tmp_path / "bare"], tmp_path)
    assert weigh(base) - weigh(tmp_path / "bare") < BASE_LIMIT


def test_the_base_alone_decides_without_torch(base: Path, bundle: Path, tmp_path: Path) -> None:
    python = base / "bin" / "python"
    program = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('diffusers'))"
    assert run([python, "-c", program], tmp_path).split() == ["None", "None"]
    command = [python.with_name("edge-agent"), "route", "--json", "a cat", "two dogs on grass"]
    lines = run(command, tmp_path, EDGE_AGENT_BUNDLE=str(bundle)).splitlines()
    decisions = [json.loads(line) for line in lines]
    assert [decision["prompt"] for decision in decisions] == ["a cat", "two dogs on grass"]
    assert all(decision["route"] in ("edge", "cloud") for decision in decisions)
    drawn = run(
        [python.with_name("edge-agent"), "generate", "a cat", "--offline", "-o", "cat.png"],
        tmp_path,
        EDGE_AGENT_BUNDLE=str(bundle),
    )
    assert (tmp_path / drawn.strip()).stat().st_size > 0
