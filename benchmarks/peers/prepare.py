"""What the contenders are measured on: one pipeline, and what each of them makes of it.

Everything is made once, in processes of their own, and kept: a run that was stopped goes on here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

from cloud_server.starter import starter_folder

ROOT = Path(__file__).parents[2]
# Folders of a pipeline, in the order of making; each is made from those before it.
BUNDLES = ("bundle", "bundle-w8a8")
PARTS = ("model", *BUNDLES, "optimum")
TEXT = "clip-vit-l-14"
TEXT_PARTS = ("model", "text")


def prepare(name: str, work: Path, small: bool, wanted: tuple[str, ...]) -> None:
    """Make the folders of pipeline `name` that are `wanted` and not there yet, under `work`.

    `bundle` is the device's, exported again only where it is out of date, `bundle-w8a8` the same in
    8 bits; `optimum` is what optimum exports, which OpenVINO reads too, with the decoder that it
    cannot trace.
    """
    for part in PARTS:
        exported = "bundle" in part  # export knows what it may keep
        if part in wanted and (exported or not (work / name / part).is_dir()):
            _in_own_process(part, name, work, small)


def prepare_starter(work: Path, wanted: Collection[str]) -> None:
    """Export the starter models, and lay a link to those that the device's were made of."""
    home = work / "starter"
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "model").is_dir():
        (home / "model").symlink_to(starter_folder() / "edge")
    for part in BUNDLES:
        if part in wanted:
            _bundle(home, part)


def prepare_text(work: Path, small: bool) -> None:
    """Make the text tower of CLIP ViT-L/14, as transformers has it and with 8-bit weights."""
    for part in TEXT_PARTS:
        if not (work / TEXT / part).is_dir():
            _in_own_process(part, TEXT, work, small)


def _in_own_process(part: str, name: str, work: Path, small: bool) -> None:
    """Make one folder where nothing else holds memory; raises CalledProcessError."""
    command = [sys.executable, "-m", "benchmarks.peers.prepare", part, name, str(work)]
    subprocess.run([*command, *(["small"] if small else [])], cwd=ROOT, check=True)


def main(part: str, name: str, work: Path, small: bool) -> None:
    """Make one folder; it gets its name when it is complete."""
    home = work / name
    home.mkdir(parents=True, exist_ok=True)
    if part in BUNDLES:
        _bundle(home, part, "--edge-model", str(home / "model"))
        return
    partial = home / f"{part}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if name == TEXT:
        (_text_model if part == "model" else _text_int8)(home, partial, small)
    elif part == "model":
        from benchmarks.peers.models import MODELS, SMALL_MODELS, make_pipeline

        make_pipeline((SMALL_MODELS if small else MODELS)[name], partial)
    else:
        _optimum(home, partial)
    partial.rename(home / part)


def _bundle(home: Path, part: str, *options: str) -> None:
    """Export as a user would; decisions are the starter's, made by its own text encoder."""
    bundle, first = home / part, home / BUNDLES[0]
    if part != BUNDLES[0]:
        # Random weights may lose anything by 8 bits, and nobody asks how much.
        options += ("--precision", "w8a8", "--accept-loss", "--pictures", "1")
        if first.is_dir() and not bundle.is_dir():  # begin with what both have in common
            shutil.copytree(first, bundle)
    command = [sys.executable, "-m", "export", *options, "-o", str(bundle)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def _optimum(home: Path, folder: Path) -> None:
    """Let optimum export the pipeline; it cannot trace AutoencoderTiny, so that one is ours."""
    from cloud_server.torchvision_guard import guard

    guard()
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
    from optimum.exporters.onnx import main_export

    from export import components
    from export.quiet import quiet
    from export.sources import open_pipeline

    # A decoder that optimum knows stands in while it exports the rest.
    stand_in = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    with_it = folder.with_name("optimum-model.partial")
    pipeline = StableDiffusionPipeline.from_pretrained(home / "model", vae=stand_in)
    pipeline.save_pretrained(with_it)
    main_export(str(with_it), folder, task="text-to-image", do_validation=False)
    shutil.rmtree(with_it)
    shutil.rmtree(folder / "vae_encoder")
    for left in (folder / "vae_decoder").iterdir():
        left.unlink()
    own = open_pipeline(str(home / "model"))
    decoder = components.vae_decoder(
        AutoencoderTiny.from_pretrained(own.vae_folder), own.latent_size
    )
    with quiet(), torch.inference_mode():
        decoder.trace(folder / "vae_decoder" / "model.onnx")
    shutil.copy(home / "model" / "vae" / "config.json", folder / "vae_decoder" / "config.json")


def _text_model(home: Path, folder: Path, small: bool) -> None:
    from benchmarks.peers.models import MODELS, SMALL_MODELS, make_text_encoder

    make_text_encoder((SMALL_MODELS if small else MODELS)["tiny-sd"].text).save_pretrained(folder)


def _text_int8(home: Path, folder: Path, small: bool) -> None:
    from cloud_server.torchvision_guard import guard

    guard()
    from transformers import CLIPTextModel

    from cloud_server.training.towers import ClipTower
    from export.components import text_encoder
    from export.lowering import lower
    from export.precision import INT8
    from export.quiet import quiet

    with quiet(), TemporaryDirectory(dir=home) as workspace:
        traced = Path(workspace) / "traced.onnx"
        tower = ClipTower(CLIPTextModel.from_pretrained(home / "model").eval())
        text_encoder(tower, tower.context_length).trace(traced)
        lower(traced, folder / "int8.onnx", INT8)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), "small" in sys.argv[4:])
