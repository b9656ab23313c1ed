"""What a prompt tells the denoiser: the text encoders' states, as the denoiser's inputs.

Families differ here and nowhere else: one or two text encoders, their last states or those before
the last layer, and whether pooled states go with them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_agent.bundle import DiffusionSpec
from edge_agent.routing.encoder import Encoded, TextEncoder

Feeds = dict[str, np.ndarray]


class Conditioner:
    """Encodes prompts with the text encoders of a diffusion model, in their order.

    What they say to a negative prompt, most often the empty one, is kept.
    """

    def __init__(self, spec: DiffusionSpec, encoders: Mapping[str, TextEncoder]) -> None:
        self._spec = spec
        self._encoders = encoders
        self._negative: tuple[str, Feeds] | None = None

    def encode(self, prompt: str, known: Mapping[str, Encoded]) -> Feeds:
        """Return by input name what `prompt` says; `known` is what text encoders already said.

        `encoder_hidden_states` (1, n, d) holds the states of all encoders side by side,
        `text_embeds` (1, d) the last encoder's pooled state, `pooled_projections` all of them.
        """
        encoded = [
            known.get(name) or self._encoders[name].encode(prompt)
            for name in self._spec.text_encoders
        ]
        penultimate = self._spec.text_states == "penultimate"
        return {
            "encoder_hidden_states": np.concatenate(
                [each.penultimate if penultimate else each.hidden for each in encoded], axis=-1
            ),
            "text_embeds": encoded[-1].pooled,
            "pooled_projections": np.concatenate([each.pooled for each in encoded], axis=-1),
        }

    def against(self, prompt: str) -> Feeds:
        """Return what a negative prompt says; models may take zeros for an empty one."""
        known = self._negative
        if known is None or known[0] != prompt:
            feeds = self.encode(prompt, {})
            if not prompt and self._spec.empty_is_zeros:
                feeds = {name: np.zeros_like(array) for name, array in feeds.items()}
            known = self._negative = (prompt, feeds)
        return known[1]
