"""LoRA weights that fit, in part or not at all."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.lora import merge
from export.sources import Lora, open_lora, open_pipeline
from tests import families, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_pipeline(tmp_path_factory.mktemp("lora") / "tiny")


@pytest.fixture
def lora(model, tmp_path) -> Lora:
    return open_lora(str(families.make_lora(model, tmp_path / "lora", 0)))


def test_a_lora_that_fits_is_merged_without_a_word(model, lora, tmp_path):
    notes: list[str] = []
    merged = merge(open_pipeline(str(model)), [lora], tmp_path / "merged", notes.append)
    assert notes == []
    name = "diffusion_pytorch_model.safetensors"
    before, after = (load_file(at / "unet" / name) for at in (model, merged.folder))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("attn" in key for key in changed)


def test_a_lora_that_fits_in_part_is_told(model, lora, tmp_path):
    """As one for Stable Diffusion 1 does on a model without its middle block."""
    weights = load_file(lora.path)
    fits = len(weights) // 2
    for half, shape in (("A", (2, 8)), ("B", (8, 2))):
        key = f"unet.mid_block.attentions.7.transformer_blocks.0.attn1.to_q.lora_{half}.weight"
        weights[key] = torch.ones(shape)
    save_file(weights, lora.path)
    notes: list[str] = []
    merge(open_pipeline(str(model)), [lora], tmp_path / "merged", notes.append)
    (note,) = notes
    assert f"changes {fits + 1} layers, of which 'tiny' has only {fits}: the others" in note
