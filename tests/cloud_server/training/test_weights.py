"""Weights may be read by whoever may read what is written beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cloud_server.training.weights import save_weights


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_of_weights_has_the_rights_of_any_new_file(
    tmp_path: Path, mask: int, mode: int
) -> None:
    before = os.umask(mask)
    try:
        save_weights({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == mode
    assert load_file(tmp_path / "w.safetensors")["w"].tolist() == [1, 1]
