"""The text encoders of a bundle: weights, tokenizers, and whether two of them are one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cloud_server.torchvision_guard import guard
from export.errors import ExportError

guard()
import open_clip  # noqa: E402  the guard must come first
from transformers import CLIPTextModel, CLIPTokenizerFast  # noqa: E402

PROBES = ("", "two red apples to the left of a cat", "Ein Haus, 3 Bäume & 1 Auto!", "夜の城 🌙")
SAME_COSINE = 0.9999  # weights stored in half precision stay above 0.99999
OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")


class TextTower(nn.Module):
    """transformers' CLIP text model: ids (B, n) to hidden states (B, n, d) and pooled (B, d)."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = int(encoder.config.hidden_size)
        self.context_length = int(encoder.config.max_position_embeddings)
        self.vocab_size = int(encoder.config.vocab_size)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.encoder(input_ids=input_ids)
        return out.last_hidden_state, out.pooler_output


class OpenClipTower(nn.Module):
    """open_clip's text tower with the same inputs and outputs as `TextTower`."""

    text: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text = getattr(model, "text", model)  # some open_clip classes nest it, some do not
        self.vocab_size, self.width = map(int, self.text.token_embedding.weight.shape)
        self.context_length = len(self.text.positional_embedding)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        batch, length = input_ids.shape
        states = self.text.token_embedding(input_ids) + self.text.positional_embedding[:length]
        mask = self.text.attn_mask[:length, :length]
        states = self.text.ln_final(self.text.transformer(states, attn_mask=mask))
        # The end of the text has the highest id; what follows it is padding.
        return states, states[torch.arange(batch), input_ids.argmax(-1)]


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A tokenizer as the device reads it: `tokenizers` JSON without padding or truncation."""

    json: str
    context_length: int
    pad_id: int
    probes: Tensor  # ids of PROBES, padded  (P, context_length)


@dataclass(frozen=True, slots=True)
class TextSource:
    """A text encoder with its tokenizer and the files its weights came from."""

    tower: TextTower | OpenClipTower
    tokenizer: TextTokenizer
    files: Sequence[Path]


def from_pipeline(folder: Path) -> TextSource:
    """Load what a diffusers pipeline is conditioned by."""
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tower = TextTower(encoder).eval()
    tokenizer = read_tokenizer(folder / "tokenizer", tower.context_length)
    return TextSource(tower, tokenizer, (folder / "text_encoder",))


def from_open_clip(folder: Path) -> TextSource:
    """Load the text tower of an open_clip folder; raises ExportError when it is none."""
    for needed in OPEN_CLIP_FILES:
        if not (folder / needed).is_file():
            raise ExportError(
                f"'{folder}' is no open_clip folder: it has no {needed}; "
                "pass the one the router was trained with"
            )
    model = open_clip.create_model(f"local-dir:{folder.resolve()}", precision="fp32")
    tower = OpenClipTower(model).eval()
    tokenizer = read_tokenizer(folder, tower.context_length)
    return TextSource(tower, tokenizer, [folder / name for name in OPEN_CLIP_FILES])


def read_tokenizer(folder: Path, longest: int) -> TextTokenizer:
    """Read a CLIP tokenizer folder, with or without tokenizer.json; contexts end at `longest`."""
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as err:
        raise ExportError(
            f"'{folder}' holds no CLIP tokenizer (tokenizer.json or vocab.json and merges.txt); "
            "fetch or train the model again"
        ) from err
    context_length = min(tokenizer.model_max_length, longest)
    probes = tokenizer(
        list(PROBES),
        padding="max_length",
        truncation=True,
        max_length=context_length,
        return_tensors="pt",
    ).input_ids
    core = tokenizer.backend_tokenizer
    core.no_padding()
    core.no_truncation()
    return TextTokenizer(core.to_str(), context_length, int(tokenizer.pad_token_id), probes)


@torch.inference_mode()
def gives(source: TextSource, prompt: str, state: Sequence[float]) -> bool:
    """Tell whether the end token of `prompt` gets this state (d,), within half precision."""
    tokenizer = Tokenizer.from_str(source.tokenizer.json)
    ids = tokenizer.encode(prompt).ids
    padding = [source.tokenizer.pad_id] * (source.tokenizer.context_length - len(ids))
    pooled = source.tower(torch.tensor([ids + padding]))[1][0]
    wanted = torch.tensor(state)
    return bool(cosine_similarity(pooled, wanted, dim=0) >= SAME_COSINE)


@torch.inference_mode()
def are_one(a: TextSource, b: TextSource) -> bool:
    """Tell whether two text encoders give the same states for the same prompts."""
    probes = a.tokenizer.probes
    if a.tower.width != b.tower.width or not torch.equal(probes, b.tokenizer.probes):
        return False
    similar = cosine_similarity(a.tower(probes)[0], b.tower(probes)[0], dim=-1)
    return bool(similar.min() >= SAME_COSINE)
