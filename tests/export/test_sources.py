"""What a folder says of itself, before anything of it is loaded."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest

from export.errors import ExportError
from export.sources import REPLACED, SOLVER, Pipeline, open_pipeline, with_preview, with_vae
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
        ({"_class_name": "EulerDiscreteScheduler"}, {}, (20, 7.5)),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, {}, (1, 0.0)),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "trailing",
                "rescale_betas_zero_snr": True,
            },
            {},
            (20, 7.5),
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


def changed_json(folder, name, **changes):
    """Write changes into a JSON file of a pipeline; None takes a key away."""
    content = json.loads((folder / name).read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / name).write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("unet/config.json", {"in_channels": 9}, "takes latents of 9 channels, and the unet gives"),
        ("vae/config.json", {"latent_channels": 5}, "of 8 channels, and its autoencoder has 5"),
        ("unet/config.json", {"in_channels": None}, "does not say its in_channels"),
        (
            "vae/config.json",
            {"block_out_channels": None, "decoder_block_out_channels": None},
            "does not say its block_out_channels",
        ),
        ("model_index.json", {"unet": "x"}, "the unet of .* is a None"),
        ("unet/config.json", {"sample_size": "x"}, "unet/config.json' says sample_size='x'"),
        (
            "unet/config.json",
            {"sample_size": [8, 0]},
            r"says sample_size=\[8, 0\], which must",
        ),
        ("vae/config.json", {"scaling_factor": "x"}, "vae/config.json' says scaling_factor='x'"),
        (
            "scheduler/scheduler_config.json",
            {"beta_start": "x"},
            "scheduler_config.json' says beta_start='x', which must be a number;",
        ),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 0},
            "says num_train_timesteps=0, which must be a whole number above 0;",
        ),
    ],
)
def test_a_folder_whose_parts_do_not_go_together_is_refused(tmp_path, name, changes, told):
    folder = tiny.make_pipeline(tmp_path / "tiny")
    changed_json(folder, name, **changes)
    with pytest.raises(ExportError, match=told):
        open_pipeline(str(folder))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "default steps of 'tiny' is 0; it must be a number above 0"),
        ({"width": "abc"}, "width of 'tiny' is 'abc'"),
        (
            {"width": 65},
            "default size of 'tiny' is 65x64; sides must be multiples of 8",
        ),
        ({"guidance": -1}, "guidance of 'tiny' is -1; .* a number from 0 on"),
        ({"guidance": math.nan}, "guidance of 'tiny' is nan"),
    ],
)
def test_defaults_that_nothing_can_be_drawn_by_are_refused(tmp_path, changes, told):
    folder = tiny.make_pipeline(tmp_path / "tiny")
    changed_json(folder, "defaults.json", **changes)
    with pytest.raises(ExportError, match=told):
        open_pipeline(str(folder)).drawing()


@pytest.mark.parametrize("solver", REPLACED)
def test_the_path_of_another_solver_is_kept_and_its_own_options_are_not(tmp_path, solver):
    folder = tiny.make_pipeline(tmp_path / "tiny")
    kind = getattr(diffusers, solver)
    own = {"beta_start": 0.003, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    kind(**own).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    changed_json(folder, "model_index.json", scheduler=["diffusers", solver])
    assert index["scheduler"][1] != solver
    scheduler = open_pipeline(str(folder)).scheduler
    assert scheduler["_class_name"] == SOLVER
    assert own.items() <= scheduler.items()
    assert "solver_type" not in scheduler


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """Put a folder where huggingface_hub keeps what it has fetched of a hub id."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def keep(name: str, folder: Path) -> Path:
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("0" * 40)
        return Path(shutil.copytree(folder, home / "snapshots" / ("0" * 40)))

    return keep


def test_pipeline_and_autoencoders_may_be_hub_ids(tmp_path, fetched):
    folder = tiny.make_pipeline(tmp_path / "tiny")
    fetched("some/pipeline", folder)
    small = fetched("some.one/taesd", folder / "vae")
    pipeline = open_pipeline("some/pipeline")
    assert pipeline.name == "some/pipeline"
    assert with_vae(pipeline, "some.one/taesd").vae_folder == small
    assert with_preview(pipeline, "some.one/taesd").preview_vae == small


def test_an_autoencoder_that_is_neither_folder_nor_fetched_is_named(pipeline, tmp_path, fetched):
    with pytest.raises(ExportError, match="'some/other' is no folder here and could not be"):
        with_vae(pipeline, "some/other")
    with pytest.raises(ExportError, match=r"there is no folder '.*taesd'"):
        with_vae(pipeline, str(tmp_path / "taesd"))
