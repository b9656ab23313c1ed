"""The routing network: from the text encoder's hidden states to D, one distance a quality metric.

`Predictor` is RouteT2I's dual-gate token-selection mixture of experts (section 5.1).
`LinearPredictor` is what a few hundred prompts can support, `MixedPredictor` lets both speak. All
map the frozen encoder's states (B, n, d) and a mask (B, n), 1 on the prompt's tokens and their end,
to D (B, k) in (0, 1), the normalised quality distances between the edge's picture and the cloud's;
the device cannot tell them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MEMBERS = 3  # gated networks in a mixed one


@dataclass(frozen=True, slots=True)
class PredictorConfig:
    """Sizes: d `width`, k `experts` (one a metric), h `hidden`, l `low_rank`, K `top_k` tokens.

    `kind` is gated, linear or mixed; a linear one has no other sizes than d and k. The last three
    take one idea of the paper away each, for its ablations.
    """

    width: int = 192
    experts: int = 10
    hidden: int = 192
    low_rank: int = 32
    top_k: int = 4
    dropout: float = 0.1
    kind: str = "gated"
    single_gate: bool = False  # no G-: nothing can count against a token
    all_tokens: bool = False  # no token selection: every token reaches every expert
    single_metric: bool = False  # one expert and head on PRS, its answer repeated k times

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return the sizes as a JSON object."""
        return json.dumps(asdict(self), indent=1) + "\n"


class Gate(nn.Module):
    """Each expert picks the K tokens it has most affinity with; the affinity is their weight."""

    def __init__(self, config: PredictorConfig, experts: int) -> None:
        super().__init__()
        self.top_k = None if config.all_tokens else config.top_k
        self.embeddings = nn.Parameter(torch.randn(experts, config.width) * 0.05)  # E

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = tokens @ self.embeddings.T
        # An expert without rivals would want every token alike, so it gets a neutral one.
        affinity = logits.softmax(-1) if logits.shape[-1] > 1 else logits.sigmoid()
        affinity = affinity * mask[..., None]  # A  (B, n, k)
        if self.top_k is None:
            return affinity
        enough = F.pad(affinity, (0, 0, 0, self.top_k))  # a prompt may have fewer tokens than K
        best = enough.topk(self.top_k, dim=1).values  # (B, K, k)
        return affinity * (affinity >= best[:, -1:])


class Predictor(nn.Module):
    """Token selection, positive and negative gate, factorised experts, contrast, one head each."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        k = 1 if config.single_metric else config.experts
        d, h, rank = config.width, config.hidden, config.low_rank
        self.config = config
        self.norm, self.dropout = nn.LayerNorm(d), nn.Dropout(config.dropout)
        self.gate_plus = Gate(config, k)
        self.project_plus = nn.Parameter(torch.randn(k, d, rank) * d**-0.5)  # P+
        if not config.single_gate:
            self.gate_minus = Gate(config, k)
            self.project_minus = nn.Parameter(torch.randn(k, d, rank) * d**-0.5)  # P-
        self.scoring = nn.Parameter(torch.randn(k, rank, h) * rank**-0.5)  # S, shared by both
        self.heads = nn.Parameter(torch.randn(k, h) * h**-0.5)
        self.bias = nn.Parameter(torch.zeros(k))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        tokens = self.dropout(self.norm(hidden))  # T  (B, n, d)
        picked = self.gate_plus(tokens, mask)  # G+  (B, n, k)
        contrast = self._experts(tokens, picked, self.project_plus)  # T+  (B, n, h)
        if not self.config.single_gate:
            minus = self.gate_minus(tokens, mask)  # G-
            contrast = contrast - self._experts(tokens, minus, self.project_minus)  # T+ - T-
            picked = picked + minus
        contrast = contrast.sigmoid() - 0.5  # neutral tokens at 0 rather than at 1/2
        share = picked / picked.sum(1, keepdim=True).clamp_min(1e-6)
        pooled = torch.einsum("bnk,bnh->bkh", share, contrast)
        d = ((self.dropout(pooled) * self.heads).sum(-1) + self.bias).sigmoid()
        return d.expand(-1, self.config.experts)

    def _experts(self, tokens: Tensor, gate: Tensor, project: Tensor) -> Tensor:
        """Sum over the experts that picked a token: gate * T P_i S_i."""
        low = torch.einsum("bnd,kdl->bnkl", tokens, project) * gate[..., None]
        return torch.einsum("bnkl,klh->bnh", low, self.scoring)


class LinearPredictor(nn.Module):
    """A weighted sum of the tokens' mean state, of the last one's, and of how many they are."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.experts, 2 * config.width + 1))
        self.bias = nn.Parameter(torch.zeros(config.experts))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return F.linear(pooled(hidden, mask), self.weight, self.bias).sigmoid()


class MixedPredictor(nn.Module):
    """The mean of the linear one's D and of what gated ones of several seeds say in the mean.

    Gated networks of different seeds err differently, and all of them otherwise than the linear
    one, so that their mean is nearer than any (Lakshminarayanan et al. 2017).
    """

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        gated = replace(config, kind="gated")
        self.gated = nn.ModuleList(Predictor(gated) for _ in range(MEMBERS))
        self.linear = LinearPredictor(replace(config, kind="linear"))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        said = torch.stack([member(hidden, mask) for member in self.gated]).mean(0)
        return 0.5 * (said + self.linear(hidden, mask))


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return (B, 2d + 1): the tokens' mean state, the last one's, and the log of their number."""
    count = mask.sum(1, keepdim=True).clamp_min(1.0)
    last = mask * (mask.cumsum(1) == count)
    mean, end = (mask[:, None] @ hidden)[:, 0] / count, (last[:, None] @ hidden)[:, 0]
    return torch.cat([mean, end, count.log()], 1)


AnyPredictor = Predictor | LinearPredictor | MixedPredictor
KINDS: dict[str, Callable[[PredictorConfig], AnyPredictor]] = {
    "gated": Predictor,
    "linear": LinearPredictor,
    "mixed": MixedPredictor,
}


def build(config: PredictorConfig) -> AnyPredictor:
    """Return a fresh network of the configured kind."""
    return KINDS[config.kind](config)


def save(model: AnyPredictor, folder: Path) -> None:
    """Write predictor.safetensors and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous().cpu() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "predictor.safetensors")
    (folder / "config.json").write_text(model.config.to_json(), encoding="utf-8")


def load(folder: Path) -> AnyPredictor:
    """Read what `save` wrote, ready to predict."""
    model = build(PredictorConfig.from_json((folder / "config.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(folder / "predictor.safetensors"))
    return model.eval()
