"""What a folder says of itself, before anything of it is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from export.sources import Pipeline, open_pipeline
from tests import tiny


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tiny.make_pipeline(tmp_path_factory.mktemp("sources") / "tiny")
    (folder / "defaults.json").unlink()
    return open_pipeline(str(folder))


def test_pictures_may_be_twice_the_size_of_training_a_side(pipeline):
    assert pipeline.max_size == 128


def test_a_transformer_draws_no_larger_than_it_has_positions(pipeline):
    changes = {"patch_size": 2, "pos_embed_max_size": 6}
    assert replace(pipeline, denoiser=pipeline.denoiser | changes).max_size == 96


@pytest.mark.parametrize(
    ("scheduler", "denoiser", "drawing"),
    [
        ({"_class_name": "DDIMScheduler"}, {}, (20, 7.5)),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, {}, (20, 7.5)),
        (
            {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
            {},
            (1, 0.0),
        ),
        ({"_class_name": "LCMScheduler"}, {}, (4, 1.0)),
        ({"_class_name": "LCMScheduler"}, {"time_cond_proj_dim": 256}, (4, 8.5)),
    ],
)
def test_steps_and_guidance_go_with_the_scheduler(pipeline, scheduler, denoiser, drawing):
    usual = replace(pipeline, scheduler=scheduler, denoiser=denoiser).drawing()
    assert (usual.steps, usual.guidance) == drawing


@pytest.mark.parametrize(
    ("vae", "factors"),
    [
        ({"_class_name": "AutoencoderKL"}, (0.18215, 0.0)),  # as Stable Diffusion 1's is saved
        ({"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}, (0.13025, 0.0)),
        (
            {"_class_name": "AutoencoderKL", "scaling_factor": 1.5305, "shift_factor": 0.0609},
            (1.5305, 0.0609),
        ),
        ({"_class_name": "AutoencoderTiny"}, (1.0, 0.0)),
    ],
)
def test_latents_are_scaled_as_the_autoencoder_wants(pipeline, vae, factors):
    changed = replace(pipeline, vae=vae)
    assert (changed.scaling_factor, changed.shift_factor) == factors


def test_only_xl_takes_zeros_for_an_empty_prompt(pipeline):
    from export.families import STABLE_DIFFUSION_XL

    said = {"force_zeros_for_empty_prompt": True}
    assert not replace(pipeline, index=said).empty_is_zeros
    xl = replace(pipeline, family=STABLE_DIFFUSION_XL)
    assert replace(xl, index={}).empty_is_zeros  # diffusers' default
    assert not replace(xl, index={"force_zeros_for_empty_prompt": False}).empty_is_zeros
