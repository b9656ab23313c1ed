"""Tiny random pipelines of every family, saved by diffusers in the layout of the real ones.

Classes and configuration keys are those of the checkpoints that each is named after; channels and
layers are few. Text encoders are `tests.tiny`'s, so that `tiny.make_router` goes with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import tiny
from tests.tiny import guard

guard()
import diffusers  # noqa: E402  the guard must come first
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # noqa: E402

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENTS = 8  # a side
WIDTH = 32
SECOND_WIDTH, PROJECTION = 48, 40
LAST_PAD = tiny.EOS  # Stable Diffusion 1 and the first encoder of XL; others pad with "!"


def unet(seed: int = 0, **changes: Any) -> diffusers.UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": LATENTS,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
    }
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(**{**settings, **changes}).eval()


def kl_vae(**changes: Any) -> diffusers.AutoencoderKL:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 8 * LATENTS,
    }
    return diffusers.AutoencoderKL(**{**settings, **changes})


def tiny_vae(**changes: Any) -> diffusers.AutoencoderTiny:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "num_encoder_blocks": (0, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 0),
    }
    return diffusers.AutoencoderTiny(**{**settings, **changes})


def tokenizer(folder: Path, pad: str) -> Any:
    """Write a tokenizer that pads as the model that is imitated does."""
    made = tiny.make_tokenizer(folder)
    made.pad_token = pad
    return made


def second_encoder(vocabulary: int, seed: int = 5, **changes: Any) -> CLIPTextModelWithProjection:
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": SECOND_WIDTH,
        "intermediate_size": 2 * SECOND_WIDTH,
        "projection_dim": PROJECTION,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "max_position_embeddings": tiny.CONTEXT,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(CLIPTextConfig(**{**settings, **changes})).eval()


def penultimate_encoder(vocabulary: int) -> CLIPTextModel:
    """Stable Diffusion 2's: saved without its last layer, so that the end is the layer before."""
    encoder = tiny.make_text_encoder(vocabulary, seed=0)
    encoder.config.hidden_act = "gelu"
    return CLIPTextModel(encoder.config).eval()


def stable_diffusion(
    folder: Path, *, pad: str = LAST_PAD, kind: str = "StableDiffusionPipeline", **parts: Any
) -> Path:
    words = tokenizer(folder / "tokenizer", pad)
    parts = {"text_encoder": tiny.make_text_encoder(len(words), seed=0), "vae": kl_vae()} | parts
    pipeline = getattr(diffusers, kind)(
        tokenizer=words,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    pipeline.save_pretrained(folder)
    return folder


def stable_diffusion_1(folder: Path) -> Path:
    scheduler = diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    stable_diffusion(folder, unet=unet(), scheduler=scheduler)
    file = folder / "vae" / "config.json"  # which was saved before diffusers knew the factor
    config = json.loads(file.read_text())
    del config["scaling_factor"], config["shift_factor"]
    file.write_text(json.dumps(config))
    return folder


def stable_diffusion_2(folder: Path) -> Path:
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    words = tiny.make_tokenizer(folder / "tokenizer")
    network = unet(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True)
    encoder = penultimate_encoder(len(words))
    return stable_diffusion(
        folder, pad="!", unet=network, scheduler=scheduler, text_encoder=encoder
    )


def bk_sdm(folder: Path) -> Path:
    scheduler = diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    return stable_diffusion(folder, unet=unet(mid_block_type=None), scheduler=scheduler)


def sd_turbo(folder: Path) -> Path:
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS, timestep_spacing="trailing", steps_offset=1
    )
    network = unet(attention_head_dim=(2, 4), use_linear_projection=True)
    return stable_diffusion(folder, pad="!", unet=network, scheduler=scheduler)


def sdxs(folder: Path) -> Path:
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS, timestep_spacing="trailing", steps_offset=1
    )
    network = unet(mid_block_type=None, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                   up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    return stable_diffusion(folder, unet=network, vae=tiny_vae(), scheduler=scheduler)


def lcm(folder: Path) -> Path:
    scheduler = diffusers.LCMScheduler(**BETAS, clip_sample=False, steps_offset=1)
    return stable_diffusion(
        folder,
        kind="LatentConsistencyModelPipeline",
        unet=unet(time_cond_proj_dim=16),
        scheduler=scheduler,
    )


def xl_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    settings: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": WIDTH + SECOND_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + PROJECTION,
    }
    return unet(**{**settings, **changes})


def xl(folder: Path, network: Any, scheduler: Any, **settings: Any) -> Path:
    words = tokenizer(folder / "tokenizer", LAST_PAD)
    more_words = tokenizer(folder / "tokenizer_2", "!")
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=kl_vae(scaling_factor=0.13025),
        text_encoder=tiny.make_text_encoder(len(words), seed=0),
        text_encoder_2=second_encoder(len(more_words)),
        tokenizer=words,
        tokenizer_2=more_words,
        unet=network,
        scheduler=scheduler,
        **settings,
    )
    pipeline.save_pretrained(folder)
    return folder


def xl_euler() -> Any:
    return diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)


def sdxl(folder: Path) -> Path:
    return xl(folder, xl_unet(), xl_euler())


def sdxl_turbo(folder: Path) -> Path:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        **BETAS, timestep_spacing="trailing", steps_offset=1
    )
    return xl(folder, xl_unet(), scheduler)


def ssd_1b(folder: Path) -> Path:
    network = xl_unet(
        layers_per_block=2,
        transformer_layers_per_block=(1, (2, 1)),
        reverse_transformer_layers_per_block=((1, 1, 2), 1),
    )
    return xl(folder, network, xl_euler(), force_zeros_for_empty_prompt=True)


def vega(folder: Path) -> Path:
    network = xl_unet(mid_block_type=None, transformer_layers_per_block=(1, 1))
    return xl(folder, network, xl_euler(), force_zeros_for_empty_prompt=False)


def lcm_sdxl(folder: Path) -> Path:
    scheduler = diffusers.LCMScheduler(**BETAS, clip_sample=False)
    return xl(folder, xl_unet(time_cond_proj_dim=16), scheduler)


def sd3(folder: Path) -> Path:
    words = tokenizer(folder / "tokenizer", LAST_PAD)
    more_words = tokenizer(folder / "tokenizer_2", "!")
    first = second_encoder(
        len(words), 6, hidden_size=WIDTH, projection_dim=24, hidden_act="quick_gelu"
    )
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENTS,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=96,
        pooled_projection_dim=24 + PROJECTION,
        pos_embed_max_size=6,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    ).eval()
    vae = kl_vae(latent_channels=8, scaling_factor=1.5305, shift_factor=0.0609,
                 use_quant_conv=False, use_post_quant_conv=False)  # fmt: skip
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=first,
        text_encoder_2=second_encoder(len(more_words)),
        text_encoder_3=None,
        tokenizer=words,
        tokenizer_2=more_words,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "Stable Diffusion 1.5": stable_diffusion_1,
    "Stable Diffusion 2.1": stable_diffusion_2,
    "BK-SDM": bk_sdm,
    "SD-Turbo": sd_turbo,
    "SDXS": sdxs,
    "LCM": lcm,
    "SDXL": sdxl,
    "SDXL-Turbo": sdxl_turbo,
    "SSD-1B": ssd_1b,
    "Vega": vega,
    "LCM-SDXL": lcm_sdxl,
    "Stable Diffusion 3": sd3,
}
# What the device cannot see in a folder, and `python -m export` is told.
SETTINGS: dict[str, dict[str, Any]] = {"SDXS": {"steps": 1, "guidance": 0.0}}


def make_lora(model: Path, folder: Path, seed: int) -> Path:
    """Write random LoRA weights for the attention of a pipeline's UNet and first text encoder."""
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
    rng = torch.Generator().manual_seed(seed)
    states = {}
    for name, network, targets in (
        ("unet_lora_layers", pipeline.unet, ["to_q", "to_v", "to_out.0"]),
        ("text_encoder_lora_layers", pipeline.text_encoder, ["q_proj", "v_proj"]),
    ):
        network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        state = get_peft_model_state_dict(network)
        # Larger ones drive the network to where rounding alone makes another picture.
        states[name] = {k: 0.3 * torch.randn(v.shape, generator=rng) for k, v in state.items()}
    pipeline.save_lora_weights(folder, **states)
    return folder
