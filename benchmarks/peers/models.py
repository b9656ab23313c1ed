"""Pipelines of the sizes people use, with random weights, saved by diffusers in its own layout.

Weights do not change how long a network takes, so nothing needs to be fetched for this. The small
ones are for trying the benchmark itself.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cloud_server.torchvision_guard import guard

guard()
import open_clip  # noqa: E402  the guard must come first
from diffusers import (  # noqa: E402
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

CONTEXT = 77
VOCABULARY = 49408
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_NO_MIDDLE = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": None,
    "layers_per_block": 1,
}

# https://huggingface.co/stabilityai/sd-turbo: Stable Diffusion 2.1's UNet, ViT-H's text tower
SD_TURBO_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VIT_H_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
# https://huggingface.co/nota-ai/bk-sdm-tiny, with ViT-L/14's text tower
BK_SDM_TINY_UNET = _NO_MIDDLE | {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
VIT_L_14 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
_SMALL_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32, 64, 64),
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "layers_per_block": 1,
}
_SMALL_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@dataclass(frozen=True, slots=True)
class Model:
    """A pipeline to make: its networks' sizes, and how it draws."""

    unet: dict[str, Any]
    text: dict[str, Any]
    pad: str
    scheduler: Callable[[], Any]
    steps: int
    guidance: float

    @property
    def side(self) -> int:
        """Pixels a side."""
        return 8 * int(self.unet["sample_size"])


def _turbo() -> Any:
    return EulerDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="trailing")


def _solver() -> Any:
    return DPMSolverMultistepScheduler(**_BETAS, steps_offset=1, timestep_spacing="trailing")


MODELS = {
    "sd-turbo": Model(SD_TURBO_UNET, VIT_H_14, "!", _turbo, steps=1, guidance=0.0),
    "tiny-sd": Model(BK_SDM_TINY_UNET, VIT_L_14, EOS, _solver, steps=8, guidance=7.5),
}
SMALL_MODELS = {
    "sd-turbo": Model(_SMALL_UNET, _SMALL_TEXT, "!", _turbo, steps=1, guidance=0.0),
    "tiny-sd": Model(
        _SMALL_UNET | _NO_MIDDLE | {"block_out_channels": (32, 32, 64)},
        _SMALL_TEXT,
        EOS,
        _solver,
        steps=2,
        guidance=7.5,
    ),
}


def make_pipeline(model: Model, folder: Path) -> None:
    """Write `model` with random weights into `folder`, and its defaults.json."""
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=_visible(AutoencoderTiny()),
        text_encoder=make_text_encoder(model.text),
        tokenizer=make_tokenizer(folder / "tokenizer", model.pad),
        unet=UNet2DConditionModel(**model.unet),
        scheduler=model.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    size = {"width": model.side, "height": model.side}
    drawing = size | {"steps": model.steps, "guidance": model.guidance}
    (folder / "defaults.json").write_text(json.dumps(drawing), encoding="utf-8")


def make_text_encoder(sizes: dict[str, Any]) -> CLIPTextModel:
    """Return a CLIP text tower of these sizes with random weights."""
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPTextConfig(**ids, max_position_embeddings=CONTEXT, **sizes)
    return CLIPTextModel(config).eval()


def make_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """Write CLIP's own tokenizer, whose merges come with open_clip, and return it."""
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    letters = list(bytes_to_unicode().values())
    merges = lines[1 : VOCABULARY - 2 * len(letters) - 2 + 1]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges] + [BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return CLIPTokenizer(*files, pad_token=pad, model_max_length=CONTEXT)


@torch.no_grad()
def _visible(vae: AutoencoderTiny) -> AutoencoderTiny:
    """Fit the last layer so that pictures fill the range of pixels; untrained ones are grey."""
    last = vae.decoder.layers[-1]
    last.bias.zero_()
    drawn = (vae.decode(torch.randn(1, 4, 32, 32)).sample + 1) / 2
    scale = 0.2 / drawn.std()
    last.weight *= scale
    last.bias += 0.5 - scale * drawn.mean(dim=(0, 2, 3))
    return vae
