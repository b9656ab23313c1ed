"""DDIM: back along the predicted noise, in any number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_agent.diffusion.samplers import schedule
from edge_agent.diffusion.samplers.schedule import Array, Draw, Unscaled


class Ddim(Unscaled):
    """DDIM with eta 0 (arXiv 2010.02502, equation 12)."""

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        schedule.refuse(config, thresholding=(False, None))
        self._alphas = schedule.alphas_cumprod(config)
        trained = len(self._alphas)
        spacing = config.get("timestep_spacing", "leading")
        if spacing == "linspace":
            self.timesteps: Array = np.linspace(0, trained - 1, steps).round()[::-1]
        elif spacing == "leading":
            self.timesteps = schedule.leading(config, steps, trained)
        else:
            self.timesteps = schedule.trailing(config, steps, trained, trained)
        self._stride = trained // steps
        one = config.get("set_alpha_to_one", True)
        self._final_alpha = 1.0 if one else float(self._alphas[0])
        clips = config.get("clip_sample", True)
        self._clip = float(config.get("clip_sample_range", 1.0)) if clips else None
        self._prediction_type = schedule.prediction_type(config, "sample")

    def step(self, prediction: Array, latents: Array, index: int, draw: Draw) -> Array:
        """Predict the clean latents and go back along the predicted noise."""
        now = int(self.timesteps[index])
        before = now - self._stride
        product = float(self._alphas[now])
        alpha, sigma = math.sqrt(product), math.sqrt(1.0 - product)
        clean = schedule.clean(self._prediction_type, prediction, latents, alpha, sigma)
        if self._prediction_type == "epsilon":
            noise = prediction
        elif self._prediction_type == "v_prediction":
            noise = alpha * prediction + sigma * latents
        else:
            noise = (latents - alpha * clean) / sigma
        if self._clip is not None:
            clean = clean.clip(-self._clip, self._clip)
        self.clean = clean
        target = float(self._alphas[before]) if before >= 0 else self._final_alpha
        return np.asarray(math.sqrt(target) * clean + math.sqrt(1.0 - target) * noise)
