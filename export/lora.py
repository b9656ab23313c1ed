"""LoRA weights, merged into a pipeline before it is exported: the device then runs one model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft  # noqa: F401  diffusers reads LoRA weights with it, and says so late
import torch
from safetensors import safe_open

from cloud_server.torchvision_guard import guard
from export.errors import ExportError
from export.sources import Lora, Pipeline
from export.weights import variant_of

guard()
import diffusers  # noqa: E402  the guard must come first

# The first of the two matrices of a layer, as diffusers, peft and kohya name it.
_DOWN = re.compile(r"lora(_A|_down|\.down|_linear_layer\.down)(\.\w+)?\.weight$")
# Parts that no picture of ours depends on.
NOT_LOADED = (
    "safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3",
)  # fmt: skip


def merge(
    pipeline: Pipeline, loras: Sequence[Lora], into: Path, on_note: Callable[[str], None]
) -> Pipeline:
    """Write a copy of `pipeline` with all `loras` in its weights to `into`, and describe it.

    A LoRA that fits in part, as those for the parent of a pruned model do, is told to `on_note`.
    The whole pipeline is in memory meanwhile. Raises ExportError naming the LoRA that does not fit.
    """
    kind = getattr(diffusers, pipeline.index["_class_name"])
    without = dict.fromkeys(part for part in NOT_LOADED if part in pipeline.index)
    diffusers.utils.logging.disable_progress_bar()  # the export has one of its own
    changed = [pipeline.family.denoiser, *(each.folder for each in pipeline.family.encoders)]
    variants = [variant_of(pipeline.folder / part) for part in (*changed, "vae")]
    loaded = kind.from_pretrained(
        pipeline.folder,
        torch_dtype=torch.float32,
        variant=next(filter(None, variants), None),
        **without,
    )
    names = [f"adapter{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        try:
            loaded.load_lora_weights(
                lora.path.parent, weight_name=lora.path.name, adapter_name=name
            )
        except Exception as err:  # diffusers, peft and safetensors share no base class
            raise _misfit(lora, pipeline, f"{type(err).__name__}: {err}") from err
        placed, held = _places(loaded, name), _pairs(lora.path)
        if not placed:
            raise _misfit(lora, pipeline, "none of its weights has a place there")
        if placed < held:
            on_note(
                f"the LoRA '{lora.path}' changes {held} layers, of which '{pipeline.name}' has "
                f"only {placed}: the others are left out"
            )
    loaded.set_adapters(names, [lora.scale for lora in loras])
    loaded.fuse_lora(adapter_names=names)
    loaded.unload_lora_weights()
    for part in changed:
        getattr(loaded, part).save_pretrained(into / part)
    for part in ["scheduler", *(each.tokenizer for each in pipeline.family.encoders)]:
        shutil.copytree(pipeline.folder / part, into / part)
    for file in pipeline.folder.glob("*.json"):
        shutil.copy(file, into)
    merged = "".join(f"+{lora.name}:{lora.scale:g}" for lora in loras)
    return replace(pipeline, folder=into, name=pipeline.name + merged)


def _pairs(file: Path) -> int:
    """Return how many layers a file of LoRA weights changes."""
    with safe_open(file, "pt") as weights:
        return sum(bool(_DOWN.search(key)) for key in weights.keys())  # noqa: SIM118  no dict


def _places(pipeline: Any, name: str) -> int:
    """Return how many layers of a pipeline an adapter changes."""
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return sum(name in getattr(module, "lora_A", {}) for part in parts for module in part.modules())


def _misfit(lora: Lora, pipeline: Pipeline, why: str) -> ExportError:
    line = why.strip().partition("\n")[0]
    return ExportError(
        f"the LoRA '{lora.path}' could not be merged into '{pipeline.name}' ({line}); "
        "pass one that was trained for this model"
    )
