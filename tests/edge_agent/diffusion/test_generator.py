"""Drawing on the device: reproducible, guided, stoppable, and refusing what it cannot draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_agent.bundle import open_bundle
from edge_agent.diffusion.generator import EdgeGenerator
from edge_agent.errors import Cancelled, ConfigError, GenerationError
from edge_agent.routing.encoder import TextEncoder, Tokenizer
from edge_agent.runtime.session import Session
from edge_agent.types import Cancellation, Event, Preview, Request, SamplerName, Step

SwapUnet = Callable[..., None]


def make_generator(
    folder: Path, *, previews: bool = False, tile: int | None = None
) -> EdgeGenerator:
    bundle = open_bundle(folder)
    files = bundle.tokenizers["text_encoder"]
    tokenizer = Tokenizer(folder / files.file, files.context_length, files.pad_id)
    decoder = Session(bundle.path_of("vae_decoder"), threads=1)
    return EdgeGenerator(
        bundle.diffusion,
        denoiser=Session(bundle.path_of("unet"), threads=1),
        vae_decoder=decoder,
        preview_decoder=decoder if previews else None,
        tile=tile,
        text_encoders={
            "text_encoder": TextEncoder(
                Session(bundle.path_of("text_encoder"), threads=1), tokenizer
            )
        },
    )


def pixels(generator: EdgeGenerator, request: Request, seed: int = 7) -> bytes:
    return generator.generate(request, {}, seed).image.tobytes()


def test_equal_seeds_give_equal_pixels_and_others_do_not(tiny_bundle: Path) -> None:
    first, second = make_generator(tiny_bundle), make_generator(tiny_bundle)
    request = Request("a red cat")
    assert pixels(first, request) == pixels(first, request) == pixels(second, request)
    assert pixels(first, request, 8) != pixels(first, request, 7)


def test_prompt_guidance_and_negative_prompt_all_matter(tiny_bundle: Path) -> None:
    generator, request = make_generator(tiny_bundle), Request("a red cat")
    drawn = {
        pixels(generator, request),
        pixels(generator, replace(request, prompt="two dogs")),
        pixels(generator, replace(request, guidance=1.0)),
        pixels(generator, replace(request, negative_prompt="the dog")),
        pixels(generator, replace(request, steps=3)),
    }
    assert len(drawn) == 5


def test_each_sampler_draws_its_own_picture_the_same_each_time(tiny_bundle: Path) -> None:
    generator, request = make_generator(tiny_bundle), Request("a red cat", steps=3)
    drawn = {
        name: pixels(generator, replace(request, sampler=name))
        for name in set(SamplerName) - {SamplerName.FLOW_EULER}
    }
    assert len(set(drawn.values())) == len(drawn) == 6
    assert pixels(generator, request) == drawn[SamplerName.DPMPP_2M]
    for name in (SamplerName.EULER_A, SamplerName.LCM):  # their noise comes from the seed too
        assert pixels(generator, replace(request, sampler=name)) == drawn[name]
        assert pixels(generator, replace(request, sampler=name), 8) != drawn[name]


def test_a_sampler_for_another_kind_of_model_is_refused(tiny_bundle: Path) -> None:
    request = Request("a cat", sampler=SamplerName.FLOW_EULER)
    with pytest.raises(ConfigError, match="not trained by flow matching; choose ddim or euler"):
        make_generator(tiny_bundle).generate(request, {}, 1)


def test_the_picture_reports_what_it_was_drawn_with(tiny_bundle: Path) -> None:
    generator = make_generator(tiny_bundle)
    picture = generator.generate(Request("a cat", width=128, height=32, steps=2), {}, 5)
    assert picture.image.size == (picture.width, picture.height) == (128, 32)
    assert (picture.model, picture.seed, picture.steps, picture.guidance) == ("tiny", 5, 2, 4.0)
    assert picture.sampler is SamplerName.DPMPP_2M
    assert set(picture.timings_ms) == {"condition", "denoise", "decode"}


def test_every_step_is_told(tiny_bundle: Path) -> None:
    events: list[Event] = []
    make_generator(tiny_bundle).generate(Request("a cat"), {}, 1, events.append)
    assert events == [Step(1, 4), Step(2, 4), Step(3, 4), Step(4, 4)]


def test_a_preview_follows_every_so_many_steps_but_not_the_last(tiny_bundle: Path) -> None:
    events: list[Event] = []
    request = Request("a cat", steps=6, preview_every=2, width=64, height=96)
    generator = make_generator(tiny_bundle, previews=True)
    picture = generator.generate(request, {}, 1, events.append).image
    assert [type(each) for each in events] == [Step, Step, Preview] * 2 + [Step, Step]
    shown = [each for each in events if isinstance(each, Preview)]
    assert [each.index for each in shown] == [2, 4]
    assert {each.image.size for each in shown} == {(64, 96)}
    early, late = (distance(each.image, picture) for each in shown)
    assert 0 < late < early  # it becomes the picture
    assert picture.tobytes() == pixels(generator, replace(request, preview_every=None), 1)


def test_without_a_small_decoder_nothing_is_shown(tiny_bundle: Path) -> None:
    events: list[Event] = []
    request = Request("a cat", preview_every=1)
    make_generator(tiny_bundle).generate(request, {}, 1, events.append)
    assert [type(each) for each in events] == [Step] * 4


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b)).mean())


def test_a_picture_in_tiles_comes_near_the_whole_one(tiny_bundle: Path) -> None:
    request = Request("a cat", width=104, height=48)
    whole = np.frombuffer(pixels(make_generator(tiny_bundle), request), np.uint8)
    tiled = np.frombuffer(pixels(make_generator(tiny_bundle, tile=4), request), np.uint8)
    assert 0 < np.abs(tiled.astype(int) - whole).mean() < 1  # it moves cells by half of one


def test_cancelling_stops_before_the_next_tile(tiny_bundle: Path) -> None:
    """The last step is told, and then nothing more is run."""
    cancellation = Cancellation()

    def on_event(event: Event) -> None:
        if event == Step(4, 4):
            cancellation.cancel()

    generator = make_generator(tiny_bundle, tile=4)
    with pytest.raises(Cancelled):
        generator.generate(Request("a cat"), {}, 1, on_event, cancellation)


def test_cancelling_stops_before_the_next_step(tiny_bundle: Path) -> None:
    cancellation, events = Cancellation(), []

    def on_event(event: Event) -> None:
        events.append(event)
        cancellation.cancel()

    generator = make_generator(tiny_bundle)
    with pytest.raises(Cancelled):
        generator.generate(Request("a cat"), {}, 1, on_event, cancellation)
    assert events == [Step(1, 4)]


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (65, 64, "width 65 is not a multiple of 8; choose for example 64"),
        (64, 3, "height 3 is not a multiple of 8; choose for example 8"),
        (1001, 64, "width 1001 is not a multiple of 8; choose for example 128"),
        (64, 136, "height 136 is over the limit of the edge model; choose 8 to 128"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_named(
    tiny_bundle: Path, width: int, height: int, message: str
) -> None:
    request = Request("a cat", width=width, height=height)
    with pytest.raises(ConfigError, match=message):
        make_generator(tiny_bundle).generate(request, {}, 1)


def test_latents_that_are_no_numbers_are_an_error_not_a_black_picture(
    tiny_bundle: Path, swap_unet: SwapUnet
) -> None:
    swap_unet(tiny_bundle, factor=float("inf"))
    generator = make_generator(tiny_bundle)
    with pytest.raises(GenerationError, match=r"step 1 of 4.*lower --guidance than 4"):
        generator.generate(Request("a cat"), {}, 1)
    with pytest.raises(GenerationError, match=r"step 1 of 4.*--precision fp32"):
        generator.generate(Request("a cat", guidance=1.0), {}, 1)


def test_a_consistency_model_is_told_the_guidance_and_runs_without_a_negative_prompt(
    tiny_bundle: Path, swap_unet: SwapUnet
) -> None:
    swap_unet(tiny_bundle, guided=True)
    generator, request = make_generator(tiny_bundle), Request("a red cat", guidance=0.5)
    drawn = pixels(generator, request)
    assert pixels(generator, replace(request, negative_prompt="the dog")) == drawn
    assert pixels(generator, replace(request, guidance=0.7)) != drawn
    strong = replace(request, guidance=1.2)  # where others begin to run twice
    assert pixels(generator, replace(strong, negative_prompt="dog")) == pixels(generator, strong)


def test_the_noise_of_a_seed_is_fixed_for_good() -> None:
    noise = np.random.Generator(np.random.Philox(7)).standard_normal(3, np.float32)
    np.testing.assert_array_equal(noise, np.float32([-0.50237358, 0.50684536, 2.0193486]))
