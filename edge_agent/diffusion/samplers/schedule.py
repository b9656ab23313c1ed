"""What samplers share: the noise that training added at each timestep, and which steps to take.

Names and defaults are those of diffusers' scheduler configurations. At timestep t the network saw
`sqrt(a_t) x_0 + sqrt(1 - a_t) noise`; `sigma = sqrt((1 - a_t) / a_t)` is the same in other units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from edge_agent.errors import BundleError

Array = np.ndarray
Draw = Callable[[], Array]  # fresh standard normal noise in the shape of the latents
_ALMOST_ZERO = 2.0**-24  # diffusers' stand-in for a signal of zero, so that sigma stays finite


class Sampler(Protocol):
    """One drawing's path from noise to latents."""

    timesteps: Array  # (steps,) float64, descending
    initial_scale: float  # standard deviation of the initial noise
    clean: Array  # after a step: the latents of the picture that it was headed for, x_0

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return what the network is fed at step `index`."""
        ...

    def step(self, prediction: Array, latents: Array, index: int, draw: Draw) -> Array:
        """Return the latents after step `index`, given the network's prediction.

        `draw` is called by the samplers that add noise again, once a step.
        """
        ...


class Unscaled:
    """A sampler that keeps the latents' variance, so that the network is fed them as they are."""

    initial_scale = 1.0

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return the latents unchanged."""
        return latents


def refuse(config: Mapping[str, Any], **supported: tuple[Any, ...]) -> None:
    """Raise BundleError for an option whose value is not among the supported ones."""
    for option, values in supported.items():
        if option in config and config[option] not in values:
            raise BundleError(
                f"the scheduler option {option}={config[option]!r} is not supported on the device; "
                f"choose {' or '.join(map(repr, values))} in the scheduler_config.json of this "
                f"{config.get('_class_name')} and export the model again"
            )


def prediction_type(config: Mapping[str, Any], *more: str) -> str:
    """Return what the network predicts: the noise (epsilon), v, or one of `more`."""
    refuse(config, prediction_type=("epsilon", "v_prediction", *more))
    return str(config.get("prediction_type", "epsilon"))


def clean(kind: str, prediction: Array, latents: Array, alpha: float, sigma: float) -> Array:
    """Return x_0 from the prediction at x = alpha x_0 + sigma noise."""
    if kind == "epsilon":
        return np.asarray((latents - sigma * prediction) / alpha)
    if kind == "v_prediction":  # v = alpha noise - sigma x_0 (arXiv 2202.00512, appendix D)
        return np.asarray(alpha * latents - sigma * prediction)
    return prediction


def alphas_cumprod(config: Mapping[str, Any], *, keep_finite: bool = False) -> Array:
    """Return a_t, the product of 1 - beta up to each training step, float64.

    `keep_finite` lifts a last value of zero, which a rescaled schedule has, just above it.
    """
    count = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    schedule = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
    elif schedule == "linear":
        betas = np.linspace(start, end, count)
    elif schedule == "scaled_linear":
        betas = np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    else:
        refuse(config, beta_schedule=("linear", "scaled_linear", "squaredcos_cap_v2"))
        bars = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bars[1:] / bars[:-1], 0.999)
    products = np.cumprod(1.0 - betas)
    if config.get("rescale_betas_zero_snr"):
        # arXiv 2305.08891, algorithm 1: shift and scale so that the last step is pure noise.
        roots = np.sqrt(products)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        products = roots**2
        if keep_finite:
            products[-1] = _ALMOST_ZERO
    return np.asarray(products)


def sigmas_of(alphas: Array) -> Array:
    """Return noise levels relative to the signal, ascending like the timesteps."""
    return np.asarray(np.sqrt((1.0 - alphas) / alphas))


def alpha_of(sigma: float) -> float:
    """Return the signal's factor at a relative noise level: 1 / sqrt(1 + sigma^2)."""
    return 1.0 / math.hypot(sigma, 1.0)


def final_sigma(config: Mapping[str, Any], sigmas: Array) -> float:
    """Return the noise level at which the last step ends."""
    refuse(config, final_sigmas_type=("zero", "sigma_min"))
    return float(sigmas[0]) if config.get("final_sigmas_type") == "sigma_min" else 0.0


def leading(config: Mapping[str, Any], steps: int, trained: int) -> Array:
    """Return timesteps by table 2 of arXiv 2305.08891, shifted by `steps_offset`."""
    ratio = float(trained // steps)
    return np.arange(steps - 1, -1, -1) * ratio + config.get("steps_offset", 0)


def trailing(config: Mapping[str, Any], steps: int, trained: int, last: int) -> Array:
    """Return timesteps that begin at the last one, by table 2 of arXiv 2305.08891."""
    refuse(config, timestep_spacing=("leading", "trailing", "linspace"))
    return np.asarray(np.arange(last, 0, -trained / steps).round() - 1)


def karras(smallest: float, largest: float, steps: int) -> Array:
    """Return descending noise levels (arXiv 2206.00364, equation 5, rho 7)."""
    ramp = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), steps)
    return np.asarray(ramp**7)


def sigma_to_timestep(path: Array, sigmas: Array) -> Array:
    """Return the (fractional) timesteps at which training had these noise levels."""
    return np.asarray(np.interp(np.log(path), np.log(sigmas), np.arange(len(sigmas))))
