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


def put_models(folder: Path) -> Path:
    """Make `folder` look like one of starter models."""
    (folder / "edge").mkdir(parents=True)
    (folder / "edge" / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """The folder of models of an installed wheel, whose code fails if it is run."""
    package = tmp_path / "site-packages" / cloud_server.starter.PACKAGE
    models = put_models(package / "starter")
    (package / "__init__.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(package.parent)
    return models


def test_the_models_are_found_in_their_wheel(tmp_path, wheel):
    assert installed_in(tmp_path).starter_folder() == wheel


@pytest.mark.usefixtures("wheel")
def test_a_clone_comes_before_the_wheel(tmp_path):
    clone = put_models(tmp_path / "models" / "starter")
    assert installed_in(tmp_path).starter_folder() == clone


def test_their_absence_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="the wheel routet2i-edge-models"):
        installed_in(tmp_path).starter_folder()
