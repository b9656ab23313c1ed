"""The networks that draw: diffusers' UNets and transformers, with all they are told as inputs.

What depends only on those inputs is part of the network, so that the device feeds plain values:
the embedding of guidance, and the place of the text encoder that is left out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloud_server.torchvision_guard import guard
from export.fused import fuse
from export.network import Network, trace_by_running

guard()
from diffusers import SD3Transformer2DModel, UNet2DConditionModel  # noqa: E402  after the guard

PLAIN = ("sample", "timestep", "encoder_hidden_states")
SCALARS = ("timestep", "guidance")
TIME_IDS = 6  # heights and widths of original and target, and where the target was cropped
LEFT_OUT_TOKENS = 256  # of T5, for which diffusers puts zeros in


class UNet(nn.Module):
    """Latents (B, c, h, w), a scalar timestep and text states (B, n, d) to the prediction.

    `text_embeds` (B, d) and `time_ids` (B, 6) are SDXL's; the scalar `guidance` is that of a
    consistency model, which imitates guidance of that strength in one run.
    """

    def __init__(self, unet: UNet2DConditionModel, text_width: int) -> None:
        super().__init__()
        fuse(unet)
        self.unet = unet
        config = unet.config
        self.channels = int(config.in_channels)
        self.widths = {"encoder_hidden_states": text_width}
        self.inputs: tuple[str, ...] = PLAIN
        if config.addition_embed_type == "text_time":
            time_width = TIME_IDS * config.addition_time_embed_dim
            pooled_width = config.projection_class_embeddings_input_dim - time_width
            self.widths |= {"text_embeds": pooled_width, "time_ids": TIME_IDS}
            self.inputs += ("text_embeds", "time_ids")
        if config.time_cond_proj_dim is not None:
            self.inputs += ("guidance",)

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, *more: Tensor) -> Tensor:
        told = dict(zip(self.inputs[len(PLAIN) :], more, strict=True))
        added = {name: told[name] for name in ("text_embeds", "time_ids") if name in told}
        condition = None
        if "guidance" in told:
            condition = _embed(told["guidance"] - 1, self.unet.config.time_cond_proj_dim)
        return self.unet(
            sample,
            timestep,
            states,
            timestep_cond=condition,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


class Transformer(nn.Module):
    """Stable Diffusion 3's network; its states (B, n, d) are those of the two CLIPs alone."""

    def __init__(self, transformer: SD3Transformer2DModel, text_width: int) -> None:
        super().__init__()
        self.transformer = transformer
        config = transformer.config
        self.channels = int(config.in_channels)
        self.inputs = (*PLAIN, "pooled_projections")
        self.widths = {
            "encoder_hidden_states": text_width,
            "pooled_projections": int(config.pooled_projection_dim),
        }

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        missing = self.transformer.config.joint_attention_dim - states.shape[-1]
        return self.transformer(
            hidden_states=sample,
            timestep=timestep.expand(sample.shape[0]),
            encoder_hidden_states=functional.pad(states, (0, missing, 0, LEFT_OUT_TOKENS)),
            pooled_projections=pooled,
            return_dict=False,
        )[0]


def denoiser(model: UNet | Transformer, size: int, context: int, *, step: int) -> Network:
    """Return the network for latents of about `size` a side that are multiples of `step`."""
    rng = torch.Generator().manual_seed(0)

    def sample(batch: int, h: int, w: int, timestep: float) -> tuple[Tensor, ...]:
        def value(name: str) -> Tensor:
            if name == "sample":
                return torch.randn(batch, model.channels, h, w, generator=rng)
            if name in SCALARS:
                return torch.tensor(timestep if name == "timestep" else 1 + timestep / 100)
            if name == "time_ids":
                return torch.tensor([[8.0 * h, 8.0 * w, 0, 0, 8.0 * h, 8.0 * w]] * batch)
            shape = (context, model.widths[name]) if name == PLAIN[2] else (model.widths[name],)
            return torch.randn(batch, *shape, generator=rng)

        return tuple(value(name) for name in model.inputs)

    # Sizes that do not halve evenly take diffusers' way through the up blocks that fits all.
    example = sample(2, size + step, size - step, 500.0)
    axes: dict[str, dict[int, str]] = {
        name: {0: "batch"} for name in model.inputs if name not in SCALARS
    }
    axes["sample"] |= {2: "height", 3: "width"}
    axes["encoder_hidden_states"] |= {1: "length"}

    def trace(file: Path) -> None:
        trace_by_running(model, example, file, model.inputs, ("out_sample",), axes)

    half = size // 2 // step * step
    samples = [
        sample(1, size, size, 999.0),
        sample(2, size, size + half, 481.5),
        sample(1, size - step, size + step, 1.0),
    ]
    return Network(model.eval(), model.inputs, ("out_sample",), trace, samples)


def _embed(value: Tensor, width: int) -> Tensor:
    """Return diffusers' `get_guidance_scale_embedding` of a scalar, (1, width)."""
    half = width // 2
    rates = torch.tensor([10000.0 ** (-i / (half - 1)) for i in range(half)])
    angles = value * 1000.0 * rates
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(width % 2)])[None]


WRAPPERS: dict[str, type[UNet] | type[Transformer]] = {
    "UNet2DConditionModel": UNet,
    "SD3Transformer2DModel": Transformer,
}
