"""How near CLIP finds a picture to the good and the bad pole of every metric.

RouteT2I section 4: q(I, m) = sigmoid(CLIP(I, m+) - CLIP(I, m-)) on CLIP's own logit scale, which is
the two-way softmax of CLIP-IQA (Wang et al. 2023). These judge how a picture looks; `ALIGNMENT`,
which the paper does not have, judges whether it shows what was asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloud_server.training.quality.alignment import ALIGNMENT, SHARPNESS, Alignment
from cloud_server.training.quality.clip import Clip
from cloud_server.training.quality.metrics import Metric, load_metrics

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class QualityScorer:
    """Scores pictures on every metric with one CLIP model, which is loaded by the first picture.

    The weights of `metrics` are scaled to sum to 1; with `alignment` that metric comes last, and
    takes its share of all.
    """

    def __init__(
        self,
        clip: Clip,
        metrics: Sequence[Metric] | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        looks = load_metrics() if metrics is None else tuple(metrics)
        self.clip, self.alignment = clip, alignment
        share = (1 - (alignment.weight if alignment else 0)) / sum(m.weight for m in looks)
        self._looks = tuple(replace(m, weight=share * m.weight) for m in looks)
        self.metrics = self._looks
        if alignment:
            self.metrics += (Metric(ALIGNMENT, "{prompt}", "other prompts", alignment.weight),)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.clip, self._looks, self.alignment)

    @property
    def origin(self) -> Mapping[str, Any]:
        """What scores, fit for JSON."""
        facts: dict[str, Any] = {"clip": self.clip.name, "digest": self.clip.digest}
        if self.alignment:
            facts["alignment"] = {
                "distractors": self.alignment.count,
                "sharpness": SHARPNESS,
                "seed": self.alignment.seed,
            }
        return facts

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the CLIP model and the texts; weights do not change a score."""
        texts = [(m.name, m.positive, m.negative) for m in self._looks]
        aligned = (self.origin.get("alignment"), self.alignment and self.alignment.prompts)
        facts = json.dumps([self.clip.digest, texts, aligned])
        return hashlib.sha256(facts.encode()).hexdigest()

    @cached_property
    def _contrast(self) -> Tensor:
        """What distinguishes the poles of every metric, (k, d)."""
        features = self.clip.texts([t for m in self._looks for t in (m.positive, m.negative)])
        return features[0::2] - features[1::2]

    @cached_property
    def _pool(self) -> Tensor:
        """The prompts that distract, (N, d)."""
        assert self.alignment is not None
        return self.clip.texts(self.alignment.prompts)

    def score(
        self, pictures: Sequence[Image], prompts: Sequence[str] = (), batch: int = 64
    ) -> NDArray[np.float32]:
        """Return the qualities (B, k), each in 0..1; alignment needs the pictures' `prompts`."""
        import torch

        scores = []
        with torch.inference_mode():
            for i in range(0, len(pictures), batch):
                seen = self.clip.pictures(pictures[i : i + batch])
                q = (self.clip.scale * seen @ self._contrast.T).sigmoid()
                if self.alignment:
                    q = torch.cat([q, self._aligned(seen, prompts[i : i + batch])], 1)
                scores.append(q.float().cpu().numpy())
        return np.concatenate(scores)

    def _aligned(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the alignment (B, 1) of pictures (B, d) with their prompts.

        The probability that a picture is of its own prompt and not of a distractor; without these,
        the cosine where that is above 0 (CLIPScore, Hessel et al. 2021, without its factor).
        """
        import torch

        assert self.alignment is not None
        own = (seen * self.clip.texts(prompts)).sum(1, keepdim=True)
        if not self.alignment.count:
            return own.clamp(min=0)
        rows = []
        for picture, right, prompt in zip(seen, own, prompts, strict=True):
            others = self._pool[self.alignment.distractors(prompt)] @ picture
            logits = SHARPNESS * self.clip.scale * torch.cat([right, others])
            rows.append(logits.softmax(0)[:1])
        return torch.stack(rows)
