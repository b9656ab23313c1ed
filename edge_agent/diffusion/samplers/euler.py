"""Euler's method on the probability flow: plain, and ancestral with fresh noise at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_agent.diffusion.samplers import schedule
from edge_agent.diffusion.samplers.schedule import Array, Draw


class Euler:
    """Euler's method on the ODE (arXiv 2206.00364, algorithm 1 without churn).

    Latents are `x_0 + sigma noise`, so the network is fed them divided by `sqrt(1 + sigma^2)`.
    """

    predicts: tuple[str, ...] = ("sample",)  # beside epsilon and v_prediction

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        schedule.refuse(
            config,
            use_exponential_sigmas=(False, None),
            use_beta_sigmas=(False, None),
            interpolation_type=("linear",),
            timestep_type=("discrete",),
            sigma_min=(None,),
            sigma_max=(None,),
        )
        sigmas = schedule.sigmas_of(schedule.alphas_cumprod(config, keep_finite=True))
        trained = len(sigmas)
        spacing = config.get("timestep_spacing", "linspace")
        if spacing == "linspace":
            self.timesteps: Array = np.linspace(0, trained - 1, steps)[::-1]
        elif spacing == "leading":
            self.timesteps = schedule.leading(config, steps, trained)
        else:
            self.timesteps = schedule.trailing(config, steps, trained, trained)
        path = np.interp(self.timesteps, np.arange(trained), sigmas)
        if config.get("use_karras_sigmas"):
            path = schedule.karras(path[-1], path[0], steps)
            self.timesteps = schedule.sigma_to_timestep(path, sigmas)
        self._sigmas = np.append(path, schedule.final_sigma(config, sigmas))
        largest = float(self._sigmas.max())
        self.initial_scale = math.hypot(largest, 1.0) if spacing == "leading" else largest
        self._prediction_type = schedule.prediction_type(config, *self.predicts)

    def scale_input(self, latents: Array, index: int) -> Array:
        """Bring the latents, of variance 1 + sigma^2, to the unit variance the network knows."""
        return np.asarray(latents / math.hypot(float(self._sigmas[index]), 1.0))

    def step(self, prediction: Array, latents: Array, index: int, draw: Draw) -> Array:
        """Follow the derivative of the ODE to the next noise level."""
        return self._follow(prediction, latents, index, float(self._sigmas[index + 1]))

    def _follow(self, prediction: Array, latents: Array, index: int, target: float) -> Array:
        sigma = float(self._sigmas[index])
        if self._prediction_type == "epsilon":
            derivative = prediction
            self.clean = np.asarray(latents - sigma * prediction)
        else:
            alpha = schedule.alpha_of(sigma)
            self.clean = schedule.clean(
                self._prediction_type, prediction, alpha * latents, alpha, sigma * alpha
            )
            derivative = (latents - self.clean) / sigma
        return np.asarray(latents + (target - sigma) * derivative)


class EulerAncestral(Euler):
    """Euler's method to below the next noise level, and fresh noise up to it (k-diffusion)."""

    predicts = ()

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        # The scheduler of this name in diffusers knows neither; an override may bring them along.
        passing = {"use_karras_sigmas", "final_sigmas_type"}
        super().__init__({k: v for k, v in config.items() if k not in passing}, steps)

    def step(self, prediction: Array, latents: Array, index: int, draw: Draw) -> Array:
        """Step down to sigma_down, then add noise of standard deviation sigma_up."""
        sigma, target = float(self._sigmas[index]), float(self._sigmas[index + 1])
        up = target * math.sqrt(sigma**2 - target**2) / sigma
        latents = self._follow(prediction, latents, index, math.sqrt(target**2 - up**2))
        return latents if up == 0.0 else np.asarray(latents + up * draw())
