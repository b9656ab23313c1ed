"""How each network beside the denoiser becomes ONNX: its torch module, tracing, parity inputs.

optimum traces what it knows, AutoencoderKL; torch.onnx traces the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cloud_server.torchvision_guard import guard
from cloud_server.training.predictor import AnyPredictor
from cloud_server.training.towers import Tower
from export.network import MAX_BATCH, OPSET, Network, trace_symbolically

guard()
from diffusers import AutoencoderKL, AutoencoderTiny  # noqa: E402  the guard must come first
from optimum.exporters.onnx.convert import export as optimum_export  # noqa: E402
from optimum.exporters.onnx.model_configs import VaeDecoderOnnxConfig  # noqa: E402


class _Decoder(nn.Module):
    def __init__(self, vae: AutoencoderKL | AutoencoderTiny) -> None:
        super().__init__()
        self.vae = vae
        self.config = vae.config  # optimum looks for it

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def text_encoder(tower: Tower, longest: int, calibration: Sequence[Tensor] = ()) -> Network:
    """Token ids (B, n), n up to `longest`, to the tower's outputs.

    Those are states (B, n, d), pooled states (B, d), and the states before the last layer where the
    denoiser reads those. `calibration` are the ids of prompts as people write them.
    """
    rng = torch.Generator().manual_seed(0)

    def prompts(batch: int, length: int) -> Tensor:
        ids = torch.randint(tower.vocab_size - 2, (batch, length), generator=rng)
        if tower.end_id is not None:
            # Prompts end somewhere, each in another place.
            ends = torch.randint(1, length, (batch,), generator=rng)
            ids[torch.arange(batch), ends] = tower.end_id
        return ids

    dims = {0: torch.export.Dim("batch", max=MAX_BATCH), 1: torch.export.Dim("length", max=longest)}

    def trace(file: Path) -> None:
        trace_symbolically(tower, (prompts(2, longest - 1),), file, names, outputs, (dims,))

    names, outputs = ("input_ids",), tower.outputs
    samples = [(prompts(1, longest),), (prompts(3, longest),), (prompts(1, longest // 2),)]
    return Network(tower, names, outputs, trace, samples, [(ids,) for ids in calibration])


def predictor(model: AnyPredictor, context_length: int) -> Network:
    """Hidden states (B, n, d) and the mask (B, n) of prompt tokens to D (B, k)."""
    config = model.config
    rng = torch.Generator().manual_seed(0)

    def prompts(batch: int, length: int) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(batch, length)
        for row in mask:
            row[1 : int(torch.randint(2, length + 1, (), generator=rng))] = 1
        return torch.randn(batch, length, config.width, generator=rng), mask

    batch = torch.export.Dim("batch", max=MAX_BATCH)
    length = torch.export.Dim("length", min=2, max=context_length)
    dims = ({0: batch, 1: length}, {0: batch, 1: length})

    def trace(file: Path) -> None:
        trace_symbolically(model, prompts(2, context_length - 1), file, names, outputs, dims)

    names, outputs = ("hidden", "mask"), ("d",)
    samples = [prompts(1, context_length), prompts(5, context_length), prompts(1, 2)]
    return Network(model, names, outputs, trace, samples)


def vae_decoder(vae: AutoencoderKL | AutoencoderTiny, size: int) -> Network:
    """Unscaled latents (B, c, h, w) to pictures (B, 3, H, W), about [-1, 1]."""
    decoder = _Decoder(vae).eval()
    rng = torch.Generator().manual_seed(0)

    def latents(batch: int, h: int, w: int) -> Tensor:
        return torch.randn(batch, vae.config.latent_channels, h, w, generator=rng)

    def trace(file: Path) -> None:
        if isinstance(vae, AutoencoderKL):
            config = VaeDecoderOnnxConfig(vae.config, task="semantic-segmentation")
            optimum_export(decoder, config, file, opset=OPSET)
            return
        h, w = torch.export.Dim("h", max=512), torch.export.Dim("w", max=512)
        dims = {0: torch.export.Dim("batch", max=MAX_BATCH), 2: h, 3: w}
        trace_symbolically(decoder, (latents(2, 6, 10),), file, names, outputs, (dims,))

    names, outputs = ("latent_sample",), ("sample",)
    samples = [(latents(1, size, size),), (latents(2, size // 2, size // 2 + 1),)]
    return Network(decoder, names, outputs, trace, samples)
