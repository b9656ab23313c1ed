"""A trained recogniser as a folder: backbone, module, when to ask it, and the classes' names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cloud_server.errors import ConfigError, ModelError
from cloud_server.training.iciia.backbone import Backbone, open_backbone
from cloud_server.training.iciia.learn import SEQUENCE
from cloud_server.training.iciia.module import Iciia, IciiaConfig
from cloud_server.training.weights import save_weights

CONFIG = "recognizer.json"
WEIGHTS = "iciia.safetensors"
BACKBONE = "backbone"


@dataclass(frozen=True, slots=True)
class Recognizer:
    """What `train-recognizer` makes; `history` is how many pictures it is best given.

    Below `least_history` the backbone is asked alone, always where that is None.
    """

    backbone: Backbone
    iciia: Iciia
    least_history: int | None
    classes: tuple[str, ...]
    about: Mapping[str, Any]
    history: int = SEQUENCE - 1

    def save(self, folder: Path) -> None:
        """Write the folder; weights in half precision, the configuration last."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save(folder / BACKBONE)
        weights = self.iciia.state_dict().items()
        halved = {k: v.detach().cpu().half().contiguous() for k, v in weights}
        save_weights(halved, folder / WEIGHTS)
        config = {
            "iciia": asdict(self.iciia.config),
            "history": self.history,
            "least_history": self.least_history,
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
            iciia = Iciia(IciiaConfig(**config["iciia"]))
            weights = load_file(folder / WEIGHTS)
            iciia.load_state_dict({k: v.float() for k, v in weights.items()})
            classes, history = tuple(config["classes"]), int(config["history"])
            least, about = config["least_history"], config["about"]
        except (
            ConfigError, OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError,
        ) as err:  # fmt: skip
            raise ModelError(
                f"'{folder}' is no usable recogniser ({str(err).splitlines()[0]}); pass the folder "
                "that cloud-server train-recognizer wrote"
            ) from err
        backbone = open_backbone(str(folder / BACKBONE))
        named = (len(classes), iciia.config.classes, backbone.classifier.out_features)
        if len(set(named)) > 1 or iciia.config.width != backbone.width:
            raise ModelError(
                f"the parts of '{folder}' do not go together: {named[0]} names, a module of "
                f"{iciia.config.width} features and {named[1]} classes, a backbone of "
                f"{backbone.width} and {named[2]}; train it again"
            )
        return cls(backbone, iciia.eval(), least, classes, about, history)

    @torch.inference_mode()
    def plain(self, features: Tensor) -> Tensor:
        """Return what the backbone alone says: (N, D) to logits (N, C)."""
        return self.backbone.classifier(features)
