"""Our samplers walk the same path as diffusers' schedulers, over a full loop."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge_agent.diffusion.samplers import make_sampler, overridden, sampler_name
from edge_agent.diffusion.samplers.flow import FlowEuler
from edge_agent.errors import BundleError, ConfigError
from edge_agent.types import SamplerName

# diffusers 0.39 converts torch tensors by numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DPM, DDIM, LCM = "DPMSolverMultistepScheduler", "DDIMScheduler", "LCMScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
TRAILING, LEADING = {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}
LINSPACE = {"timestep_spacing": "linspace"}
ZERO_SNR = {"rescale_betas_zero_snr": True}
FREE = {"clip_sample": False}  # DDIM's default clips x_0 to [-1, 1], which is for pixels
CASES: list[tuple[str, dict[str, Any]]] = [
    (DPM, SD),
    (DPM, SD | TRAILING | V),
    (DPM, SD | LEADING | {"steps_offset": 1}),
    (DPM, SD | X0),
    (DPM, SD | {"solver_order": 1}),
    (DPM, SD | {"use_karras_sigmas": True}),
    (DPM, SD | V | {"use_karras_sigmas": True}),
    (DPM, SD | V | TRAILING | ZERO_SNR),
    (DPM, SD | {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    (DPM, SD | {"final_sigmas_type": "sigma_min", "lower_order_final": True}),
    (
        DPM,
        SD | {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True},
    ),
    (DPM, SD | {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    (DPM, SD | {"beta_schedule": "linear"}),
    (DDIM, SD | FREE | {"steps_offset": 1, "set_alpha_to_one": False}),  # Stable Diffusion 2
    (DDIM, SD | FREE | V | {"steps_offset": 1, "set_alpha_to_one": False}),  # and 2.1
    (DDIM, SD | FREE | TRAILING),
    (DDIM, SD | FREE | LINSPACE),
    (DDIM, SD | FREE | X0),
    (DDIM, SD | FREE | V | TRAILING | ZERO_SNR),
    (DDIM, SD | {"clip_sample": True}),
    (DDIM, SD | {"clip_sample": True, "clip_sample_range": 2.0}),
    (DDIM, FREE | {"trained_betas": [1e-4 * (1 + i / 50) for i in range(1000)]}),
    (EULER, SD),
    (EULER, SD | TRAILING),  # SD-Turbo
    (EULER, SD | LEADING | {"steps_offset": 1}),  # SDXL
    (EULER, SD | V),
    (EULER, SD | V | TRAILING | ZERO_SNR),
    (EULER, SD | X0),
    (EULER, SD | {"use_karras_sigmas": True}),
    (EULER, SD | {"final_sigmas_type": "sigma_min"}),
    (ANCESTRAL, SD),
    (ANCESTRAL, SD | TRAILING | {"steps_offset": 1}),  # SDXL-Turbo
    (ANCESTRAL, SD | LEADING | {"steps_offset": 1}),
    (ANCESTRAL, SD | V | TRAILING | ZERO_SNR),
    (LCM, {}),
    (LCM, SD | {"set_alpha_to_one": True, "steps_offset": 1}),  # LCM Dreamshaper
    (LCM, SD | V),
    (LCM, SD | X0),
    (LCM, SD | {"original_inference_steps": 100, "timestep_scaling": 5.0}),
    (LCM, SD | {"clip_sample": True}),
    (FLOW, {}),
    (FLOW, {"shift": 3.0}),  # Stable Diffusion 3
    (FLOW, {"shift": 3.0, "num_train_timesteps": 500}),
]


def dummy_model(latents: Any, timestep: float) -> Any:
    """Answer with something bounded that depends on both inputs, alike in numpy and torch."""
    scale = 0.5 + timestep / 2000
    return latents * scale / (1 + latents * latents) ** 0.5


def noises() -> Iterator[np.ndarray]:
    """Yield the noise that a drawing begins with, then that of its steps."""
    rng = np.random.Generator(np.random.Philox(3))
    while True:
        yield rng.standard_normal((1, 4, 8, 8), np.float32)


def walk_of_diffusers(
    scheduler: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, np.ndarray]:
    """Return the timesteps of diffusers' scheduler and where it leads `noises`."""
    import torch

    draws = noises()
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(
            module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(draws).copy())
        )
    scheduler.set_timesteps(steps)
    scale = getattr(scheduler, "init_noise_sigma", 1.0)
    latents = torch.from_numpy(next(draws)) * float(scale)
    for timestep in scheduler.timesteps:
        scaled = latents
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(latents, timestep)
        prediction = dummy_model(scaled, float(timestep))
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return scheduler.timesteps.numpy(), latents.numpy()


def walk_of_ours(config: dict[str, Any], steps: int) -> tuple[np.ndarray, np.ndarray]:
    sampler, draws = make_sampler(config, steps), noises()
    latents = next(draws) * sampler.initial_scale
    for index, timestep in enumerate(sampler.timesteps):
        scaled = sampler.scale_input(latents, index)
        prediction = dummy_model(scaled, float(timestep))
        latents = sampler.step(prediction, latents, index, lambda: next(draws))
    assert latents.dtype == np.float32
    return sampler.timesteps, latents


def scheduler_of(name: str, options: dict[str, Any]) -> Any:
    pytest.importorskip("diffusers")
    from cloud_server.torchvision_guard import guard

    guard()
    return getattr(importlib.import_module("diffusers"), name)(**options)


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_walks_the_path_of_diffusers(
    name: str, options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_of(name, options)
    timesteps, theirs = walk_of_diffusers(scheduler, steps, monkeypatch)
    # The configuration as it is saved in a model folder, through JSON's eyes.
    ours = walk_of_ours(dict(scheduler.config) | {"_class_name": name}, steps)
    np.testing.assert_allclose(ours[0], timesteps, atol=1e-2)
    # At a zero terminal SNR latents begin at 4096 times the noise, where float32 rounds to 2e-4.
    largest = max(1.0, float(make_sampler(options | {"_class_name": name}, steps).initial_scale))
    atol = max(1e-4, float(np.spacing(np.float32(largest))))
    np.testing.assert_allclose(ours[1], theirs, rtol=1e-6, atol=atol)
    # What a folder leaves out are diffusers' defaults, and ours.
    np.testing.assert_array_equal(walk_of_ours(options | {"_class_name": name}, steps)[1], ours[1])


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_says_which_picture_each_step_was_headed_for(
    name: str, options: dict[str, Any], steps: int
) -> None:
    """A network that always means the same picture is understood to mean it, at every step."""
    sampler = make_sampler(options | {"_class_name": name}, steps)
    draws = noises()
    meant = np.clip(next(draws) / 4, -1, 1)
    latents = next(draws) * sampler.initial_scale
    kind = options.get("prediction_type", "flow" if name == FLOW else "epsilon")
    for index in range(len(sampler.timesteps)):
        alpha, sigma = level(sampler, index)
        if name == FLOW:
            prediction = (latents - meant) / sigma
        elif kind == "sample":
            prediction = meant
        else:
            scaled = sampler.scale_input(latents, index)
            noise = (scaled - alpha * meant) / sigma
            prediction = noise if kind == "epsilon" else alpha * noise - sigma * meant
        latents = sampler.step(prediction.astype(np.float32), latents, index, lambda: next(draws))
        # LCM keeps a little of the latents on purpose, most where there is little noise.
        np.testing.assert_allclose(sampler.clean, meant, atol=0.3 if name == LCM else 5e-3)


def level(sampler: Any, index: int) -> tuple[float, float]:
    """Return signal and noise of what the network is fed at a step, of unit variance."""
    timestep = sampler.timesteps[index]
    if hasattr(sampler, "_alphas"):
        product = float(sampler._alphas[int(timestep)])
        return product**0.5, (1 - product) ** 0.5
    sigma = float(sampler._sigmas[index])
    alpha = 1 / (1 + sigma**2) ** 0.5
    return alpha, sigma if isinstance(sampler, FlowEuler) else sigma * alpha


OVERRIDES = {
    "ddim": DDIM,
    "euler": EULER,
    "euler-a": ANCESTRAL,
    "dpmpp-2m": DPM,
    "dpmpp-2m-karras": DPM,
    "lcm": LCM,
}


@pytest.mark.parametrize("name", OVERRIDES)
@pytest.mark.parametrize(
    ("own", "options"),
    [
        ("PNDMScheduler", SD | {"steps_offset": 1, "skip_prk_steps": True}),  # SD 1.5
        (DDIM, SD | FREE | V | {"steps_offset": 1, "set_alpha_to_one": False}),
        (ANCESTRAL, SD | TRAILING | {"steps_offset": 1}),
        (EULER, SD | LEADING | {"steps_offset": 1}),
    ],
)
def test_another_sampler_is_what_from_config_makes_of_the_models_own(
    own: str, options: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scheduler_of(own, options)
    kind = type(scheduler_of(OVERRIDES[name], {}))
    explicit = {"use_karras_sigmas": True} if name.endswith("karras") else {}
    explicit |= {"clip_sample": False} if name == "ddim" else {}
    _, theirs = walk_of_diffusers(kind.from_config(model.config, **explicit), 6, monkeypatch)
    if own == "PNDMScheduler":  # what `export` puts in its place
        own, model = DPM, type(scheduler_of(DPM, {})).from_config(model.config)
    chosen = overridden(dict(model.config) | {"_class_name": own}, SamplerName(name))
    assert sampler_name(chosen) == name
    np.testing.assert_allclose(walk_of_ours(dict(chosen), 6)[1], theirs, rtol=0, atol=1e-4)


def test_the_models_own_sampler_is_left_as_it_is() -> None:
    config = {"_class_name": ANCESTRAL, "timestep_spacing": "trailing"}
    assert overridden(config, SamplerName.EULER_A) is config


@pytest.mark.parametrize(
    ("own", "name", "choice"),
    [
        (FLOW, "ddim", "choose flow-euler$"),
        (EULER, "flow-euler", "choose ddim or euler or euler-a"),
    ],
)
def test_flow_matching_and_diffusion_do_not_mix(own: str, name: str, choice: str) -> None:
    with pytest.raises(ConfigError, match=f"sampler '{name}' cannot draw .*{choice}"):
        overridden({"_class_name": own}, SamplerName(name))


def test_more_steps_than_a_consistency_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"51 steps are more than the 50 .* choose 1 to 50"):
        make_sampler({"_class_name": LCM}, 51)


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
        (DDIM, {"prediction_type": "flow_prediction"}),
        (ANCESTRAL, {"prediction_type": "sample"}),
        (LCM, {"thresholding": True}),
        (FLOW, {"use_dynamic_shifting": True}),
        (DDIM, {"timestep_spacing": "random"}),
        (EULER, {"interpolation_type": "log_linear"}),
    ],
)
def test_an_unsupported_option_is_named_with_its_value(name: str, options: dict[str, Any]) -> None:
    option, value = next(iter(options.items()))
    with pytest.raises(BundleError, match=re.escape(f"{option}={value!r}")):
        make_sampler(SD | {"_class_name": name} | options, 4)
