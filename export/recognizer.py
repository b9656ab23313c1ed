"""The recogniser's three networks and what the bundle says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloud_server.errors import ModelError
from cloud_server.training.iciia.module import Iciia
from cloud_server.training.iciia.recognizer import BACKBONE, CONFIG, WEIGHTS, Recognizer
from edge_agent.config import LONGEST_HISTORY
from export import attention
from export.errors import ExportError
from export.files import digest_of
from export.network import Network, trace_symbolically

NAMES = {
    "backbone": "recognizer_backbone",
    "head": "recognizer_head",
    "adapted": "recognizer_adapted",
}
TOGETHER = 64  # pictures that are run at once, at most


@dataclass(frozen=True, slots=True)
class RecognizerSource:
    """A recogniser's folder, opened; `parts` gives name, source files and network of each part."""

    folder: Path
    model: Recognizer

    @property
    def parts(self) -> Sequence[tuple[str, Sequence[Path], Callable[[], Network]]]:
        """Return the three components in the order in which they run."""
        backbone, own = self.folder / BACKBONE, (self.folder / CONFIG, self.folder / WEIGHTS)
        return (
            (NAMES["backbone"], (backbone,), lambda: _backbone(self.model)),
            (NAMES["head"], (backbone,), lambda: _head(self.model)),
            (NAMES["adapted"], own, lambda: _adapted(self.model.iciia)),
        )

    def manifest(self) -> Mapping[str, Any]:
        """Return the bundle's entry `recognizer`."""
        backbone = self.model.backbone
        return {
            "classes": list(self.model.classes),
            "side": backbone.side,
            "crop": backbone.crop,
            "width": backbone.width,
            "digest": digest_of(self.folder / BACKBONE),
            "history": self.model.history,
            "least_history": self.model.least_history,
            **NAMES,
        }


def open_recognizer(folder: Path) -> RecognizerSource:
    """Open what `cloud-server train-recognizer` wrote; raises ExportError."""
    try:
        return RecognizerSource(folder, Recognizer.load(folder))
    except ModelError as err:
        raise ExportError(str(err)) from err


def _backbone(model: Recognizer) -> Network:
    """Pictures (B, side, side, 3) of bytes to features (B, D)."""
    side = model.backbone.side
    rng = torch.Generator().manual_seed(0)

    def pictures(batch: int) -> tuple[Tensor]:
        shape = (batch, side, side, 3)
        return (torch.randint(256, shape, dtype=torch.uint8, generator=rng),)

    dims = ({0: torch.export.Dim("batch", max=TOGETHER)},)
    return _network(
        model.backbone, ("pictures",), ("features",), pictures(2), dims, [pictures(1), pictures(5)]
    )


def _head(model: Recognizer) -> Network:
    """Features (B, D) to the logits (B, C) of the backbone alone."""
    rng, width = torch.Generator().manual_seed(0), model.backbone.width
    dims = ({0: torch.export.Dim("batch", max=TOGETHER)},)
    few, many = (torch.randn(n, width, generator=rng) for n in (2, 7))
    head = model.backbone.classifier
    return _network(head, ("features",), ("logits",), (few,), dims, [(few[:1],), (many,)])


class Adapted(nn.Module):
    """Earlier features (k, D) of a client and new ones (n, D) to the logits (n, C) of the new."""

    def __init__(self, iciia: Iciia) -> None:
        super().__init__()
        self.iciia = iciia

    def forward(self, before: Tensor, features: Tensor) -> Tensor:
        rows = torch.arange(features.shape[0]) + before.shape[0]
        # As a batch of one client: attention becomes ONNX with a batch only.
        return self.iciia(torch.cat([before, features])[None], rows)[0]


def _adapted(iciia: Iciia) -> Network:
    """`Adapted`, written node by node where the form allows it and else traced."""
    rng, width = torch.Generator().manual_seed(0), iciia.config.width

    def pictures(before: int, new: int) -> tuple[Tensor, Tensor]:
        earlier, now = (torch.randn(n, width, generator=rng).relu() for n in (before, new))
        return earlier, now

    samples = [pictures(15, 1), pictures(1, 1), pictures(0, 16), pictures(15, 16), pictures(60, 1)]
    inputs, outputs = ("before", "features"), ("logits",)
    if attention.fits(iciia):
        module = Adapted(iciia).eval()
        return Network(module, inputs, outputs, lambda file: attention.write(iciia, file), samples)
    dims = (
        {0: torch.export.Dim("before", max=LONGEST_HISTORY)},
        {0: torch.export.Dim("batch", max=TOGETHER)},
    )
    return _network(Adapted(iciia), inputs, outputs, pictures(6, 3), dims, samples)


def _network(
    module: nn.Module,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    example: tuple[Tensor, ...],
    dims: tuple[dict, ...],
    samples: Sequence[tuple[Tensor, ...]],
) -> Network:
    def write(file: Path) -> None:
        trace_symbolically(module, example, file, inputs, outputs, dims)

    return Network(module.eval(), inputs, outputs, write, samples)
