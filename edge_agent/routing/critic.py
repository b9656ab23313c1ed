"""The critic: the edge has drawn; is its picture good enough, or shall the cloud draw another?

That is a cascade, as FrugalGPT's (Chen et al. 2023, arXiv 2305.05176). The critic measures the
picture's qualities with the CLIP that made the router's labels; how far they are from what the
prompt let expect corrects what the router said. The answer is a score like the router's, under a
threshold of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edge_agent.bundle import Bundle, CriticSpec, Metric
from edge_agent.errors import ConfigError
from edge_agent.recognition.pictures import Pixels, square
from edge_agent.routing.encoder import Encoded, Session
from edge_agent.routing.policy import threshold
from edge_agent.routing.router import Encoder, by_metric, judged, words_of
from edge_agent.types import Decision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image


def critic_of(bundle: Bundle) -> CriticSpec:
    """Return what a cascade with this bundle looks by; raises ConfigError where it cannot."""
    if bundle.critic is None:
        raise ConfigError(
            f"the bundle {bundle.path} has no critic to look at pictures with; export it with "
            "a router that has one, or leave the cascade away"
        )
    return bundle.critic


def seen(picture: Image, side: int, *, squashed: bool) -> Pixels:
    """Return a picture (side, side, 3) as the critic's CLIP is shown it."""
    from PIL import Image

    if squashed:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return square(picture, side)


class Critic:
    """Sends at most a share of pictures to be drawn again by the cloud: those that gain most."""

    def __init__(
        self,
        text_encoder: Encoder,
        network: Session,
        spec: CriticSpec,
        metrics: Sequence[Metric],
        share: float,
        *,
        capped: bool = True,
    ) -> None:
        self._text_encoder = text_encoder
        self._network = network
        self._spec = spec
        self._metrics = metrics
        self.share = share
        self.threshold = threshold(spec.score_digest, share, capped=capped)

    def judge(
        self, picture: Image, prompt: str, encoded: Encoded, before: Mapping[str, float]
    ) -> Decision:
        """Return whether a picture that the edge drew is kept, with its measured qualities.

        `encoded` is the prompt as the router reads it, `before` are the distances that it told.
        Raises BundleError for a broken network.
        """
        text = self._text_encoder.encode(prompt)
        quality, d = self._network.run(
            {
                "picture": seen(picture, self._spec.side, squashed=self._spec.squashed)[None],
                "text": text.pooled,
                **words_of(encoded),
                "before": np.array([list(before.values())], np.float32),
            }
        )
        distances = by_metric("critic", d, self._metrics)
        decision = judged(distances, self._metrics, self.share, self.threshold, encoded.dropped)
        return replace(decision, quality=by_metric("critic", quality, self._metrics))
