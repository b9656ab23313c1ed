"""A trained recogniser as a folder: backbone, module, gate, and the names of its classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cloud_server.errors import ModelError
from cloud_server.training.iciia.backbone import Backbone, open_backbone
from cloud_server.training.iciia.gate import Gate
from cloud_server.training.iciia.learn import SEQUENCE
from cloud_server.training.iciia.module import Iciia, IciiaConfig

CONFIG = "recognizer.json"
WEIGHTS = "iciia.safetensors"
BACKBONE = "backbone"


class Adapted(nn.Module):
    """Features (B, D) of a client and rows (n,) to logits (n, C) and the gate (n,)."""

    def __init__(self, iciia: Iciia, gate: Gate) -> None:
        super().__init__()
        self.iciia, self.gate = iciia, gate

    def forward(self, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        # As a batch of one client: attention becomes ONNX with a batch only.
        return self.iciia(features[None], rows)[0], self.gate(features, rows)


@dataclass(frozen=True, slots=True)
class Recognizer:
    """What `train-recognizer` makes; `history` is how many pictures it is best given."""

    backbone: Backbone
    adapted: Adapted
    classes: tuple[str, ...]
    about: Mapping[str, Any]
    history: int = SEQUENCE - 1

    def save(self, folder: Path) -> None:
        """Write the folder; weights in half precision, the configuration last."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save(folder / BACKBONE)
        weights = {k: v.detach().cpu() for k, v in self.adapted.state_dict().items()}
        # The gate's few numbers decide between two heads and stay as they were fitted.
        half = {k: v if k.startswith("gate.") else v.half() for k, v in weights.items()}
        save_file({k: v.contiguous() for k, v in half.items()}, folder / WEIGHTS)
        config = {
            "iciia": asdict(self.adapted.iciia.config),
            "history": self.history,
            "about": self.about,
            "classes": self.classes,
        }
        text = json.dumps(config, ensure_ascii=False, indent=1)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; raises ModelError."""
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            sizes = IciiaConfig(**config["iciia"])
            adapted = Adapted(Iciia(sizes), Gate(sizes.width))
            weights = load_file(folder / WEIGHTS)
            adapted.load_state_dict({k: v.float() for k, v in weights.items()})
            classes, history = tuple(config["classes"]), int(config["history"])
            about = config["about"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as err:
            raise ModelError(
                f"'{folder}' is no usable recogniser ({str(err).splitlines()[0]}); pass the folder "
                "that cloud-server train-recognizer wrote"
            ) from err
        backbone = open_backbone(str(folder / BACKBONE))
        return cls(backbone, adapted.eval(), classes, about, history)

    @torch.inference_mode()
    def plain(self, features: Tensor) -> Tensor:
        """Return what the backbone alone says: (N, D) to logits (N, C)."""
        return self.backbone.classifier(features)
