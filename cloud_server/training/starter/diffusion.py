"""The two starter diffusion models: one UNet family, small for the edge, larger for the cloud.

Both learn v-prediction on the latents of the same frozen autoencoder and are conditioned on the
token states of the same frozen CLIP text encoder, the one that feeds the router.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cloud_server.torchvision_guard import guard
from cloud_server.training.loop import Budget, fit
from cloud_server.training.starter.autoencoder import LATENT_CHANNELS, save_grid, to_tensor
from cloud_server.training.starter.clip import to_transformers
from cloud_server.training.starter.scenes import batch_at

guard()
from diffusers import (  # noqa: E402  the guard must come first
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor  # noqa: E402
from transformers import CLIPTokenizer  # noqa: E402

BATCH = 32
SCENES = 32_768
CAPTIONLESS = 0.1  # share of examples with the empty caption, for classifier-free guidance
LEVEL_MEAN, LEVEL_STD = 0.8, 1.1  # of log(noise / signal) in training
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
    steps: int
    guidance: float
    emphasis: tuple[float, ...]
    """How much more often than they come up scenes of one to five objects are learnt from."""


SIZES = {
    # So small a model spends its training where it can succeed, the large one where it is asked.
    "edge": Size((48, 96), 8, 3.0, emphasis=(5.0, 2.0, 1.0, 0.5, 0.5)),
    "cloud": Size((96, 192), 12, 3.0, emphasis=(0.6, 0.8, 1.5, 1.5, 1.5)),
}


def build_unet(size: Size, text_width: int) -> UNet2DConditionModel:
    """Return an untrained UNet on 16x16 latents with attention at the 8x8 level only.

    Attention at 16x16 about doubles the time of a training step on a CPU. The caption also joins
    the time embedding, pooled, and scales and shifts features; what that gains was not measured.
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=size.channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # in this class the number of heads
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )
    nn.init.zeros_(unet.add_embedding.norm2.weight)  # the pooled caption starts without a say
    unet.set_attn_processor(AttnProcessor())  # quicker than fused attention at 64 tokens
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
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,  # unused by "trailing"; pipelines warn without it
        solver_order=2,
    )


def train_diffusion(
    name: str, starter: Path, work: Path, budget: Budget, seed: int, device: str
) -> None:
    """Train the `edge` or `cloud` model and save it as a diffusers folder `starter/<name>`.

    Needs the stages clip and autoencoder. A sheet of samples goes to `work/<name>.png`.
    """
    torch.manual_seed(seed)
    size = SIZES[name]
    vae = AutoencoderTiny.from_pretrained(work / "autoencoder", torch_dtype=torch.float32).eval()
    text_encoder = to_transformers(starter / "clip").to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(starter / "clip")
    latents, captions, objects = cached_latents(vae, work, SCENES, seed, device)
    weights = torch.tensor(size.emphasis)[torch.from_numpy(objects) - 1]
    token_ids = _tokens(tokenizer, captions)
    captionless = _tokens(tokenizer, [""])
    schedule = scheduler()
    alphas = schedule.alphas_cumprod.to(device)
    noise_levels = (0.5 * (1 / schedule.alphas_cumprod - 1).log()).contiguous()  # rising
    unet = build_unet(size, text_encoder.config.hidden_size)
    kind = torch.device(device).type

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.multinomial(weights, BATCH, replacement=True, generator=rng)
        clean = torch.from_numpy(latents[chosen.numpy()]).float()  # (B, 8, 16, 16)
        noise = torch.randn(clean.shape, generator=rng)
        # Normal in log noise, as Esser et al. 2024, section 3.1; mean and spread are our guess.
        levels = LEVEL_MEAN + LEVEL_STD * torch.randn(BATCH, generator=rng)
        times = torch.searchsorted(noise_levels, levels).clamp(max=len(noise_levels) - 1)
        ids = token_ids[chosen]
        ids[torch.rand(BATCH, generator=rng) < CAPTIONLESS] = captionless[0]
        clean, noise, times, ids = (x.to(device) for x in (clean, noise, times, ids))
        kept = alphas[times].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16):
            states = text_encoder(ids).last_hidden_state  # (B, 32, 192)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(kind, dtype=torch.bfloat16):
            predicted = unet(noisy, times, states).sample.float()
        loss = F.mse_loss(predicted, velocity)
        return loss, {"loss": loss.item()}

    def save(ready: UNet2DConditionModel) -> None:
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=ready,
            scheduler=schedule,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        save_grid(sample(pipeline, size, SAMPLE_PROMPTS, seed), work / f"{name}.png", 4)
        save_pipeline(pipeline, starter / name, size)

    fit(
        name,
        unet,
        loss_fn,
        lr=3e-3,  # ahead of 1e-3 in five minutes from nothing with AdamW, one seed
        budget=budget,
        work=work,
        device=device,
        ema=0.9985,
        hidden=hidden_weights(unet),
        on_checkpoint=save,
    )


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
    _forget_origin(partial / "vae" / "config.json")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _forget_origin(config: Path) -> None:
    """Drop the path of the machine it was trained on, which diffusers writes into a config."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _halve_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        halved = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_file(halved, file, metadata={"format": "pt"})


@torch.inference_mode()
def cached_latents(
    vae: AutoencoderTiny, work: Path, count: int, seed: int, device: str
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return latents (N, 8, 16, 16) of unit variance, captions and objects (N,) of `count` scenes.

    They are drawn and encoded once for an autoencoder and a seed, and kept in `work`.
    """
    weights = b"".join(t.cpu().numpy().tobytes() for t in vae.state_dict().values())
    file = work / f"latents-{hashlib.sha256(weights).hexdigest()[:12]}-{seed}.npz"
    if not file.exists():
        vae.to(device)
        latents, captions, objects = [], [], []
        for i in tqdm(range(count // 64), desc="latents", mininterval=2.0):
            pictures, texts, scenes = batch_at(seed, i, 64)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                encoded = vae.encoder(to_tensor(pictures).to(device))
            latents.append((encoded.float() * vae.config.scaling_factor).half().cpu().numpy())
            captions += texts
            objects += [scene.objects for scene in scenes]
        partial = file.with_name("latents.partial.npz")
        np.savez(partial, latents=np.concatenate(latents), captions=captions, objects=objects)
        os.replace(partial, file)
    kept = np.load(file)
    return kept["latents"], kept["captions"].tolist(), kept["objects"]


def _tokens(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    encoded = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return encoded.input_ids
