"""Clean installs of a built wheel: the device alone without torch, export outside the clone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(command: Sequence[object], folder: Path, **env: str) -> str:
    """Run a command in `folder`, away from the clone, and return what it prints."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**clean, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "-o", folder, ROOT], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def outside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's own packages, to put before everything else on the path."""
    folder = tmp_path_factory.mktemp("outside") / "packages"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel]
    run(command, folder.parent)
    return folder


@pytest.fixture(scope="module")
def bundle(outside: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter bundle, exported by the wheel in an environment that has the extras."""
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, "-m", "export", "--quiet", "-o", folder / "bundle"]
    return Path(run(command, folder, PYTHONPATH=str(outside)).strip())


def test_the_wheel_holds_the_packages_and_the_starter_models(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "cloud_server", "edge_agent", "export", "protos",
    }  # fmt: skip
    models = {
        name.split("/")[2] for name in names if name.startswith("cloud_server/starter_models/")
    }
    assert models >= {"clip", "edge", "cloud", "router"}
    assert "cloud_server/training/metrics.toml" in names
    assert "protos/t2i/v1/image_generation_pb2.pyi" in names


def test_a_wheel_finds_its_models_outside_the_clone(outside: Path, tmp_path: Path) -> None:
    program = "from cloud_server.starter import starter_folder; print(starter_folder())"
    found = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(outside)).strip()
    assert Path(found) == outside / "cloud_server" / "starter_models"


def test_a_wheel_exports_outside_the_clone(bundle: Path) -> None:
    assert (bundle / "bundle.json").is_file()


def test_the_base_alone_decides_without_torch(wheel: Path, bundle: Path, tmp_path: Path) -> None:
    run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run([python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheel], tmp_path)
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
