"""The routing network: from the text encoder's hidden states to D, one distance a quality metric.

`Predictor` is RouteT2I's dual-gate token-selection mixture of experts (section 5.1).
`LinearPredictor` is what a few hundred prompts can support, `MixedPredictor` lets both speak. All
map the frozen encoder's states (B, n, d) and a mask (B, n), 1 on the prompt's tokens and their end,
to D (B, k) in (0, 1), the normalised quality distances between the edge's picture and the cloud's;
the device cannot tell them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cloud_server.training.weights import save_weights

WEIGHTS, CONFIG = "predictor.safetensors", "config.json"


@dataclass(frozen=True, slots=True)
class PredictorConfig:
    """Sizes: d `width`, k `experts` (one a metric), h `hidden`, l `low_rank`, K `top_k` tokens.

    `kind` is gated, linear or mixed; a linear one has no other sizes than d and k, a mixed one
    usually several gated `members`, m. The last three take one idea of the paper away each, for
    its ablations.
    """

    width: int = 192
    experts: int = 10
    hidden: int = 192
    low_rank: int = 32
    top_k: int = 8
    dropout: float = 0.1
    kind: str = "gated"
    members: int = 1
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


class Predictor(nn.Module):
    """Token selection, positive and negative gate, factorised experts, contrast, one head each.

    Of several `members`, each as if it were alone, the mean is taken: networks of different seeds
    err differently (Lakshminarayanan et al. 2017). All of them are computed in the same products.
    """

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        m, k = config.members, 1 if config.single_metric else config.experts
        d, h, rank = config.width, config.hidden, config.low_rank
        signs = 1 if config.single_gate else 2  # G+, G-
        self.config, self.dropout = config, nn.Dropout(config.dropout)
        self.gates = nn.Parameter(torch.randn(d, m, signs, k) * 0.05)  # E
        self.project = nn.Parameter(torch.randn(d, m, signs, k, rank) * d**-0.5)  # P+, P-
        self.scoring = nn.Parameter(torch.randn(m, k, rank, h) * rank**-0.5)  # S, shared by both
        self.heads = nn.Parameter(torch.randn(m, k, h) * h**-0.5)
        self.bias = nn.Parameter(torch.zeros(m, k))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        # No gain and shift of the norm's own: gates and projections absorb the first.
        tokens = self.dropout(F.layer_norm(hidden, hidden.shape[-1:]))  # T  (B, n, d)
        picked = self.gate(tokens, mask)  # G  (B, n, m, s, k)
        low = _times(tokens, self.project) * picked[..., None]  # (B, n, m, s, k, l)
        # S is shared, so the contrast of tokens, T+ - T-, is that of what stands before S.
        low = low[..., 0, :, :] - low[..., 1, :, :] if low.shape[3] == 2 else low[..., 0, :, :]
        contrast = low.flatten(3).transpose(1, 2) @ self.scoring.flatten(1, 2)  # (B, m, n, h)
        contrast = contrast.sigmoid() - 0.5  # neutral tokens at 0 rather than at 1/2
        picked = picked.sum(3)
        share = picked / picked.sum(1, keepdim=True).clamp_min(1e-6)  # (B, n, m, k)
        pooled = self.dropout(share.permute(0, 2, 3, 1) @ contrast)  # (B, m, k, h)
        d = ((pooled * self.heads).sum(-1) + self.bias).sigmoid()  # (B, m, k)
        return d.mean(1).expand(-1, self.config.experts)

    def gate(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return G (B, n, m, s, k): an expert's affinity to its K best tokens, else 0."""
        logits = _times(tokens, self.gates)
        # An expert without rivals would want every token alike, so it gets a neutral one.
        affinity = logits.softmax(-1) if logits.shape[-1] > 1 else logits.sigmoid()
        affinity = affinity * mask[..., None, None, None]  # A
        if self.config.all_tokens:
            return affinity
        k = self.config.top_k
        enough = F.pad(affinity.flatten(2), (0, 0, 0, k))  # a prompt may have fewer tokens than K
        least = enough.topk(k, dim=1).values[:, -1:].unflatten(2, affinity.shape[2:])
        return affinity * (affinity >= least)

    @classmethod
    def joined(cls, predictors: Sequence[Self]) -> Self:
        """Return predictors of the same sizes as the members of one."""
        config = predictors[0].config
        joined = cls(replace(config, members=sum(each.config.members for each in predictors)))
        states = [each.state_dict() for each in predictors]
        axis = {"gates": 1, "project": 1}
        joined.load_state_dict(
            {name: torch.cat([s[name] for s in states], axis.get(name, 0)) for name in states[0]}
        )
        return joined.eval()


def _times(tokens: Tensor, weights: Tensor) -> Tensor:
    """Return tokens (B, n, d) times weights (d, ...), as (B, n, ...), in one product."""
    return (tokens @ weights.flatten(1)).unflatten(-1, weights.shape[1:])


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
    """The mean of D by gated networks and a linear one, which errs otherwise; all count alike."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.gated = Predictor(replace(config, kind="gated"))
        self.linear = LinearPredictor(replace(config, kind="linear"))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        members = self.config.members
        return (members * self.gated(hidden, mask) + self.linear(hidden, mask)) / (members + 1)


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
    """Write predictor.safetensors, in half precision, and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.half().contiguous().cpu() for name, weight in model.state_dict().items()
    }
    save_weights(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(model.config.to_json(), encoding="utf-8")


def load(folder: Path) -> AnyPredictor:
    """Read what `save` wrote, ready to predict."""
    model = build(PredictorConfig.from_json((folder / CONFIG).read_text(encoding="utf-8")))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()
