"""Samplers in numpy, read from a diffusers scheduler configuration and equal to diffusers' own.

Each is for one drawing: `timesteps` says what to feed the network, `step` moves the latents one
step towards the picture. Coefficients are Python floats, so float32 latents stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge_agent.diffusion.samplers.ddim import Ddim
from edge_agent.diffusion.samplers.dpm import DpmSolverPlusPlus
from edge_agent.diffusion.samplers.euler import Euler, EulerAncestral
from edge_agent.diffusion.samplers.flow import FlowEuler
from edge_agent.diffusion.samplers.lcm import Lcm
from edge_agent.diffusion.samplers.schedule import Sampler
from edge_agent.errors import BundleError, ConfigError
from edge_agent.types import SamplerName

__all__ = [
    "BY_DEFAULT",
    "SCHEDULERS",
    "make_sampler",
    "overridden",
    "sampler_name",
]

# Scheduler classes of diffusers, each with the sampler that walks its path.
SCHEDULERS: dict[str, Callable[[Mapping[str, Any], int], Sampler]] = {
    "DDIMScheduler": Ddim,
    "DPMSolverMultistepScheduler": DpmSolverPlusPlus,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
    "EulerDiscreteScheduler": Euler,
    "FlowMatchEulerDiscreteScheduler": FlowEuler,
    "LCMScheduler": Lcm,
}
_FLOW = "FlowMatchEulerDiscreteScheduler"
# What a name stands for: a scheduler class, and the options that make it this sampler. Latents
# are not clipped to [-1, 1], which is the range of pixels and DDIM's default.
_NAMED: dict[SamplerName, dict[str, Any]] = {
    SamplerName.DDIM: {"_class_name": "DDIMScheduler", "clip_sample": False},
    SamplerName.EULER: {"_class_name": "EulerDiscreteScheduler"},
    SamplerName.EULER_A: {"_class_name": "EulerAncestralDiscreteScheduler"},
    SamplerName.DPMPP_2M: {
        "_class_name": "DPMSolverMultistepScheduler",
        "use_karras_sigmas": False,
    },
    SamplerName.DPMPP_2M_KARRAS: {
        "_class_name": "DPMSolverMultistepScheduler",
        "use_karras_sigmas": True,
    },
    SamplerName.LCM: {"_class_name": "LCMScheduler"},
    SamplerName.FLOW_EULER: {"_class_name": _FLOW},
}
# Options that a class of diffusers only has by default are not the model's, and do not move on to
# another class: schedulers list them under this key. How the model was trained always moves on.
BY_DEFAULT = "_use_default_values"
_TRAINED = {
    "beta_end",
    "beta_schedule",
    "beta_start",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "trained_betas",
}


def make_sampler(config: Mapping[str, Any], steps: int) -> Sampler:
    """Build the sampler that a diffusers `scheduler_config` describes, for `steps` steps.

    Raises BundleError naming the class or option that the device does not know, ConfigError for a
    number of steps that the sampler cannot take.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise BundleError(
            f"the scheduler {name!r} is not supported on the device; export the model with one of "
            f"{', '.join(sorted(SCHEDULERS))}"
        )
    return SCHEDULERS[name](config, steps)


def sampler_name(config: Mapping[str, Any]) -> SamplerName:
    """Return the name of the sampler that `make_sampler` builds from a configuration."""
    kind, karras = config["_class_name"], bool(config.get("use_karras_sigmas"))
    return next(
        name
        for name, options in _NAMED.items()
        if options["_class_name"] == kind and options.get("use_karras_sigmas", karras) is karras
    )


def overridden(config: Mapping[str, Any], name: SamplerName) -> Mapping[str, Any]:
    """Return the configuration under which `name` draws with the model of `config`.

    What the model was trained with stays: betas, prediction type, spacing. Raises ConfigError when
    one of the two is for flow matching and the other is not.
    """
    options = _NAMED[name]
    if sampler_name(config) == name:
        return config
    if (options["_class_name"] == _FLOW) is not (config["_class_name"] == _FLOW):
        others = [each.value for each, its in _NAMED.items() if its["_class_name"] != _FLOW]
        fitting = [SamplerName.FLOW_EULER.value] if config["_class_name"] == _FLOW else others
        raise ConfigError(
            f"the sampler {str(name)!r} cannot draw with this model, which is "
            f"{'' if config['_class_name'] == _FLOW else 'not '}trained by flow matching; "
            f"choose {' or '.join(fitting)}"
        )
    by_default = {*config.get(BY_DEFAULT, ()), BY_DEFAULT} - _TRAINED
    return {key: value for key, value in config.items() if key not in by_default} | options
