"""The two measures of parity, and components beyond those of the shared export."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from export import components
from export.errors import ExportError
from export.optimise import opset_of, optimise
from export.parity import MAX_PSNR_DB, check_parity, cosine, psnr_db
from export.quiet import quiet


def test_cosine_is_that_of_the_worst_row():
    want = np.eye(3, dtype=np.float32)
    got = want.copy()
    got[2] = [0, 1, 1]
    assert cosine(want, want) == pytest.approx(1)
    assert cosine(want, got) == pytest.approx(math.sqrt(0.5))


def test_psnr_counts_from_the_largest_value():
    want = np.array([0, 0, 0, 10], np.float32)
    assert psnr_db(want, want) == MAX_PSNR_DB
    assert psnr_db(want, want + 1) == pytest.approx(20)


def test_a_network_that_answers_otherwise_fails_with_its_name(tmp_path):
    double, triple = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with quiet():
        torch.onnx.export(
            double.eval(), (torch.ones(2, 4),), tmp_path / "m.onnx", dynamo=True, verbose=False
        )
    samples = [(torch.ones(2, 4),)]
    check_parity("unet", double, tmp_path / "m.onnx", samples, "psnr_db", 60.0)
    with pytest.raises(ExportError, match=r"exported unet differs from torch: psnr_db .* gate 60"):
        check_parity("unet", triple, tmp_path / "m.onnx", samples, "psnr_db", 60.0)


def test_the_decoder_of_a_kl_autoencoder_agrees(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    network = components.vae_decoder(vae, 8)
    with quiet():
        network.trace(tmp_path / "traced.onnx")
    optimise(tmp_path / "traced.onnx", tmp_path / "out" / "model.onnx")
    model = tmp_path / "out" / "model.onnx"
    parity = check_parity("vae", network.module, model, network.samples, "psnr_db", 60.0)
    assert parity.value > 90
    assert opset_of(model) == 18
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 10_000
