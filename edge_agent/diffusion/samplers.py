"""Samplers in numpy, read from a diffusers scheduler configuration and equal to diffusers' own.

Each is for one drawing: `timesteps` says what to feed the network, `step` moves the latents one
step towards the picture. Coefficients are Python floats, so float32 latents stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from edge_agent.errors import BundleError

Array = np.ndarray


class Sampler(Protocol):
    """One drawing's path from noise to latents."""

    timesteps: Array  # (steps,) float64, descending
    initial_scale: float  # standard deviation of the initial noise

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return what the network is fed at step `index`."""
        ...

    def step(self, prediction: Array, latents: Array, index: int) -> Array:
        """Return the latents after step `index`, given the network's prediction."""
        ...


def make_sampler(config: Mapping[str, Any], steps: int) -> Sampler:
    """Build the sampler that a diffusers `scheduler_config` describes, for `steps` steps.

    Raises BundleError naming the class or option that the device does not know.
    """
    name = config.get("_class_name")
    if name not in _SAMPLERS:
        raise BundleError(
            f"the scheduler {name!r} is not supported on the device; export the model with one of "
            f"{', '.join(sorted(_SAMPLERS))}"
        )
    sampler: Sampler = _SAMPLERS[name](config, steps)
    return sampler


class DpmSolverPlusPlus:
    """DPM-Solver++ (2M), multistep, midpoint (arXiv 2211.01095, algorithm 2); order 1 or 2."""

    initial_scale = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        _refuse(
            config,
            use_exponential_sigmas=(False, None),
            use_beta_sigmas=(False, None),
            use_lu_lambdas=(False, None),
            use_flow_sigmas=(False, None),
            use_dynamic_shifting=(False, None),
            thresholding=(False, None),
            algorithm_type=("dpmsolver++",),
            solver_type=("midpoint",),
            solver_order=(1, 2),
            variance_type=(None,),
        )
        alphas = _alphas_cumprod(config)
        if config.get("rescale_betas_zero_snr"):
            alphas[-1] = 2.0**-24  # as diffusers: near zero, so that the first sigma stays finite
        sigmas = _sigmas(alphas)
        # Steps whose log-SNR is below `lambda_min_clipped` are left out (cosine schedules).
        clip = float(config.get("lambda_min_clipped", -math.inf))
        last = len(alphas) - int(np.searchsorted(-np.log(sigmas[::-1]), clip))
        if config.get("use_karras_sigmas"):
            path = _karras(sigmas[0], sigmas[-1], steps)
            timesteps = _sigma_to_timestep(path, sigmas)
            if config.get("beta_schedule") != "squaredcos_cap_v2":
                timesteps = timesteps.round()
            timesteps = np.trunc(timesteps)
        else:
            timesteps = self._timesteps(config, last, steps, len(alphas))
            path = np.interp(timesteps, np.arange(len(sigmas)), sigmas)
        self.timesteps: Array = timesteps
        self._sigmas = np.append(path, _final_sigma(config, sigmas))
        self._order = int(config.get("solver_order", 2))
        self._prediction_type = _prediction_type(config)
        self._ends_first_order = (
            config.get("euler_at_final", False)
            or (config.get("lower_order_final", True) and len(timesteps) < 15)
            or config.get("final_sigmas_type", "zero") == "zero"
        )
        self._previous_clean: Array | None = None

    @staticmethod
    def _timesteps(config: Mapping[str, Any], last: int, steps: int, trained: int) -> Array:
        spacing = config.get("timestep_spacing", "linspace")
        if spacing == "linspace":
            return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1]
        if spacing == "leading":
            ratio = last // (steps + 1)
            return np.arange(steps, 0, -1) * float(ratio) + config.get("steps_offset", 0)
        return _trailing(config, last, trained, steps)

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return the latents unchanged: this sampler keeps their variance."""
        return latents

    def step(self, prediction: Array, latents: Array, index: int) -> Array:
        """Take one step of equation (4.1) of the paper, of second order where history allows."""
        sigma_s, sigma_t = float(self._sigmas[index]), float(self._sigmas[index + 1])
        alpha_s, alpha_t = _alpha_of(sigma_s), _alpha_of(sigma_t)
        clean = _clean(self._prediction_type, prediction, latents, alpha_s, sigma_s * alpha_s)
        previous, self._previous_clean = self._previous_clean, clean
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


class Ddim:
    """DDIM with eta 0 (arXiv 2010.02502, equation 12)."""

    initial_scale = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        _refuse(config, thresholding=(False, None))
        self._alphas = _alphas_cumprod(config)
        trained = len(self._alphas)
        spacing = config.get("timestep_spacing", "leading")
        if spacing == "linspace":
            self.timesteps: Array = np.linspace(0, trained - 1, steps).round()[::-1]
        elif spacing == "leading":
            ratio = float(trained // steps)
            self.timesteps = np.arange(steps - 1, -1, -1) * ratio + config.get("steps_offset", 0)
        else:
            self.timesteps = _trailing(config, trained, trained, steps)
        self._stride = trained // steps
        one = config.get("set_alpha_to_one", True)
        self._final_alpha = 1.0 if one else float(self._alphas[0])
        clips = config.get("clip_sample", True)
        self._clip = float(config.get("clip_sample_range", 1.0)) if clips else None
        self._prediction_type = _prediction_type(config)

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return the latents unchanged: this sampler keeps their variance."""
        return latents

    def step(self, prediction: Array, latents: Array, index: int) -> Array:
        """Predict the clean latents and go back along the predicted noise."""
        now = int(self.timesteps[index])
        before = now - self._stride
        product = float(self._alphas[now])
        alpha, sigma = math.sqrt(product), math.sqrt(1.0 - product)
        clean = _clean(self._prediction_type, prediction, latents, alpha, sigma)
        if self._prediction_type == "epsilon":
            noise = prediction
        else:
            noise = alpha * prediction + sigma * latents
        if self._clip is not None:
            clean = clean.clip(-self._clip, self._clip)
        target = float(self._alphas[before]) if before >= 0 else self._final_alpha
        return np.asarray(math.sqrt(target) * clean + math.sqrt(1.0 - target) * noise)


class Euler:
    """Euler's method on the probability-flow ODE (arXiv 2206.00364, algorithm 1 without churn)."""

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        _refuse(
            config,
            use_exponential_sigmas=(False, None),
            use_beta_sigmas=(False, None),
            interpolation_type=("linear",),
            timestep_type=("discrete",),
            sigma_min=(None,),
            sigma_max=(None,),
        )
        alphas = _alphas_cumprod(config)
        if config.get("rescale_betas_zero_snr"):
            alphas[-1] = 2.0**-24
        trained, sigmas = len(alphas), _sigmas(alphas)
        spacing = config.get("timestep_spacing", "linspace")
        if spacing == "linspace":
            self.timesteps: Array = np.linspace(0, trained - 1, steps)[::-1]
        elif spacing == "leading":
            ratio = float(trained // steps)
            self.timesteps = np.arange(steps - 1, -1, -1) * ratio + config.get("steps_offset", 0)
        else:
            self.timesteps = _trailing(config, trained, trained, steps)
        path = np.interp(self.timesteps, np.arange(trained), sigmas)
        if config.get("use_karras_sigmas"):
            path = _karras(path[-1], path[0], steps)
            self.timesteps = _sigma_to_timestep(path, sigmas)
        self._sigmas = np.append(path, _final_sigma(config, sigmas))
        largest = float(self._sigmas.max())
        self.initial_scale = math.hypot(largest, 1.0) if spacing == "leading" else largest
        self._prediction_type = _prediction_type(config)

    def scale_input(self, latents: Array, index: int) -> Array:
        """Bring the latents, of variance 1 + sigma^2, to the unit variance the network knows."""
        return np.asarray(latents / math.hypot(float(self._sigmas[index]), 1.0))

    def step(self, prediction: Array, latents: Array, index: int) -> Array:
        """Follow the derivative of the ODE to the next noise level."""
        sigma = float(self._sigmas[index])
        if self._prediction_type == "epsilon":
            derivative = prediction
        else:
            alpha = _alpha_of(sigma)
            clean = alpha**2 * latents - (sigma * alpha) * prediction
            derivative = (latents - clean) / sigma
        return np.asarray(latents + (float(self._sigmas[index + 1]) - sigma) * derivative)


_SAMPLERS: dict[str, type[DpmSolverPlusPlus] | type[Ddim] | type[Euler]] = {
    "DPMSolverMultistepScheduler": DpmSolverPlusPlus,
    "DDIMScheduler": Ddim,
    "EulerDiscreteScheduler": Euler,
}


def _refuse(config: Mapping[str, Any], **supported: tuple[Any, ...]) -> None:
    for option, values in supported.items():
        if option in config and config[option] not in values:
            raise BundleError(
                f"the scheduler option {option}={config[option]!r} is not supported on the device "
                f"({config.get('_class_name')} runs with {values[0]!r}); export the model with that"
            )


def _prediction_type(config: Mapping[str, Any]) -> str:
    _refuse(config, prediction_type=("epsilon", "v_prediction"))
    return str(config.get("prediction_type", "epsilon"))


def _clean(kind: str, prediction: Array, latents: Array, alpha: float, sigma: float) -> Array:
    """Return x_0 from the prediction at x = alpha x_0 + sigma noise."""
    if kind == "epsilon":
        return np.asarray((latents - sigma * prediction) / alpha)
    return np.asarray(alpha * latents - sigma * prediction)


def _alphas_cumprod(config: Mapping[str, Any]) -> Array:
    """Return the cumulative product of 1 - beta over the training steps, float64."""
    count = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    schedule = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
    elif schedule == "linear":
        betas = np.linspace(start, end, count)
    elif schedule == "scaled_linear":
        betas = np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    elif schedule == "squaredcos_cap_v2":
        bars = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bars[1:] / bars[:-1], 0.999)
    else:
        raise BundleError(
            f"the scheduler option beta_schedule={schedule!r} is not supported on the device; "
            "export the model with linear, scaled_linear or squaredcos_cap_v2"
        )
    products = np.cumprod(1.0 - betas)
    if config.get("rescale_betas_zero_snr"):
        # arXiv 2305.08891, algorithm 1: shift and scale so that the last step is pure noise.
        roots = np.sqrt(products)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        products = roots**2
    return np.asarray(products)


def _sigmas(alphas_cumprod: Array) -> Array:
    return np.asarray(np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod))


def _alpha_of(sigma: float) -> float:
    return 1.0 / math.hypot(sigma, 1.0)


def _final_sigma(config: Mapping[str, Any], sigmas: Array) -> float:
    _refuse(config, final_sigmas_type=("zero", "sigma_min"))
    return float(sigmas[0]) if config.get("final_sigmas_type") == "sigma_min" else 0.0


def _trailing(config: Mapping[str, Any], last: int, trained: int, steps: int) -> Array:
    _refuse(config, timestep_spacing=("trailing", "leading", "linspace"))
    return np.asarray(np.arange(last, 0, -trained / steps).round() - 1)


def _karras(smallest: float, largest: float, steps: int) -> Array:
    """Return descending noise levels (arXiv 2206.00364, equation 5, rho 7)."""
    ramp = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), steps)
    return np.asarray(ramp**7)


def _sigma_to_timestep(path: Array, sigmas: Array) -> Array:
    return np.asarray(np.interp(np.log(path), np.log(sigmas), np.arange(len(sigmas))))
