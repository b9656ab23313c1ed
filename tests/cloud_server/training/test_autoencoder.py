"""The starter autoencoder: latents in which no channel hides behind another."""

from __future__ import annotations

import torch

from cloud_server.training.starter.autoencoder import LATENT_CHANNELS, build_autoencoder, whiten


def test_whitening_gives_latents_zero_mean_and_unit_covariance():
    torch.manual_seed(0)
    vae = build_autoencoder().eval()
    pictures = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        whiten(vae, pictures)
        channels = vae.encode(pictures).latents.transpose(0, 1).flatten(1)
    assert torch.allclose(torch.cov(channels), torch.eye(LATENT_CHANNELS), atol=1e-3)
    assert torch.allclose(channels.mean(1), torch.zeros(LATENT_CHANNELS), atol=1e-3)


def test_whitening_folds_into_the_decoder_exactly_but_for_its_clamp():
    torch.manual_seed(1)
    vae = build_autoencoder().eval()
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        vae.decoder.layers[0].padding = (0, 0)  # the padding's zeros are the only other difference
        direct = vae.decoder.layers[0](vae.encode(pictures).latents)
        whiten(vae, pictures)
        folded = vae.decoder.layers[0](vae.encode(pictures).latents)
    assert torch.allclose(direct, folded, atol=1e-4)
