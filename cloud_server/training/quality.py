"""The ten quality metrics: how near CLIP finds a picture to the good and bad pole of a text pair.

RouteT2I section 4: q(I, m) = sigmoid(CLIP(I, m+) - CLIP(I, m-)) on CLIP's own logit scale, which is
the two-way softmax of CLIP-IQA. These judge how a picture looks; `ALIGNMENT`, which the paper does
not have, judges whether it shows what was asked for.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


ALIGNMENT = "Alignment"


@dataclass(frozen=True, slots=True)
class Metric:
    """One quality metric: a text pair and its weight in the PRS."""

    name: str
    positive: str
    negative: str
    weight: float


def load_metrics(path: Path | None = None) -> tuple[Metric, ...]:
    """Read the metrics from a TOML file, by default the ten of the paper."""
    file = path or Path(__file__).with_name("metrics.toml")
    with file.open("rb") as stream:
        return tuple(Metric(**entry) for entry in tomllib.load(stream)["metric"])


class QualityScorer:
    """Scores pictures on every metric with one open_clip model.

    With an `alignment` above 0 that metric comes last, and has this share of all weight.
    """

    def __init__(
        self,
        clip: Any,
        preprocess: Any,
        tokenizer: Any,
        metrics: Sequence[Metric],
        device: str,
        alignment: float = 0.0,
    ) -> None:
        import torch

        self.metrics = tuple(metrics)
        self._clip, self._preprocess, self._device = clip.to(device).eval(), preprocess, device
        self._tokenizer, self._aligned = tokenizer, alignment > 0
        texts = [t for metric in self.metrics for t in (metric.positive, metric.negative)]
        if self._aligned:
            looks = (replace(m, weight=(1 - alignment) * m.weight) for m in metrics)
            self.metrics = (*looks, Metric(ALIGNMENT, "{prompt}", "", alignment))
        with torch.inference_mode():
            features = clip.encode_text(tokenizer(texts).to(device), normalize=True)
        self._contrast = features[0::2] - features[1::2]  # (k, d)

    @classmethod
    def open(
        cls,
        model: str | Path,
        pretrained: str | None = None,
        *,
        metrics: Sequence[Metric] | None = None,
        device: str = "cpu",
        alignment: float = 0.0,
    ) -> QualityScorer:
        """Open a folder in open_clip's format, or an open_clip model name and pretrained tag."""
        from cloud_server.torchvision_guard import guard

        guard()
        import open_clip

        name = f"local-dir:{Path(model).resolve()}" if Path(model).is_dir() else str(model)
        clip, preprocess = open_clip.create_model_from_pretrained(name, pretrained)
        tokenizer = open_clip.get_tokenizer(name)
        return cls(clip, preprocess, tokenizer, metrics or load_metrics(), device, alignment)

    def score(
        self, pictures: Sequence[Image], prompts: Sequence[str] = (), batch: int = 64
    ) -> np.ndarray:
        """Return the qualities (B, k), each in 0..1.

        Alignment, which needs the `prompts` of the pictures, is the cosine of the two where that is
        above 0 (CLIPScore, Hessel et al. 2021, without its factor).
        """
        import torch

        scores = []
        with torch.inference_mode():
            for i in range(0, len(pictures), batch):
                inputs = torch.stack([self._preprocess(p) for p in pictures[i : i + batch]])
                features = self._clip.encode_image(inputs.to(self._device), normalize=True)
                logits = self._clip.logit_scale.exp() * features @ self._contrast.T
                q = logits.sigmoid()
                if self._aligned:
                    tokens = self._tokenizer(list(prompts[i : i + batch])).to(self._device)
                    asked = self._clip.encode_text(tokens, normalize=True)
                    q = torch.cat([q, (features * asked).sum(1, keepdim=True).clamp(min=0)], 1)
                scores.append(q.cpu().numpy())
        return np.concatenate(scores)
