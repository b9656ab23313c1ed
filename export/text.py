"""The text encoders of a bundle: weights, tokenizers, and whether two of them are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cloud_server.torchvision_guard import guard
from export.bundle_writer import DIFFUSION_TEXTS, ROUTER_TEXT
from export.errors import ExportError
from export.families import Family

guard()
import open_clip  # noqa: E402  the guard must come first
import transformers  # noqa: E402

PROBES = ("", "two red apples to the left of a cat", "Ein Haus, 3 Bäume & 1 Auto!", "夜の城 🌙")
SAME_COSINE = 0.9999  # weights stored in half precision stay above 0.99999
OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")


class TextTower(nn.Module):
    """transformers' CLIP text model: ids (B, n) to hidden states (B, n, d) and pooled (B, d).

    With `penultimate` also to the states before the last layer, as they are. Pooled is the end
    token's state, projected where the model has a projection.
    """

    def __init__(self, encoder: transformers.PreTrainedModel, penultimate: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.outputs = ("hidden", "pooled", "penultimate") if penultimate else ("hidden", "pooled")
        self.width = int(encoder.config.hidden_size)
        self.context_length = int(encoder.config.max_position_embeddings)
        self.vocab_size = int(encoder.config.vocab_size)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        penultimate = "penultimate" in self.outputs
        out = self.encoder(input_ids=input_ids, output_hidden_states=penultimate)
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        states = (out.hidden_states[-2],) if penultimate else ()
        return out.last_hidden_state, pooled, *states


class OpenClipTower(nn.Module):
    """open_clip's text tower with the same inputs and outputs as `TextTower`."""

    text: Any
    outputs = ("hidden", "pooled")

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


@dataclass(frozen=True, slots=True)
class Texts:
    """The text encoders of a bundle by component, and which of them the denoiser reads."""

    sources: Mapping[str, TextSource]
    diffusion: tuple[str, ...]

    @property
    def router(self) -> TextSource:
        """The text encoder that the router reads."""
        return self.sources[ROUTER_TEXT]

    @property
    def context_length(self) -> int:
        """Tokens of the denoiser's prompts."""
        return self.sources[self.diffusion[0]].tokenizer.context_length

    @property
    def width(self) -> int:
        """Width of the states of all the denoiser's encoders side by side."""
        return sum(self.sources[name].tower.width for name in self.diffusion)


def read_texts(folder: Path, family: Family, *, clip: Path | None, original: Path) -> Texts:
    """Load the text encoders of router and denoiser: one where they agree.

    The router reads that of the open_clip folder `clip`, or without it the first of the pipeline
    as it was before LoRAs were merged, in `original`.
    """
    own = from_pipeline(folder, family)
    router = own[0]
    if clip is not None or original != folder:
        router = from_open_clip(clip) if clip else from_pipeline(original, family)[0]
        router = next((each for each in own if are_one(router, each)), router)
    sources, diffusion = {ROUTER_TEXT: router}, []
    for each, name in zip(own, DIFFUSION_TEXTS, strict=False):
        component = ROUTER_TEXT if each is router else name
        sources[component] = each
        diffusion.append(component)
    return Texts(sources, tuple(diffusion))


def from_pipeline(folder: Path, family: Family) -> list[TextSource]:
    """Load what a diffusers pipeline is conditioned by, in order."""
    penultimate = family.text_states == "penultimate"
    sources = []
    for each in family.encoders:
        kind = getattr(transformers, each.kind)
        encoder = kind.from_pretrained(folder / each.folder, dtype=torch.float32)
        tower = TextTower(encoder, penultimate).eval()
        tokenizer = read_tokenizer(folder / each.tokenizer, tower.context_length)
        sources.append(TextSource(tower, tokenizer, (folder / each.folder,)))
    return sources


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
        tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
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
    end = source.tower(torch.tensor([ids + padding]))[0][0, len(ids) - 1]
    wanted = torch.tensor(state)
    return bool(cosine_similarity(end, wanted, dim=0) >= SAME_COSINE)


@torch.inference_mode()
def are_one(a: TextSource, b: TextSource) -> bool:
    """Tell whether two text encoders give the same states for the same prompts."""
    probes = a.tokenizer.probes
    if a.tower.width != b.tower.width or not torch.equal(probes, b.tokenizer.probes):
        return False
    similar = cosine_similarity(a.tower(probes)[0], b.tower(probes)[0], dim=-1)
    return bool(similar.min() >= SAME_COSINE)
