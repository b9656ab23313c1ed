"""Everybody who draws, behind one function: from a seed and a number of steps to pixels.

All get the same weights, noise, prompt and number of threads, and nobody a progress bar. They
import late: what a process imports is part of its start.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "two red apples to the left of a cat and a house at night"
LATENTS = 4
SCALE = 8  # pixels a cell of the latents


@dataclass(frozen=True)
class Task:
    """What to draw: the pipeline prepared in `home`, with its own defaults, on `threads`."""

    home: Path
    threads: int

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Width, height, steps and guidance."""
        return dict(json.loads((self.home / "model" / "defaults.json").read_text()))

    def noise(self, seed: int, channels: int = LATENTS) -> np.ndarray:
        """Return what the device begins with, of unit variance (1, c, h, w)."""
        cells = (self.defaults["height"] // SCALE, self.defaults["width"] // SCALE)
        rng = np.random.Generator(np.random.Philox(seed))
        return rng.standard_normal((1, channels, *cells), np.float32)


Draw = Callable[[int, int], np.ndarray]  # seed, steps -> (H, W, 3) uint8


@dataclass(frozen=True)
class Contender:
    """Somebody who draws; `open` opens what is not open yet, nothing for most."""

    draw: Draw
    open: Callable[[], object] = lambda: None


def ours(task: Task, **wanted: str) -> Contender:
    """The device as a user has it, deciding included; `wanted` as in `--ours`."""
    from edge_agent import EdgeAgent, Request, Route, open_bundle
    from edge_agent.config import resolve
    from edge_agent.errors import ConfigError

    if unknown := set(wanted) - {"provider", "memory", "bundle"}:
        raise ConfigError(
            f"--ours {unknown.pop()}=... is no setting; choose provider, memory or bundle"
        )
    settings = resolve({**wanted, "bundle": str(task.home / wanted.get("bundle", "bundle"))}, {})
    agent = EdgeAgent(
        open_bundle(settings.bundle),
        offline=True,
        provider=settings.provider,
        memory=settings.memory,
        threads=task.threads,
    )

    def draw(seed: int, steps: int) -> np.ndarray:
        request = Request(PROMPT, seed=seed, steps=steps, route=Route.EDGE)
        return np.asarray(agent.generate(request).picture.image)

    return Contender(draw, agent.open)


def diffusers(task: Task, dtype: str) -> Draw:
    """diffusers' own pipeline in PyTorch."""
    import torch

    from cloud_server.torchvision_guard import guard

    guard()
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(task.threads)
    kind = getattr(torch, dtype)
    pipeline = StableDiffusionPipeline.from_pretrained(task.home / "model", torch_dtype=kind)
    return _pipeline(task, pipeline, lambda noise: torch.from_numpy(noise).to(kind))


def optimum(task: Task) -> Draw:
    """optimum's pipeline on onnxruntime, on its own export; the decoder is the same TAESD."""
    import torch

    from cloud_server.torchvision_guard import guard

    guard()
    import onnxruntime
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    torch.set_num_threads(task.threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    pipeline = ORTStableDiffusionPipeline.from_pretrained(
        task.home / "optimum", provider="CPUExecutionProvider", session_options=options
    )
    return _pipeline(task, pipeline, torch.from_numpy)


def _pipeline(task: Task, pipeline: Any, tensor: Callable[[np.ndarray], Any]) -> Draw:
    pipeline.set_progress_bar_config(disable=True)
    channels = json.loads((task.home / "model" / "unet" / "config.json").read_text())["in_channels"]

    def draw(seed: int, steps: int) -> np.ndarray:
        (image,) = pipeline(
            PROMPT,
            latents=tensor(task.noise(seed, channels)),
            width=task.defaults["width"],
            height=task.defaults["height"],
            num_inference_steps=steps,
            guidance_scale=task.defaults["guidance"],
        ).images
        return np.asarray(image)

    return draw


def openvino(task: Task) -> Draw:
    """OpenVINO itself, as FastSD CPU uses it: static shapes, its own choice of precision."""
    import openvino as ov

    from edge_agent.bundle import open_bundle
    from edge_agent.diffusion.samplers import make_sampler
    from edge_agent.routing.encoder import Tokenizer

    core = ov.Core()
    guided = task.defaults["guidance"] > 1
    rows, cells = 2 if guided else 1, task.noise(0).shape[1:]
    config = json.loads((task.home / "model" / "text_encoder" / "config.json").read_text())
    tokens, width = config["max_position_embeddings"], config["hidden_size"]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "text_encoder": {"input_ids": (rows, tokens)},
        "unet": {"sample": (rows, *cells), "encoder_hidden_states": (rows, tokens, width)},
        "vae_decoder": {"latent_sample": (1, *cells)},
    }
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": task.threads}

    def compiled(name: str) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
        model = core.read_model(task.home / "optimum" / name / "model.onnx")
        model.reshape(shapes[name])
        request = core.compile_model(model, "CPU", hints).create_infer_request()
        return lambda feeds: np.array(request.infer(dict(feeds))[0])

    text_encoder, unet, vae_decoder = map(compiled, shapes)
    bundle = open_bundle(task.home / "bundle", verify=False)
    files = bundle.tokenizers[bundle.diffusion.text_encoders[0]]
    tokenizer = Tokenizer(bundle.path / files.file, files.context_length, files.pad_id)
    scheduler = json.loads(
        (task.home / "model" / "scheduler" / "scheduler_config.json").read_text()
    )

    def draw(seed: int, steps: int) -> np.ndarray:
        prompts = ["", PROMPT] if guided else [PROMPT]
        ids = np.concatenate([tokenizer.encode(each).input_ids for each in prompts])
        states = text_encoder({"input_ids": ids})
        sampler = make_sampler(scheduler, steps)
        latents = task.noise(seed) * np.float32(sampler.initial_scale)
        for index, timestep in enumerate(sampler.timesteps):
            feeds = {
                "sample": np.repeat(sampler.scale_input(latents, index), rows, axis=0),
                "timestep": np.asarray(timestep, np.float32),
                "encoder_hidden_states": states,
            }
            told = unet(feeds)
            if guided:
                told = told[:1] + task.defaults["guidance"] * (told[1:] - told[:1])
            latents = sampler.step(told, latents, index, lambda: task.noise(seed + 1))
        (sample,) = vae_decoder({"latent_sample": latents})
        pixels = (np.clip(sample.transpose(1, 2, 0), -1, 1) + 1) * 127.5
        return np.asarray(pixels.round().astype(np.uint8))

    return draw


def stable_diffusion_cpp(task: Task) -> Draw:
    """stable-diffusion.cpp, where it is installed; it takes no noise from outside."""
    from stable_diffusion_cpp import StableDiffusion

    model = task.home / "model"
    pipeline = StableDiffusion(
        model_path=str(model),
        taesd_path=str(model / "vae" / "diffusion_pytorch_model.safetensors"),
        n_threads=task.threads,
        diffusion_flash_attn=True,  # a tenth quicker at SD-Turbo size than without
    )

    def draw(seed: int, steps: int) -> np.ndarray:
        (image,) = pipeline.generate_image(
            prompt=PROMPT,
            seed=seed,
            width=task.defaults["width"],
            height=task.defaults["height"],
            sample_steps=steps,
            cfg_scale=max(task.defaults["guidance"], 1.0),
        )
        return np.asarray(image.convert("RGB"))

    return draw


def text_in_torch(task: Task) -> Draw:
    """A text tower in PyTorch, fp32; what it returns are no pixels but states."""
    import torch

    from cloud_server.torchvision_guard import guard

    guard()
    from transformers import CLIPTextModel

    torch.set_num_threads(task.threads)
    model = CLIPTextModel.from_pretrained(task.home / "model").eval()

    @torch.inference_mode()
    def encode(seed: int, steps: int) -> np.ndarray:
        return model(torch.from_numpy(_tokens(model.config.eos_token_id))).last_hidden_state.numpy()

    return encode


def text_int8(task: Task) -> Draw:
    """The same text tower with 8-bit weights in onnxruntime, as the device runs it."""
    from edge_agent.runtime.session import Session

    session = Session(task.home / "text" / "int8.onnx", threads=task.threads)
    end = json.loads((task.home / "model" / "config.json").read_text())["eos_token_id"]
    return lambda seed, steps: session.run({"input_ids": _tokens(end)})[0]


def _tokens(end: int) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, end - 1, (1, 77))
    ids[0, -1] = end
    return ids


def open_contender(name: str, task: Task) -> Contender:
    """Open one by name; "ours" takes settings, as in "ours provider=openvino memory=low"."""
    kind, *words = name.split()
    if kind == "ours":
        return ours(task, **dict(word.split("=", 1) for word in words))
    draw = {
        "diffusers-fp32": lambda: diffusers(task, "float32"),
        "diffusers-bf16": lambda: diffusers(task, "bfloat16"),
        "optimum": lambda: optimum(task),
        "openvino": lambda: openvino(task),
        "stable-diffusion.cpp": lambda: stable_diffusion_cpp(task),
        "torch-fp32": lambda: text_in_torch(task),
        "onnxruntime-int8": lambda: text_int8(task),
    }[kind]()
    return Contender(draw)
