"""Where the starter models are looked for."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import cloud_server.starter


def installed_in(folder: Path) -> ModuleType:
    """Load a copy of the module as it lies in another installation."""
    (folder / "cloud_server").mkdir()
    file = Path(shutil.copy(cloud_server.starter.__file__, folder / "cloud_server"))
    spec = importlib.util.spec_from_file_location("starter_elsewhere", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", ["cloud_server/starter_models", "models/starter"])
def test_the_models_are_found_in_a_wheel_and_in_a_clone(tmp_path, place):
    module = installed_in(tmp_path)
    (tmp_path / place / "edge").mkdir(parents=True)
    (tmp_path / place / "edge" / "model_index.json").write_text("{}")
    assert module.starter_folder() == tmp_path / place


def test_their_absence_says_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="cloud-server train-starter"):
        installed_in(tmp_path).starter_folder()
