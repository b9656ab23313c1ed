"""The edge model's last stage: its decoder learns to draw from what its own UNet leaves it.

A UNet that takes four steps leaves softer latents than pictures have, and the decoder, which only
knows those of pictures, draws them soft. As in VQGAN (Esser et al. 2021, section 3.1) the decoder
is trained on by pixels, by features of a network that knows such pictures, and against critics; the
UNet, the encoder and the cloud model stay as they are. The features are the recogniser's: CLIP and
the judge, which measure the result, have no part in the loss.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from cloud_server.torchvision_guard import guard
from cloud_server.training.loop import Budget, Prefetch, fit
from cloud_server.training.precision import autocast
from cloud_server.training.starter.autoencoder import difference, to_tensor
from cloud_server.training.starter.diffusion import (
    EDGE_DRAWS,
    Parts,
    ddim_step,
    few_steps,
    quick,
    save_model,
)
from cloud_server.training.starter.scenes import batch_at

if TYPE_CHECKING:
    from cloud_server.training.iciia.backbone import Backbone

guard()
from diffusers import UNet2DConditionModel  # noqa: E402  the guard must come first

BATCH = {"cpu": 6, "cuda": 96}  # a third each by where the UNet begins
BEGINNINGS = (0, 2, 3)  # steps of the four: from noise alone, and from pictures with noise added
EMPHASIS = (3.0, 2.0, 1.0, 1.0, 1.0)  # of one to five objects: few are what the edge is for
FEATURES, CRITICS = 0.5, 0.2  # weights in the loss; that of the pixels is 1
ALONE = 60  # steps that the critics learn before they are heard


def tune_decoder(
    starter: Path, eyes: Path, work: Path, budget: Budget, seed: int, device: str
) -> None:
    """Train the decoder of `starter/edge` on, in place; samples go to `work/decoder.png`.

    `eyes` is the folder of a recogniser's backbone. Needs the stage distil.
    """
    from cloud_server.training.iciia.backbone import open_backbone

    torch.manual_seed(seed)
    kind = torch.device(device).type
    parts = Parts(starter, starter / "edge" / "vae", device)
    vae = parts.vae.to(memory_format=torch.channels_last).requires_grad_(False)
    decoder = vae.decoder.requires_grad_(True)
    schedule = few_steps()
    stops = [*schedule.timesteps.tolist(), -1]  # -1 is the clean picture
    alphas = torch.cat([schedule.alphas_cumprod, torch.ones(1)]).to(device)
    unet = UNet2DConditionModel.from_pretrained(
        starter / "edge" / "unet", torch_dtype=torch.float32
    ).to(device, memory_format=torch.channels_last)
    forward = quick(unet.eval().requires_grad_(False), kind)
    look = Eyes(open_backbone(str(eyes))).to(device)
    batch = BATCH[kind]
    third = batch // len(BEGINNINGS)
    with torch.no_grad():
        widths = [maps.shape[1] for maps in look(torch.zeros(1, 3, 128, 128, device=device))]
    critics = nn.ModuleList([*map(feature_critic, widths), pixel_critic()]).to(device)
    learner = torch.optim.AdamW(critics.parameters(), lr=4e-3, betas=(0.0, 0.9))
    data = Prefetch(lambda step: _scenes(seed, step, batch), device)

    @torch.no_grad()
    def left_by_unet(clean: Tensor, states: Tensor, rng: torch.Generator) -> Tensor:
        noise = torch.randn(clean.shape, generator=rng, device=device)
        left = []
        for first, part in zip(BEGINNINGS, torch.arange(batch).split(third), strict=True):
            kept = alphas[stops[first]] if first else torch.zeros(1, device=device)
            latents = kept.sqrt() * clean[part] + (1 - kept).sqrt() * noise[part]
            for start, stop in pairwise(stops[first:]):
                at = torch.full((third,), start, device=device)
                velocity = forward(latents, at, states[part])
                latents, _ = ddim_step(latents, velocity, alphas[start], alphas[stop])
            left.append(latents)
        return torch.cat(left)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures, captions = data(step)
        truth = to_tensor(pictures, device)
        rng = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        with torch.no_grad(), autocast(kind):
            clean = vae.encoder(truth).float()
        left = left_by_unet(clean, parts.states(parts.tokens(captions)).float(), rng)
        with autocast(kind):
            drawn = decoder(left.contiguous(memory_format=torch.channels_last)).float()
        ours, true = [*look(drawn), drawn], [*look(truth), truth]
        told = [
            F.relu(1 - critic(t)).mean() + F.relu(1 + critic(o.detach())).mean()
            for critic, o, t in zip(critics, ours, true, strict=True)
        ]
        wrong = torch.stack(told).mean()
        learner.zero_grad(set_to_none=True)
        wrong.backward()
        learner.step()
        critics.requires_grad_(False)
        blame = torch.stack([-critic(o).mean() for critic, o in zip(critics, ours, strict=True)])
        critics.requires_grad_(True)
        # From the last step on the objects are where they were, and pictures can be compared.
        last = slice(batch - third, None)
        pixels = difference(drawn[last], truth[last])
        maps = zip(ours[:-1], true[:-1], strict=True)
        features = torch.stack([(o[last] - t[last]).abs().mean() / t.std() for o, t in maps]).mean()
        heard = CRITICS if step >= ALONE else 0.0
        loss = pixels + FEATURES * features + heard * blame.mean()
        shown = {"pixels": pixels, "features": features, "critics": wrong, "blame": blame.mean()}
        return loss, {name: value.item() for name, value in shown.items()}

    def save(_: nn.Module) -> None:
        save_model(
            parts.pipeline(unet, schedule), EDGE_DRAWS, starter / "edge", work / "decoder.png"
        )

    fit(
        "decoder", decoder, loss_fn, lr=3e-4, budget=budget, work=work, device=device, ema=0.99,
        warmup=30, beside=(critics, learner), on_checkpoint=save, about={"seed": seed},
    )  # fmt: skip


class Eyes(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to the backbone's maps of all stages but the last."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.backbone.network.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        eyes = self.backbone
        images = ((pictures + 1) * 127.5 - eyes.mean) / eyes.std
        with autocast(pictures.device):
            maps = eyes.network.forward_intermediates(
                images.contiguous(memory_format=torch.channels_last), intermediates_only=True
            )
        return [one.float() for one in maps[:-1]]


def feature_critic(channels: int, width: int = 64) -> nn.Module:
    """Return a critic of feature maps: to every place, how true it looks."""
    return nn.Sequential(
        nn.GroupNorm(4, channels, affine=False),
        spectral_norm(nn.Conv2d(channels, width, 3, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, 1, 1)),
    )


def pixel_critic(width: int = 32) -> nn.Module:
    """Return a critic of patches of the picture itself (Isola et al. 2017, section 3.2.2)."""
    sizes = ((3, width, 4, 2), (width, 2 * width, 4, 2), (2 * width, 2 * width, 3, 1))
    layers: list[nn.Module] = []
    for into, out, kernel, stride in sizes:
        convolution = nn.Conv2d(into, out, kernel, stride, padding=1)
        layers += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(2 * width, 1, 1)))


def _scenes(seed: int, step: int, count: int) -> tuple[Tensor, list[str]]:
    """Return pictures and captions; of three times as many, those of few objects more often."""
    pictures, captions, scenes = batch_at(seed + 70, step, 3 * count)
    weights = torch.tensor([EMPHASIS[scene.objects - 1] for scene in scenes])
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = torch.multinomial(weights, count, generator=rng).tolist()
    return torch.from_numpy(pictures[chosen]), [captions[i] for i in chosen]
