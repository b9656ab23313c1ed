"""Every family from its folder to a picture, which is the one that diffusers' pipeline draws.

Both begin with the same noise, add the same noise on the way and read the same prompt. Pictures may
differ by rounding only: 60 dB is one grey level in every fifteenth value.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edge_agent.agent import EdgeAgent
from edge_agent.bundle import Bundle, PreviewSpec, open_bundle
from edge_agent.cli import run
from edge_agent.gallery.png import read_record
from edge_agent.types import Event, Preview, Request
from export.build import Job, Row, export_bundle
from export.sources import open_lora, open_pipeline, open_router, with_preview, with_vae
from export.text import PROBES, open_text
from tests import families, tiny

PSNR_DB = 60.0
PROMPT, SEED = "two red apples on the beach", 7
FAST = {"Stable Diffusion 1.5"}
# Text encoders that no router here was trained with: the router brings its own.
STRANGE = {"Stable Diffusion 2.1", "Stable Diffusion 3"}
NAMES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow, id=name)
    for name in families.MAKERS
]
# diffusers 0.39 converts torch tensors by numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@dataclass(frozen=True)
class Exported:
    """A pipeline's folder and the bundle made of it."""

    folder: Path
    bundle: Bundle
    rows: list[Row]


@dataclass(frozen=True)
class Drawn:
    """A picture's pixels (h, w, 3) and its own record."""

    pixels: np.ndarray
    record: Mapping[str, Any]


Export = Callable[..., Exported]
Draw = Callable[..., Drawn]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routers, and the bundle that one family after the other is exported to."""
    folder = tmp_path_factory.mktemp("families")
    tiny.make_router(folder / "router")
    tiny.make_clip(folder / "clip")
    router = tiny.make_router(folder / "router-of-clip")
    spec = json.loads((router / "router.json").read_text())
    spec["text_probe"] = {"prompt": PROBES[1], "state": open_text(folder / "clip").state(PROBES[1])}
    (router / "router.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture
def export(workshop: Path, tmp_path: Path) -> Export:
    def make(
        name: str,
        *,
        vae: Path | None = None,
        preview_vae: Path | None = None,
        loras: tuple[str, ...] = (),
    ) -> Exported:
        folder = tmp_path / "model"
        if not folder.exists():
            families.MAKERS[name](folder)
        pipeline = replace(open_pipeline(str(folder)), **families.SETTINGS.get(name, {}))
        pipeline = pipeline if vae is None else with_vae(pipeline, str(vae))
        strange = name in STRANGE
        job = Job(
            pipeline=pipeline if preview_vae is None else with_preview(pipeline, str(preview_vae)),
            router=open_router(workshop / ("router-of-clip" if strange else "router")),
            text_encoder=workshop / "clip" if strange else None,
            loras=[open_lora(each) for each in loras],
            out=workshop / "bundle",
        )
        path, rows = export_bundle(job)
        return Exported(folder, open_bundle(path), rows)

    return make


@pytest.fixture
def draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Draw:
    """Run `edge-agent generate`."""

    def generate(exported: Exported, *flags: str, prompt: str = PROMPT) -> Drawn:
        file = tmp_path / "picture.png"
        always = ("--route", "edge", "--seed", str(SEED), "--threads", "1", "-o", str(file))
        bundle = str(exported.bundle.path)
        code = run(["generate", prompt, "--bundle", bundle, *always, *flags], {})
        assert code == 0, capsys.readouterr().err
        with Image.open(file) as image:
            return Drawn(np.asarray(image), read_record(file))

    return generate


def draw_with_diffusers(
    exported: Exported,
    drawn: Drawn,
    monkeypatch: pytest.MonkeyPatch,
    *,
    change: Callable[[Any], None] = lambda _: None,
    **wishes: Any,
) -> np.ndarray:
    """Return the pixels that diffusers' own pipeline makes of the noise and settings of ours."""
    diffusers = importlib.import_module("diffusers")
    family = exported.bundle.diffusion.family
    without = {"text_encoder_3": None, "tokenizer_3": None} if family.endswith("-3") else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(exported.folder, **without)
    pipeline.set_progress_bar_config(disable=True)
    if type(pipeline.scheduler).__name__ == "PNDMScheduler":
        solver = diffusers.DPMSolverMultistepScheduler
        pipeline.scheduler = solver.from_config(pipeline.scheduler.config)
    change(pipeline)
    record = drawn.record
    draws = noises(exported.bundle, record["width"], record["height"])
    module = importlib.import_module(type(pipeline.scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(draws))
    (pixels,) = pipeline(
        PROMPT,
        latents=next(draws),
        width=record["width"],
        height=record["height"],
        num_inference_steps=record["steps"],
        guidance_scale=record["guidance"],
        output_type="np",
        **wishes,
    ).images
    return np.asarray((pixels * 255).round(), np.uint8)


def noises(bundle: Bundle, width: int, height: int) -> Iterator[torch.Tensor]:
    spec = bundle.diffusion
    shape = (1, spec.latent_channels, height // spec.vae_scale, width // spec.vae_scale)
    rng = np.random.Generator(np.random.Philox(SEED))
    while True:
        yield torch.from_numpy(rng.standard_normal(shape, np.float32))


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("name", NAMES)
def test_the_device_draws_what_diffusers_draws(
    name: str, export: Export, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = export(name)
    drawn = draw(exported)
    shared = exported.bundle.diffusion.text_encoders[0] == exported.bundle.router.text_encoder
    assert shared is (name not in STRANGE)
    near = psnr_db(drawn.pixels, draw_with_diffusers(exported, drawn, monkeypatch))
    assert near > PSNR_DB
    # Random networks heed a prompt little: no other prompt may come as near as diffusers does.
    assert psnr_db(drawn.pixels, draw(exported, prompt="a dog").pixels) < near - 10
    assert [drawn.record[key] for key in ("steps", "guidance", "sampler")] == EXPECTED[name]

    wide = draw(exported, "--size", "96x48", "--negative-prompt", "a cat", "--steps", "3")
    wishes = {} if name == "LCM" else {"negative_prompt": "a cat"}
    theirs = draw_with_diffusers(exported, wide, monkeypatch, **wishes)
    assert psnr_db(wide.pixels, theirs) > PSNR_DB


EXPECTED = {
    "Stable Diffusion 1.5": [20, 7.5, "dpmpp-2m"],
    "Stable Diffusion 2.1": [20, 7.5, "ddim"],
    "BK-SDM": [20, 7.5, "dpmpp-2m"],
    "SD-Turbo": [1, 0.0, "euler"],
    "SDXS": [1, 0.0, "euler"],
    "LCM": [4, 8.5, "lcm"],
    "SDXL": [20, 5.0, "euler"],
    "SDXL-Turbo": [1, 0.0, "euler-a"],
    "SSD-1B": [20, 5.0, "euler"],
    "Vega": [20, 5.0, "euler"],
    "LCM-SDXL": [4, 8.5, "lcm"],
    "Stable Diffusion 3": [28, 7.0, "flow-euler"],
}


@pytest.mark.slow
def test_another_sampler_draws_what_it_draws_in_diffusers(
    export: Export, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = export("Stable Diffusion 1.5")
    drawn = draw(exported, "--sampler", "euler-a", "--steps", "5")
    assert drawn.record["sampler"] == "euler-a"

    def change(pipeline: Any) -> None:
        scheduler = importlib.import_module("diffusers").EulerAncestralDiscreteScheduler
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)

    theirs = draw_with_diffusers(exported, drawn, monkeypatch, change=change)
    assert psnr_db(drawn.pixels, theirs) > PSNR_DB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Stable Diffusion 1.5", "Stable Diffusion 3"])
def test_another_decoder_takes_the_place_of_the_pipelines(
    name: str, export: Export, draw: Draw, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = draw(export(name))
    channels = 8 if name == "Stable Diffusion 3" else 4
    vae = families.tiny_vae(latent_channels=channels)
    vae.save_pretrained(tmp_path / "taesd")
    exported = export(name, vae=tmp_path / "taesd")
    assert [row.kept for row in exported.rows][-2:] == [True, False]  # the denoiser is the same
    spec = exported.bundle.diffusion
    assert (spec.scaling_factor, spec.shift_factor) == (1.0, 0.0)
    drawn = draw(exported)
    assert psnr_db(drawn.pixels, before.pixels) < PSNR_DB - 10

    def change(pipeline: Any) -> None:
        pipeline.vae = vae

    theirs = draw_with_diffusers(exported, drawn, monkeypatch, change=change)
    assert psnr_db(drawn.pixels, theirs) > PSNR_DB


@pytest.mark.slow
def test_a_small_decoder_beside_a_large_one_shows_the_picture_on_the_way(
    export: Export, tmp_path: Path
) -> None:
    families.tiny_vae().save_pretrained(tmp_path / "taesd")
    exported = export("Stable Diffusion 1.5", preview_vae=tmp_path / "taesd")
    spec = exported.bundle.diffusion.preview
    assert spec == PreviewSpec("preview_decoder", scaling_factor=1.0, shift_factor=0.0)
    events: list[Event] = []
    with EdgeAgent(exported.bundle, threads=1) as agent:
        agent.generate(Request(PROMPT, seed=SEED, steps=3, preview_every=2), events.append)
    (shown,) = (each for each in events if isinstance(each, Preview))
    assert (shown.index, shown.image.size) == (2, (64, 64))
    assert export("Stable Diffusion 1.5").bundle.diffusion.preview is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize("name", ["Stable Diffusion 1.5", "SDXL"])
def test_loras_are_merged_at_their_scale(
    name: str, export: Export, draw: Draw, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    families.MAKERS[name](tmp_path / "model")
    scales = {"first": 0.6, "second": -0.3}
    for seed, lora in enumerate(scales):
        families.make_lora(tmp_path / "model", tmp_path / lora, seed)
    loras = tuple(f"{tmp_path / lora}:{scale}" for lora, scale in scales.items())
    exported = export(name, loras=loras)
    drawn = draw(exported)
    assert exported.bundle.diffusion.model == "model+first:0.6+second:-0.3"

    def change(pipeline: Any) -> None:
        for lora in scales:
            file = "pytorch_lora_weights.safetensors"
            pipeline.load_lora_weights(tmp_path / lora, weight_name=file, adapter_name=lora)
        pipeline.set_adapters(list(scales), list(scales.values()))

    plain = draw_with_diffusers(exported, drawn, monkeypatch)
    assert psnr_db(drawn.pixels, plain) < PSNR_DB - 10
    theirs = draw_with_diffusers(exported, drawn, monkeypatch, change=change)
    assert psnr_db(drawn.pixels, theirs) > PSNR_DB
    assert [path.name for path in exported.bundle.path.parent.glob("bundle*")] == ["bundle"]
