"""Latent consistency models: predict the picture, add noise again, predict a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_agent.diffusion.samplers import schedule
from edge_agent.diffusion.samplers.schedule import Array, Draw, Unscaled
from edge_agent.errors import ConfigError

_SIGMA_DATA = 0.5
# This scheduler's defaults in diffusers are not those of the others.
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Lcm(Unscaled):
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3).

    Its steps are some of the `original_inference_steps` that the model was distilled on; more than
    those are a ConfigError.
    """

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        schedule.refuse(config, thresholding=(False, None))
        self._alphas = schedule.alphas_cumprod(_BETAS | dict(config))
        trained = len(self._alphas)
        distilled = int(config.get("original_inference_steps", 50))
        if steps > distilled:
            raise ConfigError(
                f"{steps} steps are more than the {distilled} that the sampler lcm can take; "
                f"choose 1 to {distilled}, few are enough"
            )
        path = np.arange(distilled, 0, -1) * (trained // distilled) - 1
        picked = np.floor(np.linspace(0, distilled, steps, endpoint=False)).astype(int)
        self.timesteps: Array = path[picked].astype(np.float64)
        self._scaling = float(config.get("timestep_scaling", 10.0))
        clips = config.get("clip_sample", False)
        self._clip = float(config.get("clip_sample_range", 1.0)) if clips else None
        self._prediction_type = schedule.prediction_type(config, "sample")

    def step(self, prediction: Array, latents: Array, index: int, draw: Draw) -> Array:
        """Return the consistency function's answer, with noise added but for the last step."""
        now = int(self.timesteps[index])
        product = float(self._alphas[now])
        alpha, sigma = math.sqrt(product), math.sqrt(1.0 - product)
        clean = schedule.clean(self._prediction_type, prediction, latents, alpha, sigma)
        if self._clip is not None:
            clean = clean.clip(-self._clip, self._clip)
        scaled = now * self._scaling
        skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        out = scaled / math.hypot(scaled, _SIGMA_DATA)
        self.clean = denoised = np.asarray(out * clean + skip * latents)
        if index == len(self.timesteps) - 1:
            return denoised
        target = float(self._alphas[int(self.timesteps[index + 1])])
        return np.asarray(math.sqrt(target) * denoised + math.sqrt(1.0 - target) * draw())
