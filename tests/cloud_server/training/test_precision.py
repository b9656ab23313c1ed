"""bfloat16 where it is fast, 32 bits elsewhere."""

from __future__ import annotations

import pytest
import torch

from cloud_server.training.precision import INSTRUCTIONS, autocast


def computed_in(device: str) -> torch.dtype:
    with autocast(device):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_processor_with_instructions_for_it_computes_in_16_bits(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    assert computed_in("cpu") is torch.bfloat16


def test_a_processor_without_them_computes_in_32_bits(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {INSTRUCTIONS[0]: False})
    assert computed_in("cpu") is torch.float32


def test_torch_tells_of_these_instructions_or_of_none():
    known = torch.cpu.get_capabilities()
    assert known["architecture"]
    if "x86" in known["architecture"]:
        assert {"avx512_bf16", "amx_bf16"} <= known.keys()
