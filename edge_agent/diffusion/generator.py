"""From an encoded prompt to a picture on the device: guidance, sampling, decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_agent.bundle import DiffusionSpec
from edge_agent.diffusion.conditioning import Conditioner, Feeds
from edge_agent.diffusion.decoding import Decode, decode
from edge_agent.diffusion.samplers import make_sampler, overridden, sampler_name
from edge_agent.errors import Cancelled, ConfigError, GenerationError
from edge_agent.routing.encoder import Encoded, TextEncoder
from edge_agent.runtime.network import Network
from edge_agent.types import Cancellation, OnEvent, Picture, Preview, Request, Step


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

    The denoiser is fed what it asks for by name, so one loop serves every family: UNets and
    transformers, with one text encoder or two, guided or told how much guidance to imitate.
    `tile` is the cells a side that are decoded at once, None those of any usual picture;
    `preview_decoder` is the component that the spec names for it.
    """

    def __init__(
        self,
        spec: DiffusionSpec,
        *,
        denoiser: Network,
        vae_decoder: Network,
        text_encoders: Mapping[str, TextEncoder],
        preview_decoder: Network | None = None,
        tile: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._spec = spec
        self._denoiser = denoiser
        self._vae_decoder = vae_decoder
        self._preview_decoder = preview_decoder
        self._tile = tile
        self._conditioner = Conditioner(spec, text_encoders)
        self._clock = clock

    def plan(self, request: Request, seed: int) -> Plan:
        """Fill in the model's defaults; raise ConfigError for a size or sampler it cannot draw."""
        spec, scheduler = self._spec, self._spec.scheduler
        if request.sampler is not None:
            scheduler = overridden(scheduler, request.sampler)
        width = spec.width if request.width is None else request.width
        height = spec.height if request.height is None else request.height
        for name, size in (("width", width), ("height", height)):
            if size % spec.size_step:
                below = max(size // spec.size_step, 1) * spec.size_step
                raise ConfigError(
                    f"the {name} {size} is not a multiple of {spec.size_step}; "
                    f"choose for example {min(below, spec.max_size)}"
                )
            if not spec.size_step <= size <= spec.max_size:
                raise ConfigError(
                    f"the {name} {size} is over the limit of the edge model; "
                    f"choose {spec.size_step} to {spec.max_size}"
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
        encoded: Mapping[str, Encoded],
        seed: int,
        on_event: OnEvent | None = None,
        cancellation: Cancellation | None = None,
    ) -> Picture:
        """Draw `request`; equal seed and settings give equal pixels.

        `encoded` is the prompt as text encoders saw it before, by component; others run here.
        Raises ConfigError, GenerationError or Cancelled.
        """
        from PIL import Image

        plan = self.plan(request, seed)
        started = self._clock()
        condition = self._condition(plan, request, encoded)
        conditioned = self._clock()
        # Numbers that run away are an error of ours below, not a warning of numpy's on stderr.
        with np.errstate(all="ignore"):
            latents = self._denoise(plan, condition, request.preview_every, on_event, cancellation)
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

    def _condition(self, plan: Plan, request: Request, encoded: Mapping[str, Encoded]) -> Feeds:
        """Return what the denoiser is fed at every step: one row, or with guidance two."""
        feeds = self._conditioner.encode(request.prompt, encoded)
        if guides(plan.guidance, self._denoiser.inputs):
            against = self._conditioner.against(request.negative_prompt)
            feeds = {name: np.concatenate([against[name], feeds[name]]) for name in feeds}
        # SDXL is told the size of the original, where it was cropped, and the target's size.
        frame = (plan.height, plan.width, 0, 0, plan.height, plan.width)
        feeds["time_ids"] = np.array([frame] * len(feeds["encoder_hidden_states"]), np.float32)
        feeds["guidance"] = np.asarray(plan.guidance)
        return {name: array for name, array in feeds.items() if name in self._denoiser.inputs}

    def _denoise(
        self,
        plan: Plan,
        condition: Feeds,  # rows B of each: 2 with guidance, negative first
        preview_every: int | None,
        on_event: OnEvent | None,
        cancellation: Cancellation | None,
    ) -> np.ndarray:
        spec, sampler = self._spec, make_sampler(plan.scheduler, plan.steps)
        # Philox's stream is fixed by numpy for good, so a seed means one picture everywhere.
        noise = np.random.Generator(np.random.Philox(plan.seed))
        shape = latents_of(spec, plan.width, plan.height)

        def draw() -> np.ndarray:
            return noise.standard_normal(shape, np.float32)

        latents = draw() * np.float32(sampler.initial_scale)
        batch, total = len(condition["encoder_hidden_states"]), len(sampler.timesteps)
        for index, timestep in enumerate(sampler.timesteps):
            if cancellation is not None and cancellation.cancelled:
                raise Cancelled("stopped")
            scaled = sampler.scale_input(latents, index)
            feeds = {
                "sample": np.repeat(scaled, batch, axis=0),
                "timestep": np.asarray(timestep),
                **condition,
            }
            prediction = self._denoiser.run(feeds, cancellation)[0]
            prediction = prediction.astype(np.float32, copy=False)
            if batch == 2:
                prediction = prediction[:1] + plan.guidance * (prediction[1:] - prediction[:1])
            latents = sampler.step(prediction, latents, index, draw)
            if not np.isfinite(latents).all():
                raise _broke_down(index + 1, total, plan.guidance)
            if on_event is None:
                continue
            on_event(Step(index + 1, total))
            if preview_every and index + 1 < total and (index + 1) % preview_every == 0:
                self._show(sampler.clean, index + 1, on_event, cancellation)
        return latents

    def _show(
        self,
        clean: np.ndarray,
        index: int,
        on_event: OnEvent,
        cancellation: Cancellation | None,
    ) -> None:
        """Tell what step `index` was headed for, if there is a decoder for it."""
        from PIL import Image

        spec, decoder = self._spec.preview, self._preview_decoder
        if spec is None or decoder is None:
            return
        unscaled = clean / spec.scaling_factor + spec.shift_factor
        try:
            pixels = decode(self._run(decoder, cancellation), unscaled, self._tile)
        except GenerationError:
            return  # a rough picture that cannot be shown is no reason to lose the real one
        on_event(Preview(index, Image.fromarray(pixels)))

    def _decode(self, latents: np.ndarray, cancellation: Cancellation | None) -> np.ndarray:
        """Return (height, width, 3) uint8 pixels."""
        unscaled = latents / self._spec.scaling_factor + self._spec.shift_factor
        return decode(self._run(self._vae_decoder, cancellation), unscaled, self._tile)

    @staticmethod
    def _run(decoder: Network, cancellation: Cancellation | None) -> Decode:
        return lambda unscaled: decoder.run({"latent_sample": unscaled}, cancellation)[0]


def guides(guidance: float, inputs: Collection[str]) -> bool:
    """Whether each step is drawn twice, the second time against the negative prompt.

    Consistency models are distilled with guidance among the denoiser's `inputs` instead.
    """
    return guidance > 1 and "guidance" not in inputs


def latents_of(spec: DiffusionSpec, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the shape (1, c, h, w) of the latents of a picture."""
    return 1, spec.latent_channels, height // spec.vae_scale, width // spec.vae_scale


def _broke_down(step: int, steps: int, guidance: float) -> GenerationError:
    """Say that latents stopped being numbers, and what mostly makes them."""
    cure = (
        f"try a lower --guidance than {guidance:g}"
        if guidance > 1
        else "export the model with --precision fp32"
    )
    return GenerationError(
        f"drawing broke down at step {step} of {steps}: the latents are no longer finite numbers; "
        f"{cure}"
    )
