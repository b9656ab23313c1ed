"""The text encoders of a bundle: of the pipeline, of the router, and whether some are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cloud_server.errors import ModelError
from cloud_server.torchvision_guard import guard
from cloud_server.training.encoders import (
    TextEncoder,
    assemble,
    open_encoder,
    read_tokenizer,
)
from cloud_server.training.towers import ClipTower
from export.bundle_writer import CRITIC_TEXT, DIFFUSION_TEXTS, ROUTER_TEXT
from export.errors import ExportError
from export.families import Family
from export.weights import FP16, check_finite, load_sound, variant_of

guard()
import transformers  # noqa: E402  the guard must come first

PROBES = ("", "two red apples to the left of a cat", "Ein Haus, 3 Bäume & 1 Auto!", "夜の城 🌙")
SAME_COSINE = 0.9999  # weights stored in half precision stay above 0.99999


class PipelineTower(ClipTower):
    """The CLIP that a pipeline is conditioned by; pooled is projected where it has a projection.

    With `penultimate` it also gives the states before the last layer (B, n, d), as they are.
    """

    def __init__(self, model: Any, pad_id: int, penultimate: bool) -> None:
        super().__init__(model, pad_id)
        if penultimate:
            self.outputs = (*self.outputs, "penultimate")

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        penultimate = "penultimate" in self.outputs
        out = self.encoder(input_ids=input_ids, output_hidden_states=penultimate)
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        states = (out.hidden_states[-2],) if penultimate else ()
        return out.last_hidden_state, pooled, *states


@dataclass(frozen=True, slots=True)
class Texts:
    """The text encoders of a bundle by component, and which of them denoiser and critic read."""

    encoders: Mapping[str, TextEncoder]
    diffusion: tuple[str, ...]
    critic: str | None

    @property
    def router(self) -> TextEncoder:
        """The text encoder that the router reads."""
        return self.encoders[ROUTER_TEXT]

    @property
    def context_length(self) -> int:
        """Tokens of the denoiser's prompts."""
        return self.encoders[self.diffusion[0]].context_length

    @property
    def width(self) -> int:
        """Width of the states of all the denoiser's encoders side by side."""
        return sum(self.encoders[name].tower.width for name in self.diffusion)


def open_text(source: str | Path) -> TextEncoder:
    """Open a text encoder in any format that a router can be trained on; raises ExportError."""
    own = Path(source) / "text_encoder"
    if own.is_dir() and variant_of(own):
        raise ExportError(
            f"'{own}' has weights of the {FP16} variant only, which training reads no prompts "
            "with; pass --text-encoder with the model that the router was trained on"
        )
    try:
        encoder = open_encoder(source)
    except ModelError as err:
        raise ExportError(str(err)) from err
    check_finite(encoder.tower.state_dict(), source)
    return encoder


def read_texts(
    folder: Path, family: Family, router: TextEncoder, critic: TextEncoder | None = None
) -> Texts:
    """Load the text encoders of the pipeline in `folder`, to go with the router's and the critic's.

    Where the router's is one of them, the pipeline's stands for both: it gives all that the
    denoiser reads, and pads as the denoiser needs it. Raises ExportError.
    """
    own = from_pipeline(folder, family)
    router = next((each for each in own if are_one(router, each)), router)
    encoders, diffusion = {ROUTER_TEXT: router}, list[str]()
    for each, name in zip(own, DIFFUSION_TEXTS, strict=False):
        component = ROUTER_TEXT if each is router else name
        encoders[component] = each
        diffusion.append(component)
    if critic is None:
        return Texts(encoders, tuple(diffusion), None)
    # The pooled state of one and the same model differs from library to library.
    if type(router.tower) is type(critic.tower) and are_one(router, critic):
        return Texts(encoders, tuple(diffusion), ROUTER_TEXT)
    return Texts(encoders | {CRITIC_TEXT: critic}, tuple(diffusion), CRITIC_TEXT)


def from_pipeline(folder: Path, family: Family) -> list[TextEncoder]:
    """Load what a diffusers pipeline is conditioned by, in order; raises ExportError."""
    encoders = []
    for each in family.encoders:
        kind = getattr(transformers, each.kind)
        try:
            model = load_sound(kind, folder / each.folder, dtype=torch.float32)
            tokenizer = read_tokenizer(folder / each.tokenizer)
            tower = PipelineTower(
                model, int(tokenizer.pad_token_id), family.text_states == "penultimate"
            )
            encoders.append(assemble(each.folder, tower, tokenizer, (folder / each.folder,)))
        except ModelError as err:
            raise ExportError(str(err)) from err
    return encoders


def gives(encoder: TextEncoder, prompt: str, state: Sequence[float]) -> bool:
    """Tell whether the pooled state of `prompt` is this one (d,), within half precision."""
    similar = cosine_similarity(torch.tensor(encoder.state(prompt)), torch.tensor(state), dim=0)
    return bool(similar >= SAME_COSINE)


@torch.inference_mode()
def are_one(a: TextEncoder, b: TextEncoder) -> bool:
    """Tell whether two text encoders give the same states for the same prompts."""
    if a.tower.width != b.tower.width:
        return False
    for prompt in PROBES:
        (words, states), (others, their_states) = _read(a, prompt), _read(b, prompt)
        if not np.array_equal(words, others):
            return False
        similar = cosine_similarity(states, their_states, dim=-1)
        if len(similar) and similar.min() < SAME_COSINE:
            return False
    return True


def _read(encoder: TextEncoder, prompt: str) -> tuple[NDArray[np.int64], Tensor]:
    """Return ids (n,) and states (n, d) of the words; one of the two may pad and the other not."""
    tokens = encoder.tokenizer.encode(prompt)
    states = encoder.tower(torch.from_numpy(tokens.input_ids))[0]
    return tokens.input_ids[tokens.mask > 0], states[torch.from_numpy(tokens.mask) > 0]
