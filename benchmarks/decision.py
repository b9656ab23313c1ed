"""What a decision costs with a text encoder of full size: CLIP ViT-L/14's, of random weights.

Weights do not change how long a network takes, so nothing needs to be fetched for this.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from cloud_server.torchvision_guard import guard
from cloud_server.training.predictor import KINDS, PredictorConfig, build
from cloud_server.training.router import MEMBERS
from cloud_server.training.towers import ClipTower
from export import components
from export.lowering import lower
from export.optimise import optimise
from export.precision import INT8
from export.quiet import quiet

guard()
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402  the guard must come first

# https://huggingface.co/openai/clip-vit-large-patch14, text_config
VIT_L_14: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
METRICS = 11


def sizes_of(kind: str, width: int) -> PredictorConfig:
    """Return the sizes of a predictor of a kind, for states of `width` numbers."""
    members = MEMBERS if kind == "mixed" else 1
    return PredictorConfig(width, METRICS, kind=kind, members=members)


@contextmanager
def decisions(
    sizes: dict[str, Any], words: Sequence[int], threads: int
) -> Iterator[dict[str, Callable[[int], object]]]:
    """Yield functions by name, each of which does the work for prompt i, `words[i]` tokens long.

    `sizes` are those of a CLIPTextConfig. The names are "gated predictor", "linear predictor",
    "fp32 encoder and gated predictor", and the same with int8, lowered as for a bundle.
    """
    torch.manual_seed(0)
    tower = ClipTower(CLIPTextModel(CLIPTextConfig(**sizes)).eval())
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads

    def open_session(file: Path) -> ort.InferenceSession:
        return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    with TemporaryDirectory() as name, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # the exporter's own
        folder = Path(name)
        traced = folder / "traced.onnx"
        components.text_encoder(tower, tower.context_length).trace(traced)
        optimise(traced, folder / "fp32" / "model.onnx")
        lower(traced, folder / "int8" / "model.onnx", INT8)
        predictors = {}
        for kind in KINDS:
            model = build(sizes_of(kind, tower.width)).eval()
            file = folder / f"{kind}.onnx"
            components.predictor(model, tower.context_length).trace(file)
            predictors[kind] = open_session(file)
        encoders = {kind: open_session(folder / kind / "model.onnx") for kind in ("fp32", "int8")}

        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, tower.vocab_size - 2, (1, count + 2)) for count in words]
        for ids in prompts:
            ids[0, -1] = int(sizes["eos_token_id"])
        states = [rng.normal(size=(*ids.shape, tower.width)).astype(np.float32) for ids in prompts]

        def predict(kind: str, hidden: np.ndarray) -> object:
            mask = np.ones(hidden.shape[:2], np.float32)
            mask[:, [0, -1]] = 0.0
            return predictors[kind].run(None, {"hidden": hidden, "mask": mask})

        def decide(kind: str, index: int) -> object:
            ids = prompts[index % len(prompts)]
            return predict("mixed", encoders[kind].run(None, {"input_ids": ids})[0])

        yield {
            "gated predictor": lambda i: predict("gated", states[i % len(states)]),
            "linear predictor": lambda i: predict("linear", states[i % len(states)]),
            "mixed predictor": lambda i: predict("mixed", states[i % len(states)]),
            "fp32 encoder and mixed predictor": lambda i: decide("fp32", i),
            "int8 encoder and mixed predictor": lambda i: decide("int8", i),
        }
