"""Which files weights are taken from, of those in listings as repositories have them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.build import export_bundle
from export.errors import ExportError
from export.lora import merge
from export.sources import PIPELINE_PARTS, VAE_PARTS, open_lora, open_pipeline, with_preview
from export.text import open_text
from export.weights import best, load_sound, wanted
from tests import families, tiny

# But for weights, which each test adds.
LISTING = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "v1-5-pruned.safetensors",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
]
LEFT = {*LISTING[:2], *LISTING[3:7]}
FLAX = ["text_encoder/flax_model.msgpack", "unet/diffusion_flax_model.msgpack"]


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        pytest.param(
            [
                "text_encoder/model.safetensors",
                "unet/diffusion_pytorch_model.safetensors",
                "vae/diffusion_pytorch_model.safetensors",
            ],
            [
                *FLAX,
                "text_encoder/model.fp16.safetensors",
                "text_encoder/pytorch_model.bin",
                "text_encoder/pytorch_model.fp16.bin",
                "unet/diffusion_pytorch_model.bin",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model.non_ema.bin",
                "unet/diffusion_pytorch_model.non_ema.safetensors",
                "unet/openvino_model.bin",
                "vae/diffusion_pytorch_model.fp16.bin",
                "vae_decoder/model.onnx",
            ],
            id="of Stable Diffusion 1.5, all kinds",
        ),
        pytest.param(
            [
                "text_encoder/pytorch_model.bin",
                "unet/diffusion_pytorch_model.bin",
                "vae/diffusion_pytorch_model.bin",
            ],
            FLAX,
            id="of early pruned models, pickles alone",
        ),
        pytest.param(
            [
                "text_encoder/model.safetensors",
                "unet/diffusion_pytorch_model.bin",
                "vae/diffusion_pytorch_model.fp16.safetensors",
            ],
            [
                "text_encoder/pytorch_model.bin",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "vae/diffusion_pytorch_model.fp16.bin",
            ],
            id="what each part has",
        ),
        pytest.param(
            [
                "text_encoder/model.fp16.safetensors",
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
                "unet/diffusion_pytorch_model.safetensors.index.json",
                "vae/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
                "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
            ],
            [
                "unet/diffusion_pytorch_model-00001-of-00001.fp16.safetensors",
                "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
                "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
                "vae/diffusion_pytorch_model.safetensors.index.json",  # of nothing
            ],
            id="in several files",
        ),
    ],
)
def test_the_best_weights_of_each_part_are_fetched(taken, left):
    fetched = wanted([*LISTING, *left, *taken], PIPELINE_PARTS)
    assert sorted(fetched) == sorted({*LISTING, *taken} - LEFT)


def test_an_autoencoder_lies_in_the_repositorys_own_folder():
    names = ["config.json", "diffusion_pytorch_model.bin", "taesd_decoder.safetensors"]
    others = ["README.md", "onnx/config.json", "taesd_encoder.pth"]
    assert wanted([*names, *others], VAE_PARTS) == names[:2]


def test_a_folder_may_have_no_weights():
    assert best(["config.json", "flax_model.msgpack", "model.safetensors.index.json"]) == []


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("text_encoder", "model.safetensors"),
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_part_without_weights_is_told_with_the_file_that_it_lacks(tmp_path, part, file):
    folder = tiny.make_pipeline(tmp_path / "tiny")
    (folder / part / file).unlink()
    with pytest.raises(ExportError, match=rf"no weights in '.*/{part}', where {file} should be;"):
        open_pipeline(str(folder))


def test_a_preview_without_weights_is_told(tmp_path):
    pipeline = open_pipeline(str(tiny.make_pipeline(tmp_path / "tiny")))
    small = tmp_path / "small"
    shutil.copytree(pipeline.vae_folder, small)
    (small / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"no weights in '.*/small'"):
        with_preview(pipeline, str(small))


def halved(folder: Path) -> Path:
    """Leave a pipeline the weights of the fp16 variant alone."""
    for file in folder.glob("*/*.safetensors"):
        halves = {key: weight.half() for key, weight in load_file(file).items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    return folder


def test_weights_of_the_fp16_variant_are_read_where_there_are_no_others(tmp_path, copied):
    folder = halved(tiny.make_pipeline(tmp_path / "tiny"))
    job = replace(copied, text_encoder=copied.pipeline.folder)
    path, _ = export_bundle(replace(job, pipeline=open_pipeline(str(folder)), fresh=True))
    assert path == copied.out
    unet = weights_of(folder / "unet")
    full = weights_of(copied.pipeline.folder / "unet")
    assert all(torch.equal(unet[key], full[key].half().float()) for key in full)


def weights_of(folder: Path) -> dict[str, Tensor]:
    model = load_sound(UNet2DConditionModel, folder, torch_dtype=torch.float32)
    return dict(model.state_dict())


def test_full_weights_are_read_beside_those_of_the_fp16_variant(tmp_path):
    folder = tiny.make_pipeline(tmp_path / "tiny") / "unet"
    full = weights_of(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({key: torch.zeros(1) for key in full}, file.with_suffix(".fp16.safetensors"))
    assert weights_of(folder).keys() == full.keys()


def test_a_lora_is_merged_into_weights_of_the_fp16_variant(tmp_path):
    folder = tiny.make_pipeline(tmp_path / "tiny")
    lora = open_lora(str(families.make_lora(folder, tmp_path / "lora", 0)))
    merged = merge(open_pipeline(str(halved(folder))), [lora], tmp_path / "merged", print)
    assert sorted(best(file.name for file in (merged.folder / "unet").iterdir())) == [
        "diffusion_pytorch_model.safetensors"
    ]


def test_a_router_does_not_read_with_weights_of_the_fp16_variant(tmp_path):
    folder = halved(tiny.make_pipeline(tmp_path / "tiny"))
    with pytest.raises(ExportError, match=r"text_encoder' has weights of the fp16 variant only"):
        open_text(folder)


def test_a_text_encoder_of_the_router_whose_weights_are_no_numbers_is_told(tmp_path):
    folder = tiny.make_pipeline(tmp_path / "tiny")
    file = folder / "text_encoder" / "model.safetensors"
    name = "text_model.final_layer_norm.weight"
    save_file(load_file(file) | {name: torch.full((32,), torch.inf)}, file, {"format": "pt"})
    with pytest.raises(ExportError, match=rf"'.*tiny' are damaged: .*{name} holds NaN or infinity"):
        open_text(folder)
