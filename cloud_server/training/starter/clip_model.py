"""The starter CLIP as a model: its sizes, its folder, and what of it conditions diffusion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloud_server.torchvision_guard import guard
from cloud_server.training.starter.tokenizer import CONTEXT_LENGTH
from cloud_server.training.weights import save_weights

guard()
import open_clip  # noqa: E402  the guard must come first
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

Config = dict[str, Any]  # open_clip's own description of a model

WIDTH, HEADS, TEXT_LAYERS = 192, 6, 6
CONDITION_LAYERS = 4  # of them, whose states condition diffusion and feed the router
VISION: Config = {
    "image_size": 128,
    "patch_size": 16,
    "width": WIDTH,
    "layers": 6,
    "head_width": 32,
}


def model_config(vocabulary: int) -> Config:
    """Return the open_clip description of the model, 6 M parameters."""
    return {
        "embed_dim": WIDTH,
        "vision_cfg": VISION,
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary,
            "width": WIDTH,
            "heads": HEADS,
            "layers": TEXT_LAYERS,
            "hf_tokenizer_name": "starter",  # any name: the folder's own files are used
            "tokenizer_kwargs": {"clean": "whitespace"},
        },
    }


def model_arguments(config: Config) -> Config:
    """Return what open_clip.CLIP wants of the description."""
    text = {k: v for k, v in config["text_cfg"].items() if k != "tokenizer_kwargs"}
    return {**config, "text_cfg": text}


def text_states(model: open_clip.CLIP, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states that condition diffusion and the last ones, each normalised (B, n, d).

    Encoded as open_clip does it, without the padding that no prompt of the batch needs.
    """
    length = int(tokens.argmax(-1).max()) + 1
    states = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    mask = model.attn_mask[:length, :length]
    read = states
    for layer, block in enumerate(model.transformer.resblocks, start=1):
        states = block(states, attn_mask=mask)
        read = states if layer == CONDITION_LAYERS else read
    return model.ln_final(read), model.ln_final(states)


def pool(model: open_clip.CLIP, states: Tensor, tokens: Tensor) -> Tensor:
    """Return the embeddings (B, d) that the end tokens' last states come to."""
    ends = tokens.argmax(-1)
    pooled = states[torch.arange(len(tokens), device=tokens.device), ends]
    return (pooled @ model.text_projection).float()


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Return the embeddings (B, d) of captions, not normalised."""
    return pool(model, text_states(model, tokens)[1], tokens)


def save_clip(model: open_clip.CLIP, config: Config, out: Path) -> None:
    """Write open_clip's config and half-precision weights beside the tokenizer in `out`."""
    described = {
        "model_cfg": config,
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    (out / "open_clip_config.json").write_text(json.dumps(described, indent=1) + "\n")
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
    partial = out / "open_clip_model.partial"
    save_weights(weights, partial)
    partial.replace(out / "open_clip_model.safetensors")


def load_clip(folder: Path) -> open_clip.CLIP:
    """Open the folder in full precision, ready to use."""
    return open_clip.create_model(f"local-dir:{folder.resolve()}", precision="fp32").eval()


def to_transformers(folder: Path) -> CLIPTextModel:
    """Return what conditions diffusion as transformers' class: the text tower's first layers.

    The same weights and the same hidden states; the last normalisation is that of the whole tower.
    """
    source = load_clip(folder).state_dict()
    vocabulary = source["token_embedding.weight"].shape[0]
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=CONDITION_LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
    )
    model = CLIPTextModel(config)
    target = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    names = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for i in range(CONDITION_LAYERS):
        ours, theirs = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            for name, other in names.items():
                target[f"{theirs}.{other}.{kind}"] = source[f"{ours}.{name}.{kind}"]
            joined = source[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            for letter, part in zip("qkv", joined, strict=True):
                target[f"{theirs}.self_attn.{letter}_proj.{kind}"] = part
    model.text_model.load_state_dict(target, strict=False)
    return model.eval()
