"""DPM-Solver++: a multistep solver that remembers what it predicted one step before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_agent.diffusion.samplers import schedule
from edge_agent.diffusion.samplers.schedule import Array, Draw, Unscaled


class DpmSolverPlusPlus(Unscaled):
    """DPM-Solver++ (2M), multistep, midpoint (arXiv 2211.01095, algorithm 2); order 1 or 2."""

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        schedule.refuse(
            config,
            use_exponential_sigmas=(False, None),
            use_beta_sigmas=(False, None),
            use_lu_lambdas=(False, None),
            use_flow_sigmas=(False, None),
            use_dynamic_shifting=(False, None),
            thresholding=(False, None),
            algorithm_type=("dpmsolver++",),
            solver_type=("midpoint",),
            solver_order=(2, 1),
            variance_type=(None,),
        )
        sigmas = schedule.sigmas_of(schedule.alphas_cumprod(config, keep_finite=True))
        # Steps whose log-SNR is below `lambda_min_clipped` are left out (cosine schedules).
        clip = float(config.get("lambda_min_clipped", -math.inf))
        last = len(sigmas) - int(np.searchsorted(-np.log(sigmas[::-1]), clip))
        if config.get("use_karras_sigmas"):
            path = schedule.karras(sigmas[0], sigmas[-1], steps)
            timesteps = schedule.sigma_to_timestep(path, sigmas)
            if config.get("beta_schedule") != "squaredcos_cap_v2":
                timesteps = timesteps.round()
            timesteps = np.trunc(timesteps)
        else:
            timesteps = self._timesteps(config, last, steps, len(sigmas))
            path = np.interp(timesteps, np.arange(len(sigmas)), sigmas)
        self.timesteps: Array = timesteps
        self._sigmas = np.append(path, schedule.final_sigma(config, sigmas))
        self._order = int(config.get("solver_order", 2))
        self._prediction_type = schedule.prediction_type(config, "sample")
        self._ends_first_order = (
            config.get("euler_at_final", False)
            or (config.get("lower_order_final", True) and len(timesteps) < 15)
            or config.get("final_sigmas_type", "zero") == "zero"
        )
        self._before: Array | None = None

    @staticmethod
    def _timesteps(config: Mapping[str, Any], last: int, steps: int, trained: int) -> Array:
        spacing = config.get("timestep_spacing", "linspace")
        if spacing == "linspace":
            return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1]
        if spacing == "leading":
            return schedule.leading(config, steps + 1, last)[:-1]
        return schedule.trailing(config, steps, trained, last)

    def step(self, prediction: Array, latents: Array, index: int, draw: Draw) -> Array:
        """Take one step of equation (4.1) of the paper, of second order where history allows."""
        sigma_s, sigma_t = float(self._sigmas[index]), float(self._sigmas[index + 1])
        alpha_s, alpha_t = schedule.alpha_of(sigma_s), schedule.alpha_of(sigma_t)
        clean = schedule.clean(
            self._prediction_type, prediction, latents, alpha_s, sigma_s * alpha_s
        )
        previous, self._before = self._before, clean
        self.clean = clean
        # lambda is -log(sigma), so exp(-h) is a plain ratio that stays finite at sigma_t = 0.
        shrink = sigma_t / sigma_s
        direction = clean
        final = index == len(self.timesteps) - 1
        if self._order == 2 and previous is not None and not (final and self._ends_first_order):
            h = math.log(sigma_s / sigma_t)
            h_before = math.log(float(self._sigmas[index - 1]) / sigma_s)
            direction = clean + (0.5 * h / h_before) * (clean - previous)
        scale = (sigma_t * alpha_t) / (sigma_s * alpha_s)
        return np.asarray(scale * latents + (alpha_t * (1.0 - shrink)) * direction)
