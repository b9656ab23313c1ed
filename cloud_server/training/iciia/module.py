"""Intra-client and inter-image attention (Tan, Yan, Niu, ACML 2024, sections 3.2 to 3.5).

One sequence is one client: a token is a picture's feature vector from a frozen backbone. Letters:
B pictures, D `width`, N `layers`, H `heads`, P `groups`, m = D / P, C `classes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloud_server.errors import ConfigError

TINY_GROUPS = 256  # P of ICIIA-T; P = 1 is ICIIA-B
# Where a layer begins as a backbone, what it adds to its input is this small: the other pictures'
# mean as a share of the picture, and the rest as a share of its usual size.
_MEAN_AT_FIRST, _AT_FIRST = 0.3, 0.1
Mixing = Literal["attention", "convolution", "none"]


@dataclass(frozen=True, slots=True)
class IciiaConfig:
    """Sizes; `mixing` and `shuffle` are there for the ablations of table 5."""

    width: int
    classes: int
    layers: int = 2
    heads: int = 4
    groups: int = 1
    dropout: float = 0.1
    mixing: Mixing = "attention"
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name in ("heads", "groups"):
            if self.width % getattr(self, name):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, which does not divide the width "
                    f"{self.width}; choose a divisor"
                )

    @property
    def projection_parameters(self) -> int:
        """Weights and biases of the six projections of all layers: table 1's count."""
        return self.layers * (6 * self.width**2 // self.groups + 6 * self.width)

    def multiply_adds(self, pictures: int) -> int:
        """Return the cost of one sequence: section 3.5, without norms and head."""
        projections = 6 * pictures * self.width**2 // self.groups
        return self.layers * (projections + 2 * pictures**2 * self.width)

    def multiply_adds_of_one(self, pictures: int) -> int:
        """Return the cost when only one picture is asked for: the last layer answers for it alone.

        Every picture is still a key and a value there; the other four projections are the one's.
        """
        before = (self.layers - 1) * self.multiply_adds(pictures) // self.layers
        projections = (2 * pictures + 4) * self.width**2 // self.groups
        return before + projections + 2 * pictures * self.width


def tiny_groups(width: int) -> int:
    """Return P of ICIIA-T: 256, or the largest divisor of `width` below it that still mixes.

    P = D would leave groups of one value, and no shuffle could mix those (section 4.2).
    """
    return max(p for p in range(1, TINY_GROUPS + 1) if width % p == 0 and (p < width or p == 1))


class GroupedLinear(nn.Module):
    """P projections of D/P values each, then the shuffle (section 3.4): (..., B, D) to it.

    out[o * P + p] = sum_i weight[p, o, i] * x[p * m + i] + bias[o * P + p].
    """

    def __init__(self, width: int, groups: int, *, shuffle: bool = True) -> None:
        super().__init__()
        m = width // groups
        self.weight = nn.Parameter(torch.empty(groups, m, m).uniform_(-(m**-0.5), m**-0.5))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-(m**-0.5), m**-0.5))
        self.shuffle = shuffle

    def as_in_attention(self) -> GroupedLinear:
        """Start as attention's projections do: Xavier's uniform weights by group, no bias."""
        bound = (3 / self.weight.shape[-1]) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)
        return self

    @property
    def can_undo(self) -> bool:
        """Whether two of these projections, one after the other, can leave a vector as it is."""
        groups, m, _ = self.weight.shape
        return not self.shuffle or groups == 1 or m % groups == 0

    @torch.no_grad()
    def undo(self, times: float = 1.0) -> None:
        """Become half of the identity, `times` as large: two such halves undo their shuffles.

        Value i = k * P + t of a group goes to place t * m / P + k in it; then two shuffles have
        brought it back. Only where `can_undo`.
        """
        groups, m, _ = self.weight.shape
        half = torch.eye(m)
        if self.shuffle and groups > 1:
            half = half.unflatten(0, (m // groups, groups)).transpose(0, 1).flatten(0, 1)
        self.weight.copy_(times * half)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        groups, m, _ = self.weight.shape
        if groups == 1:
            return F.linear(x, self.weight[0], self.bias)
        x = x.unflatten(-1, (groups, m)).transpose(-3, -2)  # (..., P, B, m)
        y = x @ self.weight.transpose(-2, -1)  # the quickest form in onnxruntime
        y = y.movedim(-3, -1) if self.shuffle else y.transpose(-3, -2)  # (..., B, m and P)
        return y.flatten(-2) + self.bias


class Attention(nn.Module):
    """Every picture of a client looks at all of them: (..., B, D) to (..., n, D).

    `rows` (n,) are the pictures that are asked for; all when None.
    """

    def __init__(self, config: IciiaConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.q, self.k, self.v, self.out = (
            GroupedLinear(config.width, config.groups, shuffle=config.shuffle).as_in_attention()
            for _ in range(4)
        )

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        q = self.q(x if rows is None else x.index_select(-2, rows))  # (..., n, D)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for y in (q, self.k(x), self.v(x))
        )  # (..., H, n or B, D / H)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(mixed.transpose(-3, -2).flatten(-2))


class Convolution(nn.Module):
    """Ablation: a convolution over three neighbouring pictures in place of the attention."""

    def __init__(self, config: IciiaConfig) -> None:
        super().__init__()
        self.v, self.out = (
            GroupedLinear(config.width, config.groups, shuffle=config.shuffle) for _ in range(2)
        )
        self.over_pictures = nn.Conv1d(
            config.width, config.width, 3, padding=1, groups=config.width
        )

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        mixed = self.out(self.over_pictures(self.v(x).transpose(-2, -1)).transpose(-2, -1))
        return mixed if rows is None else mixed.index_select(-2, rows)


class NoMixing(nn.Module):
    """Ablation: two projections with a ReLU between, each picture by itself."""

    def __init__(self, config: IciiaConfig) -> None:
        super().__init__()
        self.into, self.out = (
            GroupedLinear(config.width, config.groups, shuffle=config.shuffle) for _ in range(2)
        )

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        x = x if rows is None else x.index_select(-2, rows)
        return self.out(self.into(x).relu())


Mixer = Attention | Convolution | NoMixing
_MIXERS: dict[Mixing, type[Mixer]] = {
    "attention": Attention,
    "convolution": Convolution,
    "none": NoMixing,
}


class Layer(nn.Module):
    """A post-norm transformer encoder layer whose MLP is as wide as its tokens (section 3.2)."""

    def __init__(self, config: IciiaConfig) -> None:
        super().__init__()
        self.mix: Mixer = _MIXERS[config.mixing](config)
        self.mlp1, self.mlp2 = (
            GroupedLinear(config.width, config.groups, shuffle=config.shuffle) for _ in range(2)
        )
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        target = x if rows is None else x.index_select(-2, rows)
        x = self.norm1(target + self.dropout(self.mix(x, rows)))
        mlp = self.mlp2(self.dropout(self.mlp1(x).relu()))
        return self.norm2(x + self.dropout(mlp))


class Iciia(nn.Module):
    """Features (..., B, D) of one client's pictures to logits (..., B, C).

    With `rows` (n,) the logits are those of these pictures alone, (..., n, C), and cost less.
    """

    def __init__(self, config: IciiaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.classes)

    @property
    def stack(self) -> list[Layer]:
        """The layers, first to last, as what they are."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @torch.no_grad()
    def begin_as(self, classifier: nn.Linear, features: Tensor) -> None:
        """Start close to what the backbone says: with its own head, and layers that add little.

        Where the sizes allow it, attention adds a share of the client's pictures as they are: what
        the client sees often becomes likelier from the first step on. The last norm gives vectors
        back the mean and the spread of the `features` (n, D).
        """
        self.head.load_state_dict(classifier.state_dict())
        last = self.stack[-1].norm2
        last.weight.fill_(features.std(-1, unbiased=False).mean())
        last.bias.fill_(features.mean())
        for layer in self.stack:
            for projection in (layer.mix.out, layer.mlp2):
                projection.weight.mul_(_AT_FIRST)
                projection.bias.zero_()
            if isinstance(layer.mix, Attention) and layer.mix.v.can_undo:
                layer.mix.v.undo()
                layer.mix.out.undo(_MEAN_AT_FIRST)

    def forward(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        *before, last = self.layers
        x = features
        for layer in before:
            x = layer(x)
        return self.head(last(x, rows).relu())
