"""How each network of the bundle becomes ONNX: its torch module, tracing and parity inputs.

optimum traces what it knows, the UNet and AutoencoderKL; torch.onnx traces the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from cloud_server.torchvision_guard import guard
from cloud_server.training.predictor import Predictor
from export.text import OpenClipTower, TextTower

guard()
from diffusers import (  # noqa: E402  the guard must come first
    AutoencoderKL,
    AutoencoderTiny,
    UNet2DConditionModel,
)
from optimum.exporters.onnx.convert import export as optimum_export  # noqa: E402
from optimum.exporters.onnx.model_configs import (  # noqa: E402
    UNetOnnxConfig,
    VaeDecoderOnnxConfig,
)

OPTIMUM_OPSET = 18  # what optimum recommends as the least
MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class Network:
    """A torch module with tensors in and out, how to trace it, and inputs to compare it on."""

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    trace: Callable[[Path], None]
    samples: Sequence[tuple[Tensor, ...]]


class _Denoiser(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _Decoder(nn.Module):
    def __init__(self, vae: AutoencoderKL | AutoencoderTiny) -> None:
        super().__init__()
        self.vae = vae
        self.config = vae.config  # optimum looks for it

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def text_encoder(tower: TextTower | OpenClipTower) -> Network:
    """Token ids (B, n) to hidden states (B, n, d) and the pooled state (B, d)."""
    rng = torch.Generator().manual_seed(0)

    def prompts(batch: int, length: int) -> Tensor:
        end = tower.vocab_size - 1
        ids = torch.randint(end - 1, (batch, length), generator=rng)
        # Prompts end somewhere, each in another place.
        ids[torch.arange(batch), torch.randint(1, length, (batch,), generator=rng)] = end
        return ids

    longest = tower.context_length
    dims = {0: torch.export.Dim("batch", max=MAX_BATCH), 1: torch.export.Dim("length", max=longest)}

    def trace(file: Path) -> None:
        write_onnx(tower, (prompts(2, longest - 1),), file, names, outputs, (dims,))

    names, outputs = ("input_ids",), ("hidden", "pooled")
    samples = [(prompts(1, longest),), (prompts(3, longest),), (prompts(1, longest // 2),)]
    return Network(tower, names, outputs, trace, samples)


def predictor(model: Predictor, context_length: int) -> Network:
    """Hidden states (B, n, d) and the mask (B, n) of prompt tokens to D (B, k)."""
    config = model.config
    rng = torch.Generator().manual_seed(0)

    def prompts(batch: int, length: int) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(batch, length)
        for row in mask:
            row[1 : int(torch.randint(2, length, (), generator=rng))] = 1
        return torch.randn(batch, length, config.width, generator=rng), mask

    least = max(config.top_k, 2)  # fewer tokens than the gates pick make another graph
    batch = torch.export.Dim("batch", max=MAX_BATCH)
    length = torch.export.Dim("length", min=least, max=context_length)
    dims = ({0: batch, 1: length}, {0: batch, 1: length})

    def trace(file: Path) -> None:
        write_onnx(model, prompts(2, context_length - 1), file, names, outputs, dims)

    names, outputs = ("hidden", "mask"), ("d",)
    short = max(least + 1, context_length // 2)
    samples = [prompts(1, context_length), prompts(5, context_length), prompts(1, short)]
    return Network(model, names, outputs, trace, samples)


def unet(model: UNet2DConditionModel, context_length: int) -> Network:
    """Latents (B, c, h, w), a scalar timestep and text states (B, n, d) to the prediction."""
    config = model.config
    rng = torch.Generator().manual_seed(0)
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]

    def sample(batch: int, h: int, w: int, timestep: float) -> tuple[Tensor, ...]:
        return (
            torch.randn(batch, config.in_channels, h, w, generator=rng),
            torch.tensor(timestep),
            torch.randn(batch, context_length, config.cross_attention_dim, generator=rng),
        )

    def trace(file: Path) -> None:
        # Sizes that do not halve evenly take diffusers' way through the up blocks that fits all.
        odd = SimpleNamespace(**{**config, "sample_size": (size + 1, size + 3)})
        optimum_export(
            model, UNetOnnxConfig(odd, task="semantic-segmentation"), file, opset=OPTIMUM_OPSET
        )

    inputs = ("sample", "timestep", "encoder_hidden_states")
    samples = [
        sample(1, size, size, 999.0),
        sample(2, size, size + size // 2, 481.5),
        sample(1, size - 1, size + 1, 1.0),
    ]
    return Network(_Denoiser(model).eval(), inputs, ("out_sample",), trace, samples)


def vae_decoder(vae: AutoencoderKL | AutoencoderTiny, size: int) -> Network:
    """Unscaled latents (B, c, h, w) to pictures (B, 3, H, W), about [-1, 1]."""
    decoder = _Decoder(vae).eval()
    rng = torch.Generator().manual_seed(0)

    def latents(batch: int, h: int, w: int) -> Tensor:
        return torch.randn(batch, vae.config.latent_channels, h, w, generator=rng)

    def trace(file: Path) -> None:
        if isinstance(vae, AutoencoderKL):
            config = VaeDecoderOnnxConfig(vae.config, task="semantic-segmentation")
            optimum_export(decoder, config, file, opset=OPTIMUM_OPSET)
            return
        h, w = torch.export.Dim("h", max=512), torch.export.Dim("w", max=512)
        dims = {0: torch.export.Dim("batch", max=MAX_BATCH), 2: h, 3: w}
        write_onnx(decoder, (latents(2, 6, 10),), file, names, outputs, (dims,))

    names, outputs = ("latent_sample",), ("sample",)
    samples = [(latents(1, size, size),), (latents(2, size // 2, size // 2 + 1),)]
    return Network(decoder, names, outputs, trace, samples)


def write_onnx(
    module: nn.Module,
    example: tuple[Tensor, ...],
    file: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[dict, ...],
) -> None:
    """Trace a module on an example and write it as ONNX."""
    # The example has two prompts or latents: a batch of one would be taken for a constant.
    torch.onnx.export(
        module,
        example,
        file,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=dynamic_shapes,
        dynamo=True,
        external_data=True,
        optimize=True,
        verbose=False,
    )
