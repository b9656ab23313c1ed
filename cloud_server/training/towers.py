"""Text encoders of all makes behind one face: token ids to hidden states and one pooled state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

UNBOUNDED = 512  # tokens, where neither the model nor its tokenizer sets a limit


class Tower(nn.Module):
    """Token ids (B, n) to hidden states (B, n, d) and the pooled state (B, d).

    `pad_id` fills prompts up to `context_length` where somebody reads what stands there, else it
    is None and prompts are as long as they are. `end_id` is the token that must come last, if any.
    `outputs` names what it gives, which may be more.
    """

    width: int
    vocab_size: int
    context_length: int
    pad_id: int | None
    end_id: int | None = None
    outputs: tuple[str, ...] = ("hidden", "pooled")


class ClipTower(Tower):
    """transformers' CLIP text model; pooled is the state of the end token.

    No token sees those behind it, so that only a diffusion model asks for padding.
    """

    def __init__(self, model: Any, pad_id: int | None = None) -> None:
        super().__init__()
        self.encoder = model
        self.width = int(model.config.hidden_size)
        self.context_length = int(model.config.max_position_embeddings)
        self.vocab_size = int(model.config.vocab_size)
        self.end_id = self.vocab_size - 1
        self.pad_id = pad_id

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.encoder(input_ids=input_ids)
        return out.last_hidden_state, out.pooler_output


class HuggingFaceTower(Tower):
    """Any other encoder of transformers; pooled is the mean state.

    It never sees padding, so that it needs no attention mask and is not slowed down by it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model
        self.width = int(model.config.hidden_size)
        self.vocab_size = int(model.config.vocab_size)
        self.context_length = _positions(model)
        # SigLIP was trained on padded prompts and attends to what fills them up.
        padded = str(model.config.model_type).startswith("siglip")
        self.pad_id = int(model.config.pad_token_id) if padded else None

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.encoder(input_ids=input_ids).last_hidden_state
        return states, states.mean(1)


class OpenClipTower(Tower):
    """open_clip's own text transformer; pooled is the state of the end token."""

    text: Any

    def __init__(self, text: Any, pad_id: int) -> None:
        super().__init__()
        self.text = text
        self.vocab_size, self.width = map(int, text.token_embedding.weight.shape)
        embedded = getattr(text, "cls_emb", None)  # CoCa sees one more token, after the prompt's
        self.context_length = len(text.positional_embedding) - (embedded is not None)
        self.end_id = self.vocab_size - 1
        self.pad_id = pad_id if text.attn_mask is None else None  # without one, padding is seen

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        batch, length = input_ids.shape
        states = self.text.token_embedding(input_ids) + self.text.positional_embedding[:length]
        mask = self.text.attn_mask
        mask = None if mask is None else mask[:length, :length]
        states = self.text.ln_final(self.text.transformer(states, attn_mask=mask))
        # The end of the text has the highest id; what follows it is padding.
        return states, states[torch.arange(batch), input_ids.argmax(-1)]


def _positions(model: Any) -> int:
    """Return how many tokens the model has positions for."""
    positions = int(getattr(model.config, "max_position_embeddings", UNBOUNDED))
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return positions - table.padding_idx - 1  # RoBERTa counts from behind the padding
    return positions
