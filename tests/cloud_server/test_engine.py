"""The diffusers engine on a tiny random pipeline: seeds, steps, stopping, and bad folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from cloud_server.engine import DiffusersEngine, Order, Stopped, check_model  # noqa: E402
from cloud_server.errors import DrawError, ModelError  # noqa: E402
from edge_agent.cloud.client import CloudClient  # noqa: E402
from edge_agent.errors import Cancelled  # noqa: E402
from edge_agent.types import Cancellation, Event, Request, Step  # noqa: E402
from tests.tiny import make_pipeline  # noqa: E402
from tests.wire import running_server  # noqa: E402

ORDER = Order("a cat on grass", "", 3, 64, 64, 2, 4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("models") / "cloud")


@pytest.fixture(scope="module")
def engine(folder: Path) -> DiffusersEngine:
    return DiffusersEngine.load(str(folder), device="cpu")


def draw(engine: DiffusersEngine, order: Order = ORDER) -> bytes:
    return engine.draw(order, lambda _index, _total: None, lambda: False).tobytes()


def test_the_folder_says_what_is_drawn_by_default(engine: DiffusersEngine, folder: Path) -> None:
    card = engine.card
    assert card.name == f"{folder.parent.name}/cloud"
    assert (card.width, card.height, card.steps, card.guidance) == (64, 64, 2, 4.0)
    assert (card.min_size, card.max_size, card.size_multiple) == (16, 128, 8)


def test_a_foreign_folder_gets_defaults_from_its_network(folder: Path, tmp_path: Path) -> None:
    foreign = shutil.copytree(folder, tmp_path / "foreign")
    (foreign / "defaults.json").unlink()
    card = DiffusersEngine.load(str(foreign), device="cpu").card
    assert (card.width, card.height, card.steps, card.guidance) == (64, 64, 20, 7.5)


def test_an_order_gives_the_same_picture_again_and_another_seed_another(
    engine: DiffusersEngine,
) -> None:
    assert draw(engine) == draw(engine)
    assert draw(engine) != draw(engine, replace(ORDER, seed=2**63 - 1))


def test_every_setting_changes_the_picture(engine: DiffusersEngine) -> None:
    plain = draw(engine)
    for changed in (
        replace(ORDER, prompt="two red apples"),
        replace(ORDER, negative_prompt="the beach"),
        replace(ORDER, steps=3),
        replace(ORDER, guidance=1.5),
    ):
        assert draw(engine, changed) != plain
    image = engine.draw(replace(ORDER, width=72, height=32), lambda *_: None, lambda: False)
    assert image.size == (72, 32)


def test_every_step_is_reported(engine: DiffusersEngine) -> None:
    told: list[tuple[int, int]] = []
    engine.draw(replace(ORDER, steps=4), lambda *step: told.append(step), lambda: False)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("enough", [0, 1, 3])
def test_it_stops_within_a_step(engine: DiffusersEngine, enough: int) -> None:
    done: list[int] = []
    with pytest.raises(Stopped):
        engine.draw(
            replace(ORDER, steps=50),
            lambda index, _total: done.append(index),
            lambda: len(done) >= enough,
        )
    assert len(done) == enough
    assert draw(engine) == draw(engine)  # and the pipeline is as good as before


def test_a_special_token_in_a_prompt_is_plain_text(engine: DiffusersEngine) -> None:
    cut = draw(engine, replace(ORDER, prompt="a cat"))
    assert draw(engine, replace(ORDER, prompt="a cat<|endoftext|>")) != cut


def test_a_prompt_longer_than_the_model_reads_is_drawn(
    engine: DiffusersEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    assert draw(engine, replace(ORDER, prompt="a cat " * 600))
    assert capfd.readouterr() == ("", "")  # no log has what somebody asked for


def test_what_the_network_cannot_do_is_one_sentence(
    engine: DiffusersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_settings: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 8 GB\n  at line 7")

    monkeypatch.setattr(engine._pipeline.unet, "forward", fail)
    with pytest.raises(DrawError, match="could not draw 64x64 in 2 steps: not enough memory") as e:
        draw(engine)
    assert "\n" not in str(e.value)


def broken(folder: Path, tmp_path: Path, name: str, text: str | None) -> str:
    copy = shutil.copytree(folder, tmp_path / "broken")
    if text is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(text, encoding="utf-8")
    return str(copy)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("model_index.json", None, "holds no model_index.json"),
        ("model_index.json", "{", "cannot load"),
        ("model_index.json", '{"_class_name": "NoSuchPipeline"}', "cannot load"),
        ("unet/diffusion_pytorch_model.safetensors", "", "cannot load"),
        ("defaults.json", "{", "is not JSON"),
        ("defaults.json", "{}", "has width = None"),
        (
            "defaults.json",
            json.dumps({"width": 64, "height": 64, "steps": -1, "guidance": 4}),
            "has steps = -1",
        ),
    ],
)
def test_a_damaged_folder_is_one_sentence_that_names_it(
    name: str, text: str | None, told: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=told) as caught:
        DiffusersEngine.load(broken(folder, tmp_path, name, text), device="cpu")
    assert "\n" not in str(caught.value)
    assert "broken" in str(caught.value)


@pytest.mark.parametrize(
    "model", ["", "./missing", "/nowhere/at/all", "missing", "../a/b", "~/none", "a/b/c"]
)
def test_what_is_neither_folder_nor_hub_id_is_named(model: str) -> None:
    with pytest.raises(ModelError, match="model") as caught:
        check_model(model)
    assert model in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file"):
        check_model(str(tmp_path / "model.safetensors"))


def test_a_hub_id_that_cannot_be_fetched_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="check the id, the network"):
        DiffusersEngine.load("nobody/no-such-model", device="cpu")


def test_a_device_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="device 'cuda:99' is not here"):
        DiffusersEngine.load(str(folder), device="cuda:99")


@pytest.fixture
def client(engine: DiffusersEngine) -> Iterator[CloudClient]:
    with running_server(engine) as server, CloudClient(server.address) as client:
        yield client


def test_a_picture_of_the_model_crosses_the_wire_unchanged(
    client: CloudClient, engine: DiffusersEngine
) -> None:
    picture = client.generate(Request("a cat on grass", guidance=4.0), request_id="", seed=3)
    assert picture.image.tobytes() == draw(engine)


def test_a_client_that_leaves_stops_the_model_within_a_step(client: CloudClient) -> None:
    cancellation = Cancellation()

    def leave(event: Event) -> None:
        if isinstance(event, Step):
            cancellation.cancel()

    request = Request("a cat", steps=200)
    with pytest.raises(Cancelled):
        client.generate(request, request_id="", seed=1, on_event=leave, cancellation=cancellation)
    # The one worker is free again long before 200 steps.
    picture = client.generate(Request("a cat"), request_id="", seed=1)
    assert picture.timings_ms["queue"] < picture.timings_ms["total"]


def test_other_weights_under_the_same_name_have_another_digest(
    engine: DiffusersEngine, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "models" / "cloud")
    assert DiffusersEngine.load(str(copy), device="cpu").card.digest == engine.card.digest
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: value * 1.01 for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert DiffusersEngine.load(str(copy), device="cpu").card.digest != engine.card.digest
