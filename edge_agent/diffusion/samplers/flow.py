"""Flow matching: straight from noise to picture, the network says in which direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_agent.diffusion.samplers import schedule
from edge_agent.diffusion.samplers.schedule import Array, Draw, Unscaled


class FlowEuler(Unscaled):
    """Euler's method on a rectified flow (arXiv 2403.03206, equation 1 and section 5.3.2).

    Latents are `(1 - sigma) x_0 + sigma noise`; the network predicts `noise - x_0`. `shift` moves
    the steps towards the noise.
    """

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        schedule.refuse(
            config,
            use_dynamic_shifting=(False, None),
            use_karras_sigmas=(False, None),
            use_exponential_sigmas=(False, None),
            use_beta_sigmas=(False, None),
            invert_sigmas=(False, None),
            shift_terminal=(None,),
            stochastic_sampling=(False, None),
        )
        trained = int(config.get("num_train_timesteps", 1000))
        shift = float(config.get("shift", 1.0))

        def shifted(sigma: Array) -> Array:
            return np.asarray(shift * sigma / (1 + (shift - 1) * sigma))

        # diffusers shifts the ends of the path, then the path: both are part of the models.
        first, last = shifted(np.array([1.0, 1 / trained]))
        path = shifted(np.linspace(first, last, steps))
        self.timesteps: Array = path * trained
        self._sigmas = np.append(path, 0.0)

    def step(self, prediction: Array, latents: Array, index: int, draw: Draw) -> Array:
        """Follow the predicted direction to the next noise level."""
        self.clean = np.asarray(latents - float(self._sigmas[index]) * prediction)
        ahead = float(self._sigmas[index + 1]) - float(self._sigmas[index])
        return np.asarray(latents + ahead * prediction)
