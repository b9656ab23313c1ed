"""The critic's networks, from the CLIP that labelled and a router's critic.safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cloud_server.errors import ModelError
from cloud_server.torchvision_guard import guard
from cloud_server.training import critic as critics
from cloud_server.training.critic import CriticHead
from cloud_server.training.encoders import TextEncoder
from cloud_server.training.quality import Alignment, Clip, Metric, QualityScorer
from cloud_server.training.towers import OpenClipTower
from edge_agent.routing.critic import seen
from export.bundle_writer import CRITIC
from export.errors import ExportError
from export.network import Network, trace_symbolically
from export.sources import RouterFolder
from export.text import open_text

guard()
import open_clip  # noqa: E402  the guard must come first

PROBE = "a picture that no label asks for"  # or alignment would leave out one of the others
NEAR = 1e-3  # in qualities, from what labelled: both are computed in 32 bits


@dataclass(frozen=True, slots=True, eq=False)
class CriticSource:
    """A CLIP with its text encoder, opened, and a router's facts on the critic that it trained."""

    router: RouterFolder
    clip: Clip
    text: TextEncoder

    @property
    def facts(self) -> Mapping[str, Any]:
        """What router.json says of the critic."""
        critic: Mapping[str, Any] = self.router.spec["critic"]
        return critic

    @property
    def files(self) -> Sequence[Path]:
        """The files, beside the CLIP's weights, that the network is made of."""
        return (self.router.folder / critics.WEIGHTS,)

    @property
    def made_of(self) -> tuple[object, ...]:
        """What else tells its network from every other."""
        poles = [(m["positive"], m["negative"]) for m in self.router.spec["metrics"]]
        others = self.facts["others"]
        return self.clip.digest, poles, others, self.facts["sharpness"]

    @property
    def side(self) -> int:
        """Side of the pictures that the CLIP sees, in pixels; raises ExportError."""
        shown = self.clip.network.visual.preprocess_cfg
        size, how = shown["size"], (shown["resize_mode"], shown["interpolation"])
        height, width = (size, size) if isinstance(size, int) else size
        if height != width or how not in (("squash", "bicubic"), ("shortest", "bicubic")):
            raise ExportError(
                f"the CLIP '{self.clip.name}' sees pictures of {width}x{height}, resized by "
                f"{how[0]} and {how[1]}; the device can show it squares, by squash or shortest and "
                "bicubic; leave --critic away, or label with another CLIP"
            )
        return int(width)

    @property
    def squashed(self) -> bool:
        """Whether the CLIP sees all of a picture that is no square, and not its middle."""
        return bool(self.clip.network.visual.preprocess_cfg["resize_mode"] == "squash")

    def manifest(self, text_encoder: str) -> Mapping[str, Any]:
        """Return the bundle's entry `critic`."""
        return {
            "side": self.side,
            "squashed": self.squashed,
            "score_digest": self.facts["score_digest"],
            "text_encoder": text_encoder,
            "network": CRITIC,
        }

    def network(self, context_length: int) -> Network:
        """Return what looks at pictures; raises ExportError if it sees other than the labels do.

        The router reads prompts of up to `context_length` tokens.
        """
        looking = Looking(self)
        self._check(looking)
        return _network(looking, self, context_length)

    @torch.inference_mode()
    def _check(self, looking: Looking) -> None:
        """Compare the qualities of noise with those by the very code that makes labels."""
        looks, others = _looks(self.router), self.facts["others"]
        alignment = None if others is None else Alignment(0.5, tuple(others), len(others))
        scorer = QualityScorer(self.clip, looks, alignment)
        ids = torch.from_numpy(self.text.tokenizer.encode(PROBE).input_ids)
        pooled, rng = self.text.tower(ids)[1], np.random.default_rng(0)
        for height, width in ((self.side, self.side), (self.side, 2 * self.side)):
            noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            pixels = seen(noise, self.side, squashed=self.squashed)
            found = looking.quality(torch.tensor(pixels)[None], pooled).numpy()
            off = float(np.abs(found - scorer.score([noise], [PROBE])).max())
            if not off <= NEAR:
                raise ExportError(
                    f"the device would see pictures otherwise than the CLIP '{self.clip.name}' "
                    f"does, by {off:.3g}; leave --critic away, or label with another"
                )


def open_critic(source: str, router: RouterFolder) -> CriticSource:
    """Open the CLIP that a router's labels were made by; raises ExportError for any other.

    `source` is a folder in open_clip's format, or MODEL/PRETRAINED by its names.
    """
    facts = router.spec.get("critic")
    if facts is None:
        raise ExportError(
            f"the router in '{router.folder}' has no critic: its labels name no CLIP, or it was "
            "trained by an earlier version; leave --critic away, or train it again"
        )
    model, _, pretrained = source.partition("/")
    is_folder = Path(source).is_dir()
    if not is_folder and model not in open_clip.list_models():
        raise ExportError(
            f"there is no folder '{source}', nor MODEL/PRETRAINED of open_clip by this name; pass "
            f"the CLIP '{facts['clip']['name']}' that made the router's labels"
        )
    try:
        clip = Clip(source) if is_folder else Clip(model, pretrained or None)
        if clip.digest != facts["clip"]["digest"]:
            raise ExportError(
                f"the router in '{router.folder}' was taught by the CLIP '{facts['clip']['name']}' "
                f"with other weights than '{source}' has; pass that one as --critic"
            )
    except ModelError as err:
        raise ExportError(str(err)) from err
    text = open_text(source)
    if not isinstance(text.tower, OpenClipTower):
        raise ExportError(
            f"the text encoder of '{source}' is not open_clip's own, which the critic cannot use; "
            "leave --critic away, or label with another CLIP"
        )
    return CriticSource(router, clip, text)


class Looking(nn.Module):
    """A picture (1, side, side, 3) of bytes and its prompt to qualities (1, k) and D (1, k).

    `text` (1, w) is the pooled state of the CLIP's text encoder, `hidden` (1, n, d) and `mask`
    (1, n) are the prompt as the router reads it, `before` (1, k) is the router's D. The qualities
    are `QualityScorer`'s.
    """

    shift: Tensor
    spread: Tensor
    contrast: Tensor
    others: Tensor

    def __init__(self, source: CriticSource) -> None:
        super().__init__()
        clip = source.clip
        self.clip, self.scale = clip.network, clip.scale
        self.head: CriticHead = critics.load(source.router.folder)
        self.sharpness = float(source.facts["sharpness"])
        shown = self.clip.visual.preprocess_cfg
        poles = clip.texts([t for m in _looks(source.router) for t in (m.positive, m.negative)])
        others = source.facts["others"]
        self.aligned = others is not None
        for name, value in {
            "shift": torch.tensor(shown["mean"]) * 255.0,
            "spread": torch.tensor(shown["std"]) * 255.0,
            "contrast": poles[0::2] - poles[1::2],
            "others": clip.texts(others) if others else torch.zeros(0, poles.shape[1]),
        }.items():
            self.register_buffer(name, value)

    def forward(
        self, picture: Tensor, text: Tensor, hidden: Tensor, mask: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        quality = self.quality(picture, text)
        return quality, self.head(before, hidden, mask, quality)

    def quality(self, picture: Tensor, text: Tensor) -> Tensor:
        """Return q (1, k) of RouteT2I, section 4, and the alignment where it is measured."""
        pixels = ((picture.float() - self.shift) / self.spread).permute(0, 3, 1, 2)
        seen = F.normalize(self.clip.encode_image(pixels), dim=-1)
        q = (self.scale * seen @ self.contrast.T).sigmoid()
        return torch.cat([q, self._alignment(seen, text)], 1) if self.aligned else q

    def _alignment(self, seen: Tensor, text: Tensor) -> Tensor:
        projection = getattr(self.clip, "text", self.clip).text_projection
        own = projection(text) if isinstance(projection, nn.Module) else text @ projection
        own = (seen * F.normalize(own, dim=-1)).sum(1, keepdim=True)
        if not len(self.others):
            return own.clamp(min=0)
        margins = self.sharpness * self.scale * (own - seen @ self.others.T)
        return margins.sigmoid().mean(1, keepdim=True)


def _looks(router: RouterFolder) -> list[Metric]:
    """Return the metrics of how a picture looks, without the alignment, which is the last."""
    metrics = [
        Metric(m["name"], m["positive"], m["negative"], m["weight"]) for m in router.spec["metrics"]
    ]
    return metrics if router.spec["critic"]["others"] is None else metrics[:-1]


def _network(looking: Looking, source: CriticSource, longest: int) -> Network:
    rng = torch.Generator().manual_seed(0)
    side, width, metrics = source.side, source.router.width, len(source.router.spec["metrics"])

    def pictures(length: int) -> tuple[Tensor, ...]:
        return (
            torch.randint(256, (1, side, side, 3), dtype=torch.uint8, generator=rng),
            torch.randn(1, source.text.tower.width, generator=rng),
            torch.randn(1, length, width, generator=rng),
            torch.ones(1, length),
            torch.rand(1, metrics, generator=rng),
        )

    words = {1: torch.export.Dim("length", min=2, max=longest)}
    inputs, outputs = ("picture", "text", "hidden", "mask", "before"), ("quality", "d")

    def trace(file: Path) -> None:
        trace_symbolically(looking, pictures(7), file, inputs, outputs, ({}, {}, words, words, {}))

    return Network(looking.eval(), inputs, outputs, trace, [pictures(2), pictures(longest)])
