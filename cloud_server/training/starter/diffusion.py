"""The two starter diffusion models: one UNet family, small for the edge, larger for the cloud.

Both learn v-prediction on the latents of the same frozen autoencoder and are conditioned on the
token states of the same frozen CLIP text encoder, the one that feeds the router. Then the edge
model learns to reach in four steps what takes many (`distil`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cloud_server.torchvision_guard import guard
from cloud_server.training.digest import folder_digest
from cloud_server.training.loop import Budget, Prefetch, fit
from cloud_server.training.precision import autocast
from cloud_server.training.starter.autoencoder import LATENT_CHANNELS, save_grid, to_tensor
from cloud_server.training.starter.clip_model import to_transformers
from cloud_server.training.starter.scenes import batch_at, sample_scene
from cloud_server.training.starter.tokenizer import encode
from cloud_server.training.weights import save_weights

guard()
from diffusers import (  # noqa: E402  the guard must come first
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0  # noqa: E402
from transformers import CLIPTokenizer, CLIPTokenizerFast  # noqa: E402

BATCH = {"cpu": 32, "cuda": 1024}
SCENES = {"cpu": 32_768, "cuda": 196_608}
EMA = {"cpu": 0.9985, "cuda": 0.996}  # fewer and larger steps there
RATE = 3e-3  # ahead of 1e-3 in five minutes from nothing with AdamW, one seed
RATE_ONWARD = 4e-4  # from a trained model on, in the smaller batches of a CPU; a guess
CAPTIONLESS = 0.1  # share of examples with the empty caption, for classifier-free guidance
LEVEL_MEAN, LEVEL_STD = 0.8, 1.1  # of log(noise / signal) in training
NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,  # unused by "trailing"; pipelines warn without it
}
SAMPLE_PROMPTS = (
    "a dog on grass",
    "a red car on the beach",
    "a castle at night",
    "a blue fish",
    "two apples on a white background",
    "a cat to the left of a pizza",
    "three green trees",
    "a rocket above a house at night",
    "a castle and three trees under a blue sky",
    "a small bird, a star and a rabbit in the snow",
    "two red apples to the left of a cat and a house at night",
    "an elephant, a fish, a robot, a moon and a tent on the beach",
)


@dataclass(frozen=True, slots=True)
class Size:
    """What makes a model edge or cloud: UNet channels per level, and how it draws."""

    channels: tuple[int, int]
    fine_attention: bool
    """Whether it attends to the caption at 16x16 too, and not at 8x8 alone."""
    steps: int
    guidance: float
    emphasis: tuple[float, ...]
    """How much more often than they come up scenes of one to five objects are learnt from."""


SIZES = {
    # Attention at 16x16 about doubles the time of a training step on a CPU.
    "edge": Size((72, 144), False, 8, 3.0, emphasis=(2.0, 1.0, 1.0, 1.0, 1.0)),
    "cloud": Size((144, 288), True, 16, 3.0, emphasis=(0.6, 0.8, 1.5, 1.5, 1.5)),
}
DISTILLED_STEPS = 4
EDGE_DRAWS = replace(SIZES["edge"], steps=DISTILLED_STEPS, guidance=1.0)
TEACHER_STEPS = 3  # for one of these
# On a CPU a step of the cloud model takes about three times as long as one of the edge model.
TEACHER = {"cpu": "edge", "cuda": "cloud"}
DISTIL_BATCH = {"cpu": 8, "cuda": 256}


def build_unet(size: Size, text_width: int) -> UNet2DConditionModel:
    """Return an untrained UNet on 16x16 latents: 5 M parameters for the edge, 22 M for the cloud.

    The caption also joins the time embedding, pooled, and scales and shifts features; what that
    gains was not measured.
    """
    fine = "CrossAttn" if size.fine_attention else ""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(f"{fine}DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", f"{fine}UpBlock2D"),
        block_out_channels=size.channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # in this class the number of heads
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )
    nn.init.zeros_(unet.add_embedding.norm2.weight)  # the pooled caption starts without a say
    return unet.to(memory_format=torch.channels_last)


def open_unet(folder: Path) -> UNet2DConditionModel:
    """Return a trained UNet in single precision, as training takes it."""
    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    return unet.to(memory_format=torch.channels_last)


def hidden_weights(unet: UNet2DConditionModel) -> list[Tensor]:
    """Return the weights that Muon learns: all but the first and last layers and the embeddings."""
    return [
        module.weight
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and name not in ("conv_in", "conv_out")
        and "embedding" not in name
    ]


def scheduler() -> DPMSolverMultistepScheduler:
    """Return the noise schedule of training, with the solver both models draw with."""
    return DPMSolverMultistepScheduler(**NOISE, solver_order=2)


def few_steps() -> DDIMScheduler:
    """Return the noise schedule with the few steps that the distilled model takes."""
    schedule = DDIMScheduler(**NOISE, clip_sample=False)
    schedule.set_timesteps(DISTILLED_STEPS)
    return schedule


def train_diffusion(
    name: str,
    starter: Path,
    work: Path,
    budget: Budget,
    seed: int,
    device: str,
    start: Path | None = None,
) -> None:
    """Train the `edge` or `cloud` model, from `start`'s weights on if given, and save it.

    As diffusers folders: the cloud model goes to `starter/cloud`, the edge model, which `distil`
    goes on with, to `work/edge`. Needs the stages clip and, without `start`, autoencoder. A sheet
    of samples goes to `work/<name>.png`.
    """
    torch.manual_seed(seed)
    size = SIZES[name]
    parts = Parts(starter, start / "vae" if start else work / "autoencoder", device)
    latents, captions, objects = cached_latents(parts.vae, work, seed, device)
    latents = latents.to(device)
    weights = torch.tensor(size.emphasis)[torch.from_numpy(objects) - 1].to(device)
    token_ids, captionless = parts.tokens(captions), parts.tokens([""])
    schedule = scheduler()
    alphas = schedule.alphas_cumprod.to(device)
    noise_levels = (0.5 * (1 / alphas - 1).log()).contiguous()  # rising
    if start:
        unet = open_unet(start / "unet")
    else:
        unet = build_unet(size, parts.text_encoder.config.hidden_size)
    kind = torch.device(device).type
    forward = quick(unet, kind)
    batch = BATCH[kind]

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        chosen = torch.multinomial(weights, batch, replacement=True, generator=rng)
        clean = latents[chosen].float()  # (B, 16, 16, 16)
        noise = torch.randn(clean.shape, generator=rng, device=device)
        # Normal in log noise, as Esser et al. 2024, section 3.1; mean and spread are our guess.
        levels = LEVEL_MEAN + LEVEL_STD * torch.randn(batch, generator=rng, device=device)
        times = torch.searchsorted(noise_levels, levels).clamp(max=len(noise_levels) - 1)
        ids = token_ids[chosen]
        ids[torch.rand(batch, generator=rng, device=device) < CAPTIONLESS] = captionless[0]
        kept = alphas[times].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        predicted = forward(noisy, times, parts.states(ids))
        loss = F.mse_loss(predicted, velocity)
        return loss, {"loss": loss.item()}

    out = work / name if name == "edge" else starter / name

    def save(ready: UNet2DConditionModel) -> None:
        save_model(parts.pipeline(ready, schedule), size, out, work / f"{name}.png")

    fit(
        name,
        unet,
        loss_fn,
        lr=RATE_ONWARD if start else RATE,
        budget=budget,
        work=work,
        device=device,
        ema=EMA[kind],
        hidden=hidden_weights(unet),
        on_checkpoint=save,
        about={"seed": seed, "start": folder_digest(start / "unet")[:12] if start else "none"},
    )


def distil(starter: Path, work: Path, budget: Budget, seed: int, device: str) -> None:
    """Make the edge model draw in four steps, without guidance, what a teacher draws in many.

    The teacher is the cloud model on a GPU; on a CPU it is the edge model itself, with guidance.

    As progressive distillation with guidance (Salimans and Ho 2022; Meng et al. 2023), but in one
    go and without pictures: from noise on, every step of the student is to land where the guided
    teacher does. Half of a batch goes on from where the student itself has landed, so that it also
    learns to make good its own errors.

    Needs the stages edge and cloud; writes `starter/edge`, and samples go to `work/distil.png`.
    """
    torch.manual_seed(seed)
    kind = torch.device(device).type
    parts = Parts(starter, work / "autoencoder", device)
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(SCENES["cpu"])]
    objects = torch.tensor([scene.objects for scene in scenes])
    weights = torch.tensor(SIZES["edge"].emphasis)[objects - 1].to(device)
    token_ids = parts.tokens([scene.caption for scene in scenes])
    captionless = parts.states(parts.tokens([""]))
    guidance = SIZES[TEACHER[kind]].guidance
    schedule = few_steps()
    stops = [*schedule.timesteps.tolist(), -1]  # -1 is the clean picture
    alphas = torch.cat([schedule.alphas_cumprod, torch.ones(1)]).to(device)
    folders = {"edge": work / "edge", "cloud": starter / "cloud"}
    student, teacher = (open_unet(folders[name] / "unet") for name in ("edge", TEACHER[kind]))
    batch = DISTIL_BATCH[kind]
    follow = quick(teacher.to(device).eval(), kind)
    forward = quick(student, kind)

    @torch.no_grad()
    def taught(latents: Tensor, states: Tensor, start: int, stop: int) -> Tensor:
        both = torch.cat([captionless.expand_as(states), states])
        times = [round(start + (stop - start) * i / TEACHER_STEPS) for i in range(TEACHER_STEPS)]
        for time, later in zip(times, [*times[1:], stop], strict=True):
            at = torch.full((2 * batch,), time, device=device)
            without, with_caption = follow(latents.repeat(2, 1, 1, 1), at, both).chunk(2)
            velocity = without + guidance * (with_caption - without)
            latents, _ = ddim_step(latents, velocity, alphas[time], alphas[later])
        return latents

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        chosen = torch.multinomial(weights, batch, replacement=True, generator=rng)
        states = parts.states(token_ids[chosen])
        latents = torch.randn((batch, LATENT_CHANNELS, 16, 16), generator=rng, device=device)
        losses = []
        for start, stop in pairwise(stops):
            wanted = taught(latents, states, start, stop)
            at = torch.full((batch,), start, device=device)
            velocity = forward(latents, at, states)
            reached, gain = ddim_step(latents, velocity, alphas[start], alphas[stop])
            losses.append(F.mse_loss(reached, wanted) / gain.square())
            latents = torch.cat([wanted[: batch // 2], reached[batch // 2 :].detach()])
        loss = torch.stack(losses).mean()
        return loss, {"loss": loss.item(), "last": losses[-1].item()}

    def save(ready: UNet2DConditionModel) -> None:
        pipeline = parts.pipeline(ready, schedule)
        save_model(pipeline, EDGE_DRAWS, starter / "edge", work / "distil.png")

    fit(
        "distil", student, loss_fn, lr=1e-3, budget=budget, work=work, device=device,
        ema=0.998, warmup=50, hidden=hidden_weights(student), on_checkpoint=save,
        about={"seed": seed},
    )  # fmt: skip


def ddim_step(
    latents: Tensor, velocity: Tensor, kept: Tensor, later: Tensor
) -> tuple[Tensor, Tensor]:
    """Return where a DDIM step from signal power `kept` to `later` leads, and its d/d velocity."""
    a, s, a_next, s_next = kept.sqrt(), (1 - kept).sqrt(), later.sqrt(), (1 - later).sqrt()
    clean, noise = a * latents - s * velocity, s * latents + a * velocity
    return a_next * clean + s_next * noise, s_next * a - a_next * s


def quick(unet: UNet2DConditionModel, kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the UNet's prediction as a function, in mixed precision and compiled on a GPU."""
    # Plain attention is quicker than fused attention at 64 tokens on a CPU.
    unet.set_attn_processor(AttnProcessor2_0() if kind == "cuda" else AttnProcessor())
    run = torch.compile(unet, dynamic=False) if kind == "cuda" else unet

    def forward(latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last)
        with autocast(kind):
            predicted: Tensor = run(latents, times, states, return_dict=False)[0]
        return predicted.float()

    return forward


class Parts:
    """What the diffusion models share: autoencoder, text encoder, tokenizer."""

    def __init__(self, starter: Path, vae: Path, device: str) -> None:
        self.vae = AutoencoderTiny.from_pretrained(vae, torch_dtype=torch.float32)
        self.text_encoder = to_transformers(starter / "clip").to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(starter / "clip")
        self.quick_tokenizer = CLIPTokenizerFast.from_pretrained(starter / "clip")
        self.device = device
        self.vae.to(device).eval()

    def tokens(self, prompts: list[str]) -> Tensor:
        """Return token ids (B, n)."""
        return encode(self.quick_tokenizer, prompts).to(self.device)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """Return the token states (B, n, d)."""
        with autocast(tokens.device):
            states: Tensor = self.text_encoder(tokens).last_hidden_state
        return states

    def pipeline(
        self, unet: UNet2DConditionModel, schedule: DPMSolverMultistepScheduler | DDIMScheduler
    ) -> StableDiffusionPipeline:
        """Return the parts with a UNet as a pipeline."""
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=schedule,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def save_model(
    pipeline: StableDiffusionPipeline, size: Size, folder: Path, sheet: Path, seed: int = 0
) -> None:
    """Write a sheet of samples, then the model in half precision."""
    save_grid(sample(pipeline, size, SAMPLE_PROMPTS, seed), sheet, 4)
    save_pipeline(pipeline, folder, size)


def sample(
    pipeline: StableDiffusionPipeline, size: Size, prompts: tuple[str, ...], seed: int
) -> Tensor:
    """Draw one picture a prompt with a seed each; (N, 3, 128, 128) in [-1, 1]."""
    device = pipeline.unet.device
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(len(prompts))]
    pictures = pipeline(
        list(prompts),
        num_inference_steps=size.steps,
        guidance_scale=size.guidance,
        generator=generators,
        output_type="np",
    ).images
    return to_tensor((pictures * 255).round().astype(np.uint8))


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path, size: Size) -> None:
    """Write the pipeline in half precision, with the settings it draws with, replacing `folder`."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    defaults = {"width": 128, "height": 128, "steps": size.steps, "guidance": size.guidance}
    (partial / "defaults.json").write_text(json.dumps(defaults) + "\n")
    _halve_weights(partial)
    for part in ("vae", "unet"):
        _forget_origin(partial / part / "config.json")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _forget_origin(config: Path) -> None:
    """Drop the path of the machine it was trained on, which diffusers writes into a config."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _halve_weights(folder: Path) -> None:
    from safetensors.torch import load_file

    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        halved = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_weights(halved, file, metadata={"format": "pt"})


@torch.inference_mode()
def cached_latents(
    vae: AutoencoderTiny, work: Path, seed: int, device: str
) -> tuple[Tensor, list[str], np.ndarray]:
    """Return latents (N, 16, 16, 16) of unit variance, captions and objects (N,) of many scenes.

    They are drawn and encoded once for an autoencoder and a seed, and kept in `work`.
    """
    kind = torch.device(device).type
    weights = b"".join(t.cpu().numpy().tobytes() for t in vae.state_dict().values())
    name = f"latents-{hashlib.sha256(weights).hexdigest()[:12]}-{seed}-{SCENES[kind]}"
    file = work / f"{name}.npz"
    if not file.exists():
        latents, captions, objects = [], [], []

        def make(step: int) -> tuple[Tensor, list[str], list[int]]:
            pictures, texts, scenes = batch_at(seed, step, 64)
            return torch.from_numpy(pictures), texts, [scene.objects for scene in scenes]

        data = Prefetch(make, device)
        for step in tqdm(range(SCENES[kind] // 64), desc="latents", mininterval=2.0):
            pictures, texts, counts = data(step)
            with autocast(kind):
                encoded = vae.encoder(to_tensor(pictures, device))
            latents.append((encoded.float() * vae.config.scaling_factor).half().cpu().numpy())
            captions += texts
            objects += counts
        partial = file.with_name(f"{name}.partial.npz")
        np.savez(partial, latents=np.concatenate(latents), captions=captions, objects=objects)
        os.replace(partial, file)
    kept = np.load(file)
    return torch.from_numpy(kept["latents"]), kept["captions"].tolist(), kept["objects"]
