"""From an encoded prompt to a picture on the device: guidance, sampling, decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_agent.bundle import DiffusionSpec
from edge_agent.diffusion.samplers import make_sampler, overridden, sampler_name
from edge_agent.errors import Cancelled, ConfigError, GenerationError
from edge_agent.routing.encoder import Encoded, TextEncoder
from edge_agent.runtime.session import Session
from edge_agent.types import Cancellation, OnEvent, Picture, Request, Step


@dataclass(frozen=True, slots=True)
class Plan:
    """A request with the edge model's defaults filled in."""

    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    scheduler: Mapping[str, Any]


class EdgeGenerator:
    """Draws with the edge model of a bundle; safe to call from several threads.

    `text_encoder` is the one that conditions the UNet. What it says to a negative prompt, most
    often the empty one, is kept.
    """

    def __init__(
        self,
        spec: DiffusionSpec,
        *,
        unet: Session,
        vae_decoder: Session,
        text_encoder: TextEncoder,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._spec = spec
        self._unet = unet
        self._vae_decoder = vae_decoder
        self._text_encoder = text_encoder
        self._clock = clock
        self._negative: tuple[str, np.ndarray] | None = None
        self._timestep_type = unet.inputs["timestep"]
        # optimum exports a scalar timestep, other exporters one per picture of the batch.
        self._timestep_rank = unet.input_ranks["timestep"]

    def plan(self, request: Request, seed: int) -> Plan:
        """Fill in the model's defaults; raise ConfigError for a size or sampler it cannot draw."""
        spec, scheduler = self._spec, self._spec.scheduler
        if request.sampler is not None:
            scheduler = overridden(scheduler, request.sampler)
        width = spec.width if request.width is None else request.width
        height = spec.height if request.height is None else request.height
        for name, size in (("width", width), ("height", height)):
            if size % spec.vae_scale:
                below = max(size // spec.vae_scale, 1) * spec.vae_scale
                raise ConfigError(
                    f"the {name} {size} is not a multiple of {spec.vae_scale}; "
                    f"choose for example {min(below, spec.max_size)}"
                )
            if not spec.vae_scale <= size <= spec.max_size:
                raise ConfigError(
                    f"the {name} {size} is over the limit of the edge model; "
                    f"choose {spec.vae_scale} to {spec.max_size}"
                )
        return Plan(
            seed=seed,
            width=width,
            height=height,
            steps=spec.steps if request.steps is None else request.steps,
            guidance=spec.guidance if request.guidance is None else request.guidance,
            scheduler=scheduler,
        )

    def generate(
        self,
        request: Request,
        encoded: Encoded | None,
        seed: int,
        on_event: OnEvent | None = None,
        cancellation: Cancellation | None = None,
    ) -> Picture:
        """Draw `request`; equal seed and settings give equal pixels.

        `encoded` is the prompt as this generator's text encoder saw it, or None to run it here.
        Raises ConfigError, GenerationError or Cancelled.
        """
        from PIL import Image

        plan = self.plan(request, seed)
        started = self._clock()
        hidden = (encoded or self._text_encoder.encode(request.prompt)).hidden
        if plan.guidance > 1:
            hidden = np.concatenate([self._negative_hidden(request.negative_prompt), hidden])
        conditioned = self._clock()
        # Numbers that run away are an error of ours below, not a warning of numpy's on stderr.
        with np.errstate(all="ignore"):
            latents = self._denoise(plan, hidden, on_event, cancellation)
        denoised = self._clock()
        pixels = self._decode(latents, cancellation)
        decoded = self._clock()
        return Picture(
            image=Image.fromarray(pixels),
            model=self._spec.model,
            seed=plan.seed,
            width=plan.width,
            height=plan.height,
            steps=plan.steps,
            guidance=plan.guidance,
            sampler=sampler_name(plan.scheduler),
            timings_ms={
                "condition": 1e3 * (conditioned - started),
                "denoise": 1e3 * (denoised - conditioned),
                "decode": 1e3 * (decoded - denoised),
            },
        )

    def _negative_hidden(self, prompt: str) -> np.ndarray:
        known = self._negative
        if known is None or known[0] != prompt:
            known = self._negative = (prompt, self._text_encoder.encode(prompt).hidden)
        return known[1]

    def _denoise(
        self,
        plan: Plan,
        hidden: np.ndarray,  # (B, n, d); B is 2 with guidance: negative first
        on_event: OnEvent | None,
        cancellation: Cancellation | None,
    ) -> np.ndarray:
        spec, sampler = self._spec, make_sampler(plan.scheduler, plan.steps)
        rows, columns = plan.height // spec.vae_scale, plan.width // spec.vae_scale
        # Philox's stream is fixed by numpy for good, so a seed means one picture everywhere.
        noise = np.random.Generator(np.random.Philox(plan.seed))
        shape = (1, spec.latent_channels, rows, columns)

        def draw() -> np.ndarray:
            return noise.standard_normal(shape, np.float32)

        latents = draw() * np.float32(sampler.initial_scale)
        batch, total = len(hidden), len(sampler.timesteps)
        for index, timestep in enumerate(sampler.timesteps):
            if cancellation is not None and cancellation.cancelled:
                raise Cancelled("stopped")
            scaled = sampler.scale_input(latents, index)
            feeds = {
                "sample": np.repeat(scaled, batch, axis=0),
                "timestep": self._timestep(float(timestep), batch),
                "encoder_hidden_states": hidden,
            }
            prediction = self._unet.run(self._cast(self._unet, feeds), cancellation)[0]
            prediction = prediction.astype(np.float32, copy=False)
            if batch == 2:
                prediction = prediction[:1] + plan.guidance * (prediction[1:] - prediction[:1])
            latents = sampler.step(prediction, latents, index, draw)
            if not np.isfinite(latents).all():
                raise GenerationError(
                    f"drawing broke down at step {index + 1} of {total}: the latents are no longer "
                    f"finite numbers; try a lower --guidance than {plan.guidance:g}"
                )
            if on_event is not None:
                on_event(Step(index + 1, total))
        return latents

    def _timestep(self, timestep: float, batch: int) -> np.ndarray:
        shape = (batch,) * self._timestep_rank
        return np.full(shape, timestep, self._timestep_type)

    def _decode(self, latents: np.ndarray, cancellation: Cancellation | None) -> np.ndarray:
        """Return (height, width, 3) uint8 pixels."""
        unscaled = latents / self._spec.scaling_factor + self._spec.shift_factor
        feeds = self._cast(self._vae_decoder, {"latent_sample": unscaled})
        sample = self._vae_decoder.run(feeds, cancellation)[0][0].astype(np.float32)
        if not np.isfinite(sample).all():
            raise GenerationError(
                "the decoder answered with pixels that are not finite numbers; export the model "
                "with --precision fp32"
            )
        pixels = (np.clip(sample.transpose(1, 2, 0), -1.0, 1.0) + 1.0) * 127.5
        return pixels.round().astype(np.uint8)

    @staticmethod
    def _cast(session: Session, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: array.astype(session.inputs[name], copy=False) for name, array in feeds.items()
        }
