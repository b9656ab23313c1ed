"""The starter autoencoder: diffusers' AutoencoderTiny, 128x128x3 to 16x16x16 and back.

Full-resolution convolutions cost most on a CPU, so the full-resolution levels have no residual
block, and training sees 64x64 crops around the objects: the network is convolutional.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloud_server.torchvision_guard import guard
from cloud_server.training.loop import Budget, Prefetch, fit
from cloud_server.training.precision import autocast
from cloud_server.training.starter.scenes import Scene, batches, draw, sample_scene

guard()
from diffusers import AutoencoderTiny  # noqa: E402  the guard must come first

LATENT_CHANNELS = 16
CROP = 64
SCENES = {"cpu": 8, "cuda": 96}  # a step
CROPS = 4  # of each scene: drawing one takes longer than learning from it


def build_autoencoder() -> AutoencoderTiny:
    """Return the untrained network, 3.1 M parameters, half of them the decoder's."""
    return AutoencoderTiny(
        encoder_block_out_channels=(64, 64, 64, 64),
        decoder_block_out_channels=(64, 64, 64, 64),
        num_encoder_blocks=(0, 1, 4, 6),
        num_decoder_blocks=(8, 4, 1, 0),
        latent_channels=LATENT_CHANNELS,
    )


def train_autoencoder(out: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Train and save a diffusers folder at `out`; a picture of truth above result: `work`."""
    torch.manual_seed(seed)
    model = build_autoencoder().to(memory_format=torch.channels_last)
    kind = torch.device(device).type
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hidden = [c.weight for c in convolutions if c.in_channels == c.out_channels]
    crops = Prefetch(lambda step: torch.from_numpy(_crops(seed, step, SCENES[kind])), device)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        truth = to_tensor(crops(step), device)
        noise = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        with autocast(kind):
            latents = model.encoder(truth).float()  # (B, 16, 8, 8)
            # Noise teaches the decoder to forgive the small errors of a diffusion model.
            jitter = 0.05 * torch.randn(latents.shape, generator=noise, device=device)
            result = model.decoder(latents + jitter).float()
            # Latents at half the size must mean the picture at half the size (Kouzelis et al.
            # 2025, EQ-VAE), which makes them vary less from cell to cell.
            half = F.avg_pool2d(latents, 2).contiguous(memory_format=torch.channels_last)
            smaller = model.decoder(half).float()
        off = difference(result, truth) + 0.25 * difference(smaller, F.avg_pool2d(truth, 2))
        channels = latents.transpose(0, 1).flatten(1)
        unit = channels.mean(1).square().mean() + (channels.std(1) - 1).square().mean()
        psnr = 10 * torch.log10(4 / F.mse_loss(result.detach(), truth))
        return off + 0.02 * unit, {"psnr": psnr.item()}

    def save(ready: AutoencoderTiny) -> None:
        out.mkdir(parents=True, exist_ok=True)
        pictures = next(batches(seed + 1, 64))[0]
        with torch.no_grad():
            truth = to_tensor(pictures, device)
            whiten(ready, truth)
            result = ready.decode(ready.encode(truth).latents).sample.clamp(-1, 1)
        ready.save_pretrained(out)
        psnr = 10 * torch.log10(4 / (result - truth).square().mean((1, 2, 3))).mean().item()
        print(f"\nautoencoder: PSNR {psnr:.2f} dB on 64 fresh scenes", flush=True)
        rows = torch.cat([truth[:8], result[:8], truth[8:16], result[8:16]])
        save_grid(rows, work / "autoencoder.png", columns=8)

    fit(
        "autoencoder",
        model,
        loss_fn,
        lr=3e-3,  # 20.0 dB after 300 steps, one seed; AdamW alone at 1e-3 18.8
        budget=budget,
        work=work,
        device=device,
        ema=0.998,
        hidden=hidden,
        on_checkpoint=save,
        about={"seed": seed},
    )


def difference(result: Tensor, truth: Tensor) -> Tensor:
    """Return the loss between pictures: of values, of edges, and of squares."""
    pixel = (result - truth).abs().mean()
    edges = sum((result.diff(dim=d) - truth.diff(dim=d)).abs().mean() for d in (2, 3))
    return pixel + 0.5 * edges + 2 * F.mse_loss(result, truth)


def whiten(vae: AutoencoderTiny, pictures: Tensor) -> None:
    """Give the latent channels zero mean and unit covariance over `pictures` (B, 3, H, W).

    The change of basis is folded into the encoder's last convolution and the decoder's first. A
    plain autoencoder lets two directions carry most of the variance (8.4 and 1.8 here, against 0.04
    for the least); the noise of diffusion then drowns the others, which hold the shapes.
    """
    channels = vae.encode(pictures).latents.transpose(0, 1).flatten(1).double()  # (C, N)
    mean = channels.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(channels))
    whitening = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    inverse = vectors @ torch.diag(values.sqrt()) @ vectors.T
    last, first = vae.encoder.layers[-1], vae.decoder.layers[0]
    last.weight.copy_(torch.einsum("ij,jchw->ichw", whitening, last.weight.double()))
    last.bias.copy_(whitening @ (last.bias.double() - mean))
    kernel = first.weight.double()
    first.bias.copy_(first.bias + torch.einsum("ojhw,j->o", kernel, mean))
    first.weight.copy_(torch.einsum("ojhw,ji->oihw", kernel, inverse))


def _crops(seed: int, step: int, scenes: int) -> np.ndarray:
    """Return (`CROPS` x scenes, 64, 64, 3) crops, three of four around an object."""
    rng = np.random.default_rng([seed, step])
    crops = []
    for _ in range(scenes):
        scene = sample_scene(rng)
        picture = draw(scene, rng)
        for _ in range(CROPS):
            top, left = _corner(scene, rng, picture.shape[0])
            crops.append(picture[top : top + CROP, left : left + CROP])
    return np.stack(crops)


def _corner(scene: Scene, rng: np.random.Generator, size: int) -> tuple[int, int]:
    most = size - CROP
    if rng.random() < 0.25:
        return int(rng.integers(most + 1)), int(rng.integers(most + 1))
    x0, y0, x1, y1 = (size * edge for edge in scene.boxes[int(rng.integers(len(scene.boxes)))])
    jitter = rng.uniform(-0.35, 0.35, 2)
    top = (y0 + y1) / 2 + jitter[0] * (y1 - y0) - CROP / 2
    left = (x0 + x1) / 2 + jitter[1] * (x1 - x0) - CROP / 2
    return int(np.clip(top, 0, most)), int(np.clip(left, 0, most))


def to_tensor(pictures: np.ndarray | Tensor, device: str = "cpu") -> Tensor:
    """Turn (B, H, W, 3) bytes into (B, 3, H, W) floats in [-1, 1], channels last in memory."""
    tensor = torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2)
    return tensor.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def save_grid(pictures: Tensor, file: Path, columns: int) -> None:
    """Write (N, 3, H, W) pictures in [-1, 1] as one PNG."""
    from PIL import Image

    count, _, height, width = pictures.shape
    tiles = pictures.add(1).mul(127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    sheet = np.zeros((-(-count // columns) * height, columns * width, 3), np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + height, x : x + width] = tile
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(file)
