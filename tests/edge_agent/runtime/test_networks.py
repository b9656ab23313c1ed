"""Networks open when needed, stay as long as the memory mode says, and answer the same in each."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle import Component, open_bundle
from edge_agent.errors import BundleError, Cancelled, ConfigError, GenerationError
from edge_agent.runtime import openvino
from edge_agent.runtime.checked import Checked
from edge_agent.runtime.network import Engine, Shapes
from edge_agent.runtime.networks import Networks
from edge_agent.runtime.session import Session
from edge_agent.types import Cancellation, Memory, Provider

LATENT = {"latent_sample": np.ones((1, 4, 8, 8), np.float32)}
MASK = {"hidden": np.ones((1, 3, 8), np.float32), "mask": np.ones((1, 3), np.float32)}
needs_openvino = pytest.mark.skipif(openvino.version() is None, reason="OpenVINO is not installed")


class Counting(Networks):
    """Networks that remember what was opened."""

    started: list[tuple[str, Provider, Shapes | None]]

    def start(self, part: Component, provider: Provider, shapes: Shapes | None) -> Engine:
        self.started = [*getattr(self, "started", []), (part.name, provider, shapes)]
        return super().start(part, provider, shapes)


def networks(folder: Path, **options: object) -> Counting:
    return Counting(open_bundle(folder), threads=1, cache=folder / "cache", **options)


def names(opened: Counting) -> list[str]:
    return [name for name, _, _ in opened.started]


def test_a_network_opens_at_its_first_run_and_stays(tiny_bundle: Path) -> None:
    opened = networks(tiny_bundle)
    decoder = opened.get("vae_decoder")
    assert opened.backends == {}
    first, second = decoder.run(LATENT), decoder.run(LATENT)
    np.testing.assert_array_equal(first, second)
    assert names(opened) == ["vae_decoder"]
    assert opened.get("vae_decoder") is decoder
    assert str(opened.backends["vae_decoder"]).startswith("cpu (onnxruntime ")


def test_engines_of_tensorrt_have_a_place_of_their_own_for_whatever_they_are_built_for(
    tiny_bundle: Path,
) -> None:
    small, large = ({"latent_sample": (1, 4, side, side)} for side in (8, 16))
    normal = networks(tiny_bundle)
    decoder, predictor = (normal.bundle.components[each] for each in ("vae_decoder", "predictor"))
    places = [
        normal.kept(decoder, Provider.TENSORRT, small),
        normal.kept(decoder, Provider.TENSORRT, large),
        normal.kept(predictor, Provider.TENSORRT, small),
        normal.kept(decoder, Provider.CUDA, small),
        networks(tiny_bundle, memory=Memory.LOW).kept(decoder, Provider.TENSORRT, small),
    ]
    assert len(set(places)) == len(places)
    again = networks(tiny_bundle).kept(decoder, Provider.TENSORRT, dict(small))
    assert again == places[0]


def test_with_little_memory_only_one_is_open_at_a_time(tiny_bundle: Path) -> None:
    opened = networks(tiny_bundle, memory=Memory.LOW)
    decoder, predictor = opened.get("vae_decoder"), opened.get("predictor")
    opened.open_now(decoder, predictor)
    opened.open_soon(decoder, predictor)
    assert opened.backends == {}
    decoder.run(LATENT)
    decoder.run(LATENT)
    predictor.run(MASK)
    decoder.run(LATENT)
    assert names(opened) == ["vae_decoder", "predictor", "vae_decoder"]
    opened.release()
    decoder.run(LATENT)
    assert len(opened.started) == 4


def test_usual_memory_keeps_networks_between_requests(tiny_bundle: Path) -> None:
    opened = networks(tiny_bundle)
    opened.get("vae_decoder").run(LATENT)
    opened.release()
    opened.get("predictor").run(MASK)
    opened.get("vae_decoder").run(LATENT)
    assert names(opened) == ["vae_decoder", "predictor"]


def test_what_opens_in_the_background_is_open_for_its_run(tiny_bundle: Path) -> None:
    opened = networks(tiny_bundle)
    decoder = opened.get("vae_decoder")
    opened.open_soon(decoder)
    decoder.run(LATENT)
    opened.close()
    assert names(opened) == ["vae_decoder"]


def test_what_fails_in_the_background_is_told_at_the_run(tiny_bundle: Path) -> None:
    opened = networks(tiny_bundle)
    (tiny_bundle / "vae_decoder" / "model.onnx").write_bytes(b"damaged while running")
    decoder = opened.get("vae_decoder")
    opened.open_soon(decoder)
    with pytest.raises(BundleError, match="cannot load"):
        decoder.run(LATENT)
    opened.close()


def test_after_closing_it_opens_again(tiny_bundle: Path) -> None:
    opened = networks(tiny_bundle)
    decoder = opened.get("vae_decoder")
    first = decoder.run(LATENT)
    opened.close()
    np.testing.assert_array_equal(decoder.run(LATENT), first)
    assert names(opened) == ["vae_decoder", "vae_decoder"]


def test_threads_open_a_network_once(tiny_bundle: Path) -> None:
    opened = networks(tiny_bundle)
    decoder = opened.get("vae_decoder")
    threads = [threading.Thread(target=decoder.run, args=(LATENT,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(opened) == ["vae_decoder"]


def test_nothing_is_opened_once_cancelled(tiny_bundle: Path) -> None:
    opened, cancellation = networks(tiny_bundle), Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        opened.get("vae_decoder").run(LATENT, cancellation)
    assert opened.backends == {}


def test_an_absent_provider_is_refused_before_anything_is_opened(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "version", lambda: None)
    with pytest.raises(ConfigError, match="provider openvino is not installed here"):
        networks(tiny_bundle, provider=Provider.OPENVINO)


@needs_openvino
def test_openvino_compiles_for_each_size_and_keeps_one_or_all(tiny_bundle: Path) -> None:
    wide = {"latent_sample": np.ones((1, 4, 8, 16), np.float32)}
    counts = {}
    for memory in (Memory.NORMAL, Memory.HIGH):
        opened = networks(tiny_bundle, provider=Provider.OPENVINO, memory=memory)
        decoder = opened.get("vae_decoder", static=True)
        for feeds in (LATENT, wide, LATENT):
            decoder.run(feeds)
        counts[memory] = len(opened.started)
    assert counts == {Memory.NORMAL: 3, Memory.HIGH: 2}
    kept = sorted((tiny_bundle / "cache" / "compiled").glob("*.blob"))
    assert len(kept) == 2
    assert all(file.name.startswith("vae_decoder-openvino-") for file in kept)


@needs_openvino
def test_what_was_compiled_for_a_size_opens_ahead_of_its_next_run(tiny_bundle: Path) -> None:
    sizes = {side: {"latent_sample": (1, 4, 8, side)} for side in (8, 16, 24)}
    for side in (8, 16):
        before = networks(tiny_bundle, provider=Provider.OPENVINO).get("vae_decoder", static=True)
        before.open(sizes[side])  # not compiled for it yet
        assert before.backend is None
        before.run({"latent_sample": np.ones(sizes[side]["latent_sample"], np.float32)})
    for known, ahead in (({}, 16), (sizes[8], 8), (sizes[16], 16), (sizes[24], None)):
        opened = networks(tiny_bundle, provider=Provider.OPENVINO)
        decoder = opened.get("vae_decoder", static=True)
        opened.open_now(decoder, known={"vae_decoder": known})
        if ahead is None:
            assert opened.backends == {}
            continue
        decoder.run({"latent_sample": np.ones(sizes[ahead]["latent_sample"], np.float32)})
        assert opened.started == [("vae_decoder", Provider.OPENVINO, sizes[ahead])]


@needs_openvino
def test_what_decides_is_compared_with_the_cpu_once(tiny_bundle: Path) -> None:
    wanted = networks(tiny_bundle).get("predictor").run(MASK)[0]
    opened = networks(tiny_bundle, provider=Provider.OPENVINO)
    for _ in range(2):
        found = opened.get("predictor", precise=True).run(MASK)[0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    exact = Provider.OPENVINO_F32
    compared = [("predictor", exact, None), ("predictor", Provider.CPU, None)]
    assert opened.started == compared
    again = networks(tiny_bundle, provider=Provider.OPENVINO)
    again.get("predictor", precise=True).run(MASK)
    assert again.started == [("predictor", exact, None)]


def test_an_engine_that_computes_wrongly_is_refused_each_time(tiny_bundle: Path) -> None:
    class Wrong(Session):
        def run(
            self, feeds: dict[str, np.ndarray], cancellation: Cancellation | None = None
        ) -> list[np.ndarray]:
            return [-output for output in super().run(feeds, cancellation)]

    file = tiny_bundle / "predictor" / "model.onnx"
    passed: list[float] = []
    engine = Checked("predictor", Wrong(file), lambda: Session(file), passed.append)
    for _ in range(2):
        with pytest.raises(GenerationError, match=r"computes predictor wrongly here \(-\d dB"):
            engine.run(MASK)
    assert passed == []
