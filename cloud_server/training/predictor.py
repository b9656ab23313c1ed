"""The routing network: a dual-gate token-selection mixture of experts (RouteT2I, section 5.1).

It reads the frozen text encoder's hidden states and predicts, for each quality metric, the
normalised quality distance D_i in (0, 1) between the edge's picture and the cloud's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class PredictorConfig:
    """Sizes: d `width`, k `experts` (one a metric), h `hidden`, l `low_rank`, K `top_k` tokens."""

    width: int = 192
    experts: int = 10
    hidden: int = 192
    low_rank: int = 32
    top_k: int = 4
    dropout: float = 0.1

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return the sizes as a JSON object."""
        return json.dumps(asdict(self), indent=1) + "\n"


class Gate(nn.Module):
    """Each expert picks the K tokens it has most affinity with; the affinity is their weight."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.embeddings = nn.Parameter(torch.randn(config.experts, config.width) * 0.05)  # E

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        affinity = (tokens @ self.embeddings.T).softmax(-1) * mask[..., None]  # A  (B, n, k)
        best = affinity.topk(min(self.top_k, tokens.shape[1]), dim=1).values  # (B, K, k)
        return affinity * (affinity >= best[:, -1:])


class Predictor(nn.Module):
    """Hidden states (B, n, d) and a mask (B, n), 1 on prompt tokens, to D (B, k) in (0, 1)."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        d, k, h, rank = config.width, config.experts, config.hidden, config.low_rank
        self.config = config
        self.norm, self.dropout = nn.LayerNorm(d), nn.Dropout(config.dropout)
        self.gate_plus, self.gate_minus = Gate(config), Gate(config)
        self.project_plus = nn.Parameter(torch.randn(k, d, rank) * d**-0.5)  # P+
        self.project_minus = nn.Parameter(torch.randn(k, d, rank) * d**-0.5)  # P-
        self.scoring = nn.Parameter(torch.randn(k, rank, h) * rank**-0.5)  # S, shared by both
        self.heads = nn.Parameter(torch.randn(k, h) * h**-0.5)
        self.bias = nn.Parameter(torch.zeros(k))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        tokens = self.dropout(self.norm(hidden))  # T  (B, n, d)
        plus, minus = self.gate_plus(tokens, mask), self.gate_minus(tokens, mask)  # (B, n, k)
        good = self._experts(tokens, plus, self.project_plus)  # T+  (B, n, h)
        bad = self._experts(tokens, minus, self.project_minus)  # T-
        contrast = (good - bad).sigmoid() - 0.5  # neutral tokens at 0 rather than at 1/2
        picked = plus + minus
        share = picked / picked.sum(1, keepdim=True).clamp_min(1e-6)
        pooled = torch.einsum("bnk,bnh->bkh", share, contrast)
        return ((self.dropout(pooled) * self.heads).sum(-1) + self.bias).sigmoid()

    def _experts(self, tokens: Tensor, gate: Tensor, project: Tensor) -> Tensor:
        """Sum over the experts that picked a token: gate * T P_i S_i."""
        low = torch.einsum("bnd,kdl->bnkl", tokens, project) * gate[..., None]
        return torch.einsum("bnkl,klh->bnh", low, self.scoring)

    def save(self, folder: Path) -> None:
        """Write predictor.safetensors and config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.contiguous().cpu() for name, weight in self.state_dict().items()}
        save_file(weights, folder / "predictor.safetensors")
        (folder / "config.json").write_text(self.config.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, ready to predict."""
        config = PredictorConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
        model = cls(config)
        model.load_state_dict(load_file(folder / "predictor.safetensors"))
        return model.eval()
