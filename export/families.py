"""The families of diffusers pipelines that the device can draw with, and what sets them apart.

Everything that is said here about classes and defaults is diffusers' own; what networks are fed is
in `export.denoisers`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Encoder:
    """A text encoder's folder in the pipeline, its tokenizer's, and the class it may have."""

    folder: str
    tokenizer: str
    kind: str


@dataclass(frozen=True, slots=True)
class Family:
    """What pipelines of one family have in common.

    `text_states` are those that the denoiser reads: of the last layer, or of the one before.
    `empty_is_zeros` (an empty negative prompt stands for zeros), `steps` and `guidance` hold where
    the model's folder says nothing else.
    """

    name: str
    denoiser: str
    denoiser_class: str
    encoders: tuple[Encoder, ...]
    text_states: str
    empty_is_zeros: bool
    steps: int
    guidance: float

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Return the classes that each part of model_index.json may have."""
        parts = {self.denoiser: (self.denoiser_class,), "vae": VAES}
        for encoder in self.encoders:
            parts[encoder.folder] = (encoder.kind,)
            parts[encoder.tokenizer] = TOKENIZERS
        return parts


VAES = ("AutoencoderKL", "AutoencoderTiny")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")

STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    encoders=(Encoder("text_encoder", "tokenizer", "CLIPTextModel"),),
    text_states="hidden",
    empty_is_zeros=False,
    steps=20,
    guidance=7.5,
)
STABLE_DIFFUSION_XL = Family(
    name="stable-diffusion-xl",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    encoders=(
        Encoder("text_encoder", "tokenizer", "CLIPTextModel"),
        Encoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection"),
    ),
    text_states="penultimate",
    empty_is_zeros=True,
    steps=20,
    guidance=5.0,
)
# Drawn without its third text encoder, T5, as diffusers does with text_encoder_3=None: that one
# alone has more weights than the largest of all models here.
STABLE_DIFFUSION_3 = Family(
    name="stable-diffusion-3",
    denoiser="transformer",
    denoiser_class="SD3Transformer2DModel",
    encoders=(
        Encoder("text_encoder", "tokenizer", "CLIPTextModelWithProjection"),
        Encoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection"),
    ),
    text_states="penultimate",
    empty_is_zeros=False,
    steps=28,
    guidance=7.0,
)
FAMILIES = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "LatentConsistencyModelPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
}
