"""Painters: pipelines, kept pictures, and a server over a real socket."""

from __future__ import annotations

import hashlib
import shutil
import threading
from concurrent import futures
from dataclasses import replace

import grpc
import numpy as np
import pytest
from PIL import Image

from cloud_server.errors import ConfigError, DrawError, ModelError
from cloud_server.training.digest import folder_digest
from cloud_server.training.labels import KeptPainter, PipelinePainter
from cloud_server.training.labels.remote import RemotePainter
from protos.t2i.v1 import image_generation_pb2 as pb
from protos.t2i.v1 import image_generation_pb2_grpc as pb_grpc
from tests.tiny import make_pipeline
from tests.wire import PATIENCE_S, HeldEngine, free_port, running_server, server_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("models") / "edge")


def test_a_painter_draws_what_the_pipeline_draws_in_any_batch(folder):
    painter = PipelinePainter(folder, "cpu")
    together = painter.draw(["a cat", "two dogs", "a cat"], [1, 2, 3])
    alone = painter.draw(["two dogs"], [2])
    assert [picture.size for picture in together] == [(64, 64)] * 3
    np.testing.assert_allclose(np.asarray(alone[0], int), np.asarray(together[1], int), atol=1)
    assert np.asarray(together[0]).tolist() != np.asarray(together[2]).tolist()


def test_a_painter_is_known_by_weights_and_settings_and_not_by_its_place(folder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert PipelinePainter(copy).digest == PipelinePainter(folder).digest == folder_digest(folder)
    (copy / "defaults.json").write_text('{"width":64,"height":64,"steps":3,"guidance":4.0}')
    assert PipelinePainter(copy).digest != PipelinePainter(folder).digest
    assert PipelinePainter(copy).settings["steps"] == 3
    (copy / "defaults.json").unlink()
    assert PipelinePainter(copy).settings == {
        "width": 64, "height": 64, "steps": 20, "guidance": 7.5,
    }  # fmt: skip


def test_what_is_no_model_is_one_sentence_at_once(tmp_path):
    with pytest.raises(ModelError, match=r"holds no model_index\.json"):
        PipelinePainter(tmp_path)
    with pytest.raises(ModelError, match="cannot fetch nobody/nothing"):
        PipelinePainter("nobody/nothing")


class Counting:
    """Paints noise of the seed, and counts."""

    name, digest = "counting", "0123456789abcdef"

    def __init__(self):
        self.settings = {"steps": 1}
        self.drawn = []

    def draw(self, prompts, seeds):
        self.drawn += zip(prompts, seeds, strict=True)
        noise = [
            np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8) for seed in seeds
        ]
        return [Image.fromarray(array) for array in noise]


def pixels(pictures):
    return [np.asarray(picture).tolist() for picture in pictures]


def test_pictures_are_kept_by_model_prompt_and_seed_and_not_drawn_again(tmp_path):
    first = KeptPainter(Counting(), tmp_path)
    drawn = first.draw(["a cat", "two dogs"], [1, 2])
    known = hashlib.sha256(b"two dogs").hexdigest()[:16]
    assert first.file("two dogs", 2) == tmp_path / "0123456789ab" / f"{known}-2.png"
    assert len(list(tmp_path.rglob("*"))) == 3
    inner = Counting()
    again = KeptPainter(inner, tmp_path).draw(["two dogs", "a house", "a cat"], [2, 9, 1])
    assert inner.drawn == [("a house", 9)]
    assert pixels([again[2], again[0]]) == pixels(drawn)


def test_half_a_picture_does_not_count(tmp_path):
    first = KeptPainter(Counting(), tmp_path)
    drawn = first.draw(["a cat"], [1])
    file = first.file("a cat", 1)
    file.write_bytes(file.read_bytes()[:-40])
    inner = Counting()
    assert pixels(KeptPainter(inner, tmp_path).draw(["a cat"], [1])) == pixels(drawn)
    assert inner.drawn == [("a cat", 1)]
    assert pixels([Image.open(file)]) == pixels(drawn)


def test_a_folder_that_takes_no_pictures_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DrawError, match="cannot keep the picture"):
        KeptPainter(Counting(), tmp_path / "file").draw(["a cat"], [1])


def test_a_server_draws_with_its_defaults_and_the_seeds_asked_for():
    engine = HeldEngine(held=False)
    with running_server(engine) as server:
        painter = RemotePainter(server.address)
        assert painter.name == "held/model"
        assert painter.settings == {"width": 64, "height": 48, "steps": 4, "guidance": 5.0}
        assert painter.digest == RemotePainter(server.address).digest
        pictures = painter.draw(["a", "bb", "ccc"], [5, 6, 7])
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(5, 4, 1), (6, 4, 2), (7, 4, 3)]
    assert {picture.size for picture in pictures} == {(64, 48)}
    assert sorted(order.seed for order in engine.orders) == [5, 6, 7]


def test_a_full_queue_is_waited_for_as_long_as_the_server_says():
    engine = HeldEngine()
    waits: list[float] = []

    def sleep(seconds):
        waits.append(seconds)
        engine.release()
        threading.Event().wait(0.05)

    with running_server(engine, queue_limit=0) as server:
        pictures = RemotePainter(server.address, wait=sleep).draw(["a", "bb", "ccc"], [1, 2, 3])
    assert len(pictures) == 3
    assert waits
    assert set(waits) <= {wait for wait in waits if 0.01 <= wait <= 2.0}
    assert len(engine.orders) == 3, "nothing is drawn twice"


def test_patience_with_a_server_that_is_gone_ends_in_one_sentence():
    waits: list[float] = []
    painter = RemotePainter(f"127.0.0.1:{free_port()}", patience_s=10.0, wait=waits.append)
    painter.__dict__["_capabilities"] = pb.Capabilities(
        models=[pb.Model(name="m", default_width=64, default_height=64, default_steps=1)]
    )
    with pytest.raises(DrawError, match=r"draws no picture \(UNAVAILABLE: .*run the same command"):
        painter.draw(["a cat"], [1])
    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_a_server_that_was_killed_and_comes_back_is_asked_again():
    with server_process() as first:
        address = first.address
        painter = RemotePainter(address, patience_s=1e6)
        assert painter.name == "held/model"
    gone, back = threading.Event(), threading.Event()

    def sleep(_seconds):
        gone.set()
        assert back.wait(PATIENCE_S)

    painter._wait = sleep
    with futures.ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(painter.draw, ["a cat"], [3])
        assert gone.wait(PATIENCE_S)
        port = int(address.rpartition(":")[2])
        with running_server(HeldEngine(held=False), port=port):
            back.set()
            (picture,) = drawing.result(PATIENCE_S)
    assert picture.getpixel((0, 0)) == (3, 4, 5)


def test_a_server_that_says_never_is_not_asked_again():
    waits: list[float] = []
    with running_server(HeldEngine(held=False)) as server:
        painter = RemotePainter(server.address, wait=waits.append)
        assert painter.name == "held/model"
        server.studio._draining = True
        with pytest.raises(DrawError, match="shutting down"):
            painter.draw(["a cat"], [1])
    assert waits == []


class Answering(pb_grpc.ImageGenerationServicer):
    """Answers with what it is given."""

    def __init__(self, *events):
        self._events = events

    def GetCapabilities(self, request, context):
        return pb.Capabilities(models=[pb.Model(name="m", default_width=8, default_height=8)])

    def Generate(self, request, context):
        yield from self._events


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([pb.GenerateEvent(step=pb.Step(index=1, total=1))], "without a picture"),
        ([pb.GenerateEvent(image=pb.Image(data=b"no PNG"))], "sent a damaged PNG"),
    ],
)
def test_an_answer_that_is_no_picture_is_one_sentence(events, told):
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_ImageGenerationServicer_to_server(Answering(*events), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(DrawError, match=told):
            RemotePainter(f"127.0.0.1:{port}").draw(["a cat"], [1])
    finally:
        server.stop(0).wait()


def test_an_address_that_is_none_and_one_where_nobody_is_are_one_sentence():
    with pytest.raises(ConfigError, match="'nonsense' is not HOST:PORT"):
        RemotePainter("nonsense")
    nobody = RemotePainter(f"127.0.0.1:{free_port()}", patience_s=0.0)
    with pytest.raises(DrawError, match="draws no picture"):
        nobody.digest  # noqa: B018  asking is the point


def test_a_server_that_is_loading_is_waited_for():
    loaded, waits = threading.Event(), []

    def load():
        assert loaded.wait(PATIENCE_S)
        return HeldEngine(held=False)

    def wait(seconds):
        waits.append(seconds)
        loaded.set()
        threading.Event().wait(0.05)

    with running_server(load) as server:
        painter = RemotePainter(server.address, wait=wait)
        assert painter.name == "held/model"
        (picture,) = painter.draw(["a cat"], [3])
    assert picture.size == (64, 48)
    assert waits[0] == 2.0


def test_a_prompt_that_the_cloud_does_not_read_is_said_before_anything_is_drawn():
    engine = HeldEngine(held=False)
    with running_server(engine) as server:
        painter = RemotePainter(server.address)
        painter.check(["a cat"])
        with pytest.raises(DrawError, match=r"reads 4096 bytes of a prompt, and .* has 6005"):
            painter.check(["a cat", "a big" + " dog" * 1500])
    assert engine.orders == []


def test_other_weights_of_one_name_are_another_model():
    digests = set()
    for digest in ("one", "two", "two"):
        engine = HeldEngine(held=False)
        engine.card = replace(engine.card, digest=digest)
        with running_server(engine) as server:
            digests.add(RemotePainter(server.address).digest)
    assert len(digests) == 2


def test_giving_up_ends_the_waiting_of_all():
    """What Ctrl-C does: the main thread leaves, and the others have to hear of it."""
    waiting = threading.Event()
    painter = RemotePainter(f"127.0.0.1:{free_port()}", patience_s=1e6)
    painter.__dict__["_capabilities"] = pb.Capabilities(
        models=[pb.Model(name="m", default_width=64, default_height=64, default_steps=1)]
    )
    real = painter._given_up.wait

    def wait(seconds):
        waiting.set()
        return real(1e6)

    painter._wait = wait
    with futures.ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(painter.draw, ["a cat", "a dog"], [1, 2])
        assert waiting.wait(PATIENCE_S)
        painter._given_up.set()
        with pytest.raises(DrawError, match="not waited for any longer"):
            drawing.result(PATIENCE_S)
