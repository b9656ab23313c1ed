"""Distillation: the step of the student is the one that pipelines and the device take."""

from __future__ import annotations

import pytest
import torch

from cloud_server.training.starter.diffusion import DISTILLED_STEPS, NOISE, ddim_step
from edge_agent.diffusion.samplers import make_sampler
from tests.tiny import guard

guard()
from diffusers import DDIMScheduler  # noqa: E402  the guard must come first


@pytest.fixture
def schedule() -> DDIMScheduler:
    schedule = DDIMScheduler(**NOISE, clip_sample=False)
    schedule.set_timesteps(DISTILLED_STEPS)
    return schedule


def test_a_step_leads_where_the_schedulers_lead(schedule):
    rng = torch.Generator().manual_seed(0)
    device = make_sampler(
        {"_class_name": "DDIMScheduler", **schedule.config}, steps=DISTILLED_STEPS
    )
    stops = schedule.timesteps.tolist()
    alphas = torch.cat([schedule.alphas_cumprod, torch.ones(1)])
    for index, (start, stop) in enumerate(zip(stops, [*stops[1:], -1], strict=True)):
        latents, velocity = torch.randn(2, 1, 4, 8, 8, generator=rng)
        reached, _ = ddim_step(latents, velocity, alphas[start], alphas[stop])
        theirs = schedule.step(velocity, start, latents).prev_sample
        torch.testing.assert_close(reached, theirs, atol=1e-5, rtol=1e-5)
        ours = device.step(velocity.numpy(), latents.numpy(), index, draw=None)
        torch.testing.assert_close(reached, torch.from_numpy(ours), atol=1e-4, rtol=1e-4)


def test_the_gain_is_how_far_a_change_of_velocity_moves_the_step(schedule):
    kept, later = schedule.alphas_cumprod[[999, 749]]
    latents, velocity = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    reached, gain = ddim_step(latents, velocity, kept, later)
    moved, _ = ddim_step(latents, velocity + 1, kept, later)
    torch.testing.assert_close(moved - reached, gain.expand(3))
