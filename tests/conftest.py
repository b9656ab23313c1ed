"""What every test starts from: no hub, no owner's settings, folders of its own."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")  # torch and onnxruntime read it when imported

OURS = ("EDGE_AGENT_", "CLOUD_SERVER_")
USER_FOLDERS = ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME")


def _forget_the_owner(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in os.environ:
        if name.startswith(OURS):
            patch.delenv(name)
    for variable in USER_FOLDERS:
        patch.setenv(variable, str(home / variable.removeprefix("XDG_").lower()))


@pytest.fixture(scope="session", autouse=True)
def _session_folders() -> object:
    """Keep fixtures of module and session scope away from the owner's folders as well."""
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        _forget_the_owner(patch, Path(home))
        yield


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    _forget_the_owner(monkeypatch, tmp_path_factory.mktemp("home"))


def pytest_report_header() -> str:
    """Say on which Python the tests run."""
    return f"python: {sys.executable}"
