"""A real bundle of a few kilobytes: hand-made ONNX graphs and a small BPE tokenizer, no torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

WIDTH, CONTEXT, LATENTS, SCALE = 8, 16, 4, 8
CRITIC_SIDE = 16
METRICS = ("Definition", "Sharpness", "Layout")


def tensor(name: str, values: Any, kind: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, kind), name)


def save(
    file: Path,
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, list[Any]]],
    outputs: Mapping[str, list[Any]],
    constants: list[onnx.TensorProto],
) -> Path:
    """Write a graph; `inputs` maps a name to its type and shape, `outputs` are float32."""
    graph = helper.make_graph(
        nodes,
        file.parent.name,
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(file))
    return file


def text_encoder(file: Path, vocabulary: int) -> Path:
    """Hidden states are one fixed vector a token; the pooled state is their mean."""
    table = np.random.default_rng(1).standard_normal((vocabulary, WIDTH))
    return save(
        file,
        [
            helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
            helper.make_node("ReduceMean", ["hidden", "axis"], ["pooled"], keepdims=0),
        ],
        {"input_ids": (TensorProto.INT64, ["batch", "tokens"])},
        {"hidden": ["batch", "tokens", WIDTH], "pooled": ["batch", WIDTH]},
        [tensor("table", table), tensor("axis", [1], np.int64)],
    )


def predictor(file: Path) -> Path:
    """D falls with the number of tokens: short prompts belong to the edge, long to the cloud."""
    return save(
        file,
        [
            helper.make_node("ReduceSum", ["mask", "axis"], ["count"], keepdims=1),
            helper.make_node("Mul", ["count", "slopes"], ["fall"]),
            helper.make_node("ReduceMean", ["hidden", "both"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
            helper.make_node("Sub", ["starts", "fall"], ["raw"]),
            helper.make_node("Add", ["raw", "nothing"], ["logit"]),
            helper.make_node("Sigmoid", ["logit"], ["d"]),
        ],
        {
            "hidden": (TensorProto.FLOAT, ["batch", "tokens", WIDTH]),
            "mask": (TensorProto.FLOAT, ["batch", "tokens"]),
        },
        {"d": ["batch", len(METRICS)]},
        [
            tensor("axis", [1], np.int64),
            tensor("both", [1, 2], np.int64),
            tensor("zero", 0.0),
            tensor("slopes", [[0.2, 0.3, 0.4]]),
            tensor("starts", [[1.0, 1.0, 1.0]]),
        ],
    )


def unet(file: Path, *, factor: float = 0.5, guided: bool = False) -> Path:
    """Prediction is the sample scaled, shifted by the prompt and by the time.

    With `guided` the strength of guidance is one more input, and the factor.
    """
    told = {"guidance": (TensorProto.FLOAT, [])} if guided else {}
    return save(
        file,
        [
            helper.make_node("Cast", ["timestep"], ["time"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["time", "tick"], ["late"]),
            helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["said"], keepdims=0),
            helper.make_node("Reshape", ["said", "column"], ["shift"]),
            helper.make_node("Mul", ["sample", "guidance" if guided else "factor"], ["scaled"]),
            helper.make_node("Add", ["scaled", "shift"], ["shifted"]),
            helper.make_node("Add", ["shifted", "late"], ["out_sample"]),
        ],
        {
            "sample": (TensorProto.FLOAT, ["batch", LATENTS, "rows", "columns"]),
            "timestep": (TensorProto.INT64, []),
            "encoder_hidden_states": (TensorProto.FLOAT, ["batch", "tokens", WIDTH]),
            **told,
        },
        {"out_sample": ["batch", LATENTS, "rows", "columns"]},
        [
            tensor("tick", 1e-4),
            tensor("factor", factor),
            tensor("axes", [1, 2], np.int64),
            tensor("column", [-1, 1, 1, 1], np.int64),
        ],
    )


def vae_decoder(file: Path, *, strength: float = 1.0) -> Path:
    """Mixes the latent channels into colours and repeats each cell 8 x 8 times."""
    mix = strength * np.random.default_rng(2).standard_normal((3, LATENTS, 1, 1)) / LATENTS
    return save(
        file,
        [
            helper.make_node("Conv", ["latent_sample", "mix"], ["small"]),
            helper.make_node(
                "Resize",
                ["small", "", "scales"],
                ["sample"],
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
            ),
        ],
        {"latent_sample": (TensorProto.FLOAT, ["batch", LATENTS, "rows", "columns"])},
        {"sample": ["batch", 3, "height", "width"]},
        [tensor("mix", mix), tensor("scales", [1, 1, SCALE, SCALE])],
    )


def critic(file: Path, taste: float) -> Path:
    """Every quality is the brightness of the picture; D is `taste`, whatever that is."""
    return save(
        file,
        [
            helper.make_node("Cast", ["picture"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels", "all"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "each"], ["quality"]),
            *(
                helper.make_node("ReduceSum", [name], [f"{name}_sum"], keepdims=0)
                for name in ("text", "hidden", "mask", "before", "quality")
            ),
            helper.make_node(
                "Sum",
                [f"{name}_sum" for name in ("text", "hidden", "mask", "before", "quality")],
                ["said"],
            ),
            helper.make_node("Mul", ["said", "nothing"], ["silence"]),
            helper.make_node("Add", ["silence", "taste"], ["d"]),
        ],
        {
            "picture": (TensorProto.UINT8, [1, CRITIC_SIDE, CRITIC_SIDE, 3]),
            "text": (TensorProto.FLOAT, [1, WIDTH]),
            "hidden": (TensorProto.FLOAT, [1, "tokens", WIDTH]),
            "mask": (TensorProto.FLOAT, [1, "tokens"]),
            "before": (TensorProto.FLOAT, [1, len(METRICS)]),
        },
        {"quality": [1, len(METRICS)], "d": [1, len(METRICS)]},
        [
            tensor("all", [1, 2, 3], np.int64),
            tensor("each", [[1 / 255] * len(METRICS)]),
            tensor("nothing", 0.0),
            tensor("taste", [[taste] * len(METRICS)]),
        ],
    )


def tokenizer(file: Path) -> int:
    """Write a letter-level BPE tokenizer that knows a few words whole; return its size."""
    import tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'<>|-"
    vocabulary = ["!", *sorted({*letters} - {"!"}), *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in ("cat", "dog", "red", "two", "and", "the"):
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            merges.append((left, right))
            left += right
            vocabulary.append(left)
    start, end = "<|startoftext|>", "<|endoftext|>"
    ids = {token: index for index, token in enumerate(dict.fromkeys([*vocabulary, start, end]))}
    bpe = tokenizers.models.BPE(ids, merges, unk_token=end, end_of_word_suffix="</w>")
    made = tokenizers.Tokenizer(bpe)
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens([start, end])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ids[start]), (end, ids[end])]
    )
    made.save(str(file))
    return len(ids)


def file_record(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def write_bundle(folder: Path) -> Path:
    folder.mkdir(parents=True)
    vocabulary = tokenizer(folder / "tokenizer.json")
    files = {
        name: build(folder / name / "model.onnx")
        for name, build in {
            "text_encoder": lambda file: text_encoder(file, vocabulary),
            "predictor": predictor,
            "unet": unet,
            "vae_decoder": vae_decoder,
        }.items()
    }
    manifest = {
        "format": 2,
        "created_by": "routet2i-edge 0.0.0",
        "created_at": "2026-01-01T00:00:00+00:00",
        "components": {name: component(folder, file) for name, file in files.items()},
        "tokenizers": {
            "text_encoder": {
                "file": "tokenizer.json",
                **file_record(folder / "tokenizer.json"),
                "context_length": CONTEXT,
                "pad_id": 0,
            }
        },
        "diffusion": {
            "family": "stable-diffusion",
            "model": "tiny",
            "digest": "d" * 64,
            "denoiser": "unet",
            "text_encoders": ["text_encoder"],
            "text_states": "hidden",
            "empty_is_zeros": False,
            "scheduler": {
                "_class_name": "DPMSolverMultistepScheduler",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "prediction_type": "v_prediction",
                "timestep_spacing": "trailing",
            },
            "latent_channels": LATENTS,
            "vae_scale": SCALE,
            "size_step": SCALE,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "width": 64,
            "height": 64,
            "steps": 4,
            "guidance": 4.0,
            "max_size": 128,
            "preview": {"decoder": "vae_decoder", "scaling_factor": 1.0, "shift_factor": 0.0},
        },
        "router": {
            "metrics": [
                {
                    "name": name,
                    "positive": "good",
                    "negative": "bad",
                    "weight": 1 / len(METRICS),
                    "mu_edge": 0.4,
                    "mu_cloud": 0.6,
                }
                for name in METRICS
            ],
            "gamma": 1.0,
            "floor": 1e-3,
            "score_digest": [float(value) for value in np.linspace(0.2, 0.8, 200)],
            "default_share": 0.3,
            "text_encoder": "text_encoder",
            "predictor": "predictor",
        },
    }
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


def component(folder: Path, file: Path) -> dict[str, Any]:
    graph = onnx.load(str(file)).graph
    return {
        "file": file.relative_to(folder).as_posix(),
        "files": {file.relative_to(folder).as_posix(): file_record(file)},
        "opset": 18,
        "precision": "fp32",
        "inputs": [node.name for node in graph.input],
        "outputs": [node.name for node in graph.output],
        "parity": {"metric": "psnr_db", "value": 99.0, "gate": 35.0},
        "source": "s" * 64,
        "optimized": False,
    }


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite bundle.json after `change`, and the records of component files as they are now."""
    file = folder / "bundle.json"
    content = json.loads(file.read_text())
    for part in content["components"].values():
        part["files"] = {name: file_record(folder / name) for name in part["files"]}
    change(content)
    file.write_text(json.dumps(content))


@pytest.fixture(scope="session")
def built_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def tiny_bundle(built_bundle: Path, tmp_path: Path) -> Path:
    """The folder of a bundle that a test may damage."""
    return Path(shutil.copytree(built_bundle, tmp_path / "bundle"))


@pytest.fixture
def rewrite() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    """Change a bundle's manifest and bring the digests of its files up to date."""
    return edit_manifest


@pytest.fixture
def swap_unet() -> Callable[..., None]:
    """Replace a bundle's UNet by another one of the same shape."""

    def swap(folder: Path, **options: Any) -> None:
        unet(folder / "unet" / "model.onnx", **options)
        edit_manifest(folder, lambda _: None)

    return swap


@pytest.fixture
def hire_critic() -> Callable[[Path, float], None]:
    """Give a bundle a critic that reads prompts as the router does, and answers D = `taste`."""

    def hire(folder: Path, taste: float) -> None:
        file = critic(folder / "critic" / "model.onnx", taste)

        def change(content: dict[str, Any]) -> None:
            content["components"]["critic"] = component(folder, file)
            content["critic"] = {
                "side": CRITIC_SIDE,
                "squashed": False,
                "score_digest": [float(value) for value in np.linspace(0.1, 0.9, 200)],
                "text_encoder": "text_encoder",
                "network": "critic",
            }

        edit_manifest(folder, change)

    return hire


@pytest.fixture
def blank_decoder() -> Callable[[Path], None]:
    """Replace a bundle's decoder by one that answers with one grey."""

    def swap(folder: Path) -> None:
        vae_decoder(folder / "vae_decoder" / "model.onnx", strength=0.0)
        edit_manifest(folder, lambda _: None)

    return swap


@pytest.fixture
def half_text_encoder() -> Callable[[Path], None]:
    """Replace a bundle's text encoder by one in fp16 that multiplies tokens first, as open_clip's.

    On such a transpose the optimiser of onnxruntime 1.31 ends the process.
    """

    def swap(folder: Path) -> None:
        file = folder / "text_encoder" / "model.onnx"
        (table,) = (each for each in onnx.load(file).graph.initializer if each.name == "table")
        save(
            file,
            [
                helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
                helper.make_node("Transpose", ["embedded"], ["tokens_first"], perm=[1, 0, 2]),
                helper.make_node("MatMul", ["tokens_first", "weight"], ["mixed"]),
                helper.make_node("Transpose", ["mixed"], ["hidden"], perm=[1, 0, 2]),
                helper.make_node("ReduceMean", ["hidden", "axis"], ["pooled"], keepdims=0),
            ],
            {"input_ids": (TensorProto.INT64, ["batch", "tokens"])},
            {"hidden": ["batch", "tokens", WIDTH], "pooled": ["batch", WIDTH]},
            [table, tensor("weight", np.eye(WIDTH)), tensor("axis", [1], np.int64)],
        )
        onnx.save(convert_float_to_float16(onnx.load(file), keep_io_types=True), str(file))
        edit_manifest(folder, lambda it: it["components"]["text_encoder"].update(precision="fp16"))

    return swap


@pytest.fixture
def slow_unet() -> Callable[..., None]:
    """Replace a bundle's UNet by one whose step takes hours, or its steps below a timestep."""

    def swap(folder: Path, below: int = 10**6) -> None:
        body = helper.make_graph(
            [
                helper.make_node("Mul", ["before", "one"], ["after"]),
                helper.make_node("Identity", ["go"], ["still"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("i", TensorProto.INT64, []),
                helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
            ],
            [
                helper.make_tensor_value_info("still", TensorProto.BOOL, []),
                helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
            ],
        )
        save(
            folder / "unet" / "model.onnx",
            [
                helper.make_node("Less", ["timestep", "below"], ["late"]),
                helper.make_node("Where", ["late", "hours", "once"], ["count"]),
                helper.make_node("Loop", ["count", "yes", "sample"], ["out_sample"], body=body),
            ],
            {
                "sample": (TensorProto.FLOAT, ["batch", LATENTS, "rows", "columns"]),
                "timestep": (TensorProto.INT64, []),
                "encoder_hidden_states": (TensorProto.FLOAT, ["batch", "tokens", WIDTH]),
            },
            {"out_sample": ["batch", LATENTS, "rows", "columns"]},
            [
                tensor("one", 1.0),
                tensor("below", below, np.int64),
                tensor("hours", 10**11, np.int64),
                tensor("once", 1, np.int64),
                tensor("yes", True, np.bool_),
            ],
        )
        edit_manifest(folder, lambda _: None)

    return swap
