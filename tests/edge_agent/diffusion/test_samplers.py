"""Our samplers walk the same path as diffusers' schedulers, over a full loop."""

from __future__ import annotations

import importlib
import math
import re
from typing import Any

import numpy as np
import pytest

from edge_agent.diffusion.samplers import make_sampler
from edge_agent.errors import BundleError

# diffusers 0.39 converts torch tensors by numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DPM, DDIM, EULER = "DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler"
# DDIM's default clips x_0 to [-1, 1], which is for pixels, not latents.
CASES: list[tuple[str, dict[str, Any]]] = [
    (DPM, {}),
    (DPM, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    (DPM, {"timestep_spacing": "leading", "steps_offset": 1}),
    (DPM, {"solver_order": 1}),
    (DPM, {"use_karras_sigmas": True}),
    (DPM, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    (DPM, {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    (DPM, {"final_sigmas_type": "sigma_min", "lower_order_final": True}),
    (DPM, {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    (DPM, {"beta_schedule": "linear"}),
    (DDIM, {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
    (DDIM, {"clip_sample": False, "timestep_spacing": "trailing"}),
    (DDIM, {"clip_sample": False, "timestep_spacing": "linspace"}),
    (DDIM, {"clip_sample": True}),
    (DDIM, {"clip_sample": False, "prediction_type": "v_prediction"}),
    (
        DDIM,
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        },
    ),
    (EULER, {}),
    (EULER, {"timestep_spacing": "trailing"}),
    (EULER, {"timestep_spacing": "leading", "steps_offset": 1}),
    (EULER, {"prediction_type": "v_prediction"}),
    (EULER, {"use_karras_sigmas": True}),
    (EULER, {"final_sigmas_type": "sigma_min"}),
]


def dummy_model(latents: Any, timestep: float) -> Any:
    """Answer with something bounded that depends on both inputs, alike in numpy and torch."""
    scale = 0.5 + timestep / 2000
    return latents * scale / (1 + latents * latents) ** 0.5


@pytest.mark.parametrize("steps", [1, 2, 8, 20])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_walks_the_path_of_diffusers(name: str, options: dict[str, Any], steps: int) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from cloud_server.torchvision_guard import guard

    guard()
    scheduler = getattr(importlib.import_module("diffusers"), name)(**SD | options)
    noise = np.random.Generator(np.random.Philox(3)).standard_normal((1, 4, 8, 8), np.float32)

    scheduler.set_timesteps(steps)
    theirs = torch.from_numpy(noise) * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(theirs, timestep)
        theirs = scheduler.step(dummy_model(scaled, float(timestep)), timestep, theirs).prev_sample

    # The configuration as it is saved in a model folder, through JSON's eyes.
    sampler = make_sampler(dict(scheduler.config) | {"_class_name": name}, steps)
    ours = noise * sampler.initial_scale
    for index, timestep in enumerate(sampler.timesteps):
        scaled = sampler.scale_input(ours, index)
        ours = sampler.step(dummy_model(scaled, float(timestep)), ours, index)

    assert ours.dtype == np.float32
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), atol=1e-2)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_stays_finite_in_every_sampler() -> None:
    for name in (DPM, DDIM, EULER):
        config = SD | {
            "_class_name": name,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
            "clip_sample": False,
        }
        sampler = make_sampler(config, 4)
        latents = np.ones((1, 4, 2, 2), np.float32) * sampler.initial_scale
        for index, timestep in enumerate(sampler.timesteps):
            scaled = sampler.scale_input(latents, index)
            latents = sampler.step(dummy_model(scaled, float(timestep)), latents, index)
        assert math.isfinite(float(latents.sum())), name


def test_an_unknown_scheduler_is_named_with_the_known_ones() -> None:
    with pytest.raises(BundleError, match=r"'PNDMScheduler' is not supported.*DDIMScheduler"):
        make_sampler({"_class_name": "PNDMScheduler"}, 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (DPM, {"use_lu_lambdas": True}),
        (DPM, {"algorithm_type": "sde-dpmsolver++"}),
        (DPM, {"solver_order": 3}),
        (DPM, {"beta_schedule": "sigmoid"}),
        (DDIM, {"prediction_type": "sample"}),
        (DDIM, {"timestep_spacing": "random"}),
        (EULER, {"interpolation_type": "log_linear"}),
    ],
)
def test_an_unsupported_option_is_named_with_its_value(name: str, options: dict[str, Any]) -> None:
    option, value = next(iter(options.items()))
    with pytest.raises(BundleError, match=re.escape(f"{option}={value!r}")):
        make_sampler(SD | {"_class_name": name} | options, 4)
