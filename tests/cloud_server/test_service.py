"""The service over real sockets: events, bad fields, full queue, one id, leaving, draining."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from PIL import Image

from cloud_server.engine import Card
from cloud_server.errors import DrawError
from cloud_server.service import MAX_PROMPT_BYTES, Invalid, order_of
from protos.t2i.v1 import image_generation_pb2 as pb
from protos.t2i.v1 import image_generation_pb2_grpc as pb_grpc
from tests.wire import PATIENCE_S, HeldEngine, running_server, until

CARD = HeldEngine.card


@pytest.fixture
def connect() -> Iterator[Callable[[str], pb_grpc.ImageGenerationStub]]:
    channels: list[grpc.Channel] = []

    def stub(address: str) -> pb_grpc.ImageGenerationStub:
        channels.append(grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]))
        return pb_grpc.ImageGenerationStub(channels[-1])

    yield stub
    for channel in channels:
        channel.close()


def ask(prompt: str = "a cat", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=prompt, **fields)


def kinds(events: list[pb.GenerateEvent]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


def failure(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


def test_a_picture_comes_after_its_progress_with_the_settings_it_was_drawn_with(connect) -> None:
    with running_server(HeldEngine(held=False)) as server:
        events = list(connect(server.address).Generate(ask(seed=2**63 - 1, guidance=4.1)))
    assert kinds(events)[0] == "queued"
    assert kinds(events)[-1] == "image"
    assert set(kinds(events)[1:-1]) <= {"step"}
    image = events[-1].image
    assert (image.seed, image.width, image.height, image.steps) == (2**63 - 1, 64, 48, 4)
    assert (image.guidance, image.model, image.format) == (4.1, "held/model", pb.IMAGE_FORMAT_PNG)
    assert set(image.timings_ms) == {"queue", "draw", "encode"}
    assert Image.open(io.BytesIO(image.data)).size == (64, 48)


def test_steps_are_reported_while_the_picture_is_drawn(connect) -> None:
    engine = HeldEngine()
    with running_server(engine) as server:
        call = connect(server.address).Generate(ask())
        first = [next(call), next(call)]
        engine.release()
        rest = list(call)
    assert kinds(first) == ["queued", "step"]
    assert (first[1].step.index, first[1].step.total) == (1, 4)
    assert kinds(rest)[-1] == "image"


def test_a_seed_left_out_is_chosen_and_reported(connect) -> None:
    engine = HeldEngine(held=False)
    with running_server(engine) as server:
        generate = connect(server.address).Generate
        seeds = [list(generate(ask()))[-1].image.seed for _ in range(2)]
    assert seeds == [order.seed for order in engine.orders]
    assert seeds[0] != seeds[1]


def test_capabilities_are_those_of_the_model(connect) -> None:
    with running_server(HeldEngine()) as server:
        answer = connect(server.address).GetCapabilities(pb.GetCapabilitiesRequest())
    (model,) = answer.models
    assert (model.name, model.default_width, model.default_height) == ("held/model", 64, 48)
    assert (model.max_size, model.size_multiple, model.default_steps) == (256, 8, 4)
    assert answer.max_prompt_bytes == MAX_PROMPT_BYTES
    assert answer.version


BAD_FIELDS = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "   "}, "prompt is empty"),
    ({"prompt": "x" * 100_000}, "prompt has 100000 bytes; at most 4096"),
    ({"prompt": "é" * 2049}, "prompt has 4098 bytes"),
    ({"prompt": "a\x00b"}, r"prompt holds the control character U\+0000 at 1"),
    ({"prompt": "a\x1b[31mb"}, r"U\+001B at 1"),
    ({"negative_prompt": "x\x07"}, r"negative_prompt holds the control character U\+0007"),
    ({"request_id": "x" * 129}, "request_id has 129 bytes"),
    ({"request_id": "x\nERROR forged"}, r"request_id holds the control character U\+000A at 1"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"width": 65}, "width is 65; it must be a multiple of 8"),
    ({"width": 8}, "width is 8; it must lie between 16 and 256"),
    ({"height": 264}, "height is 264"),
    ({"width": 0}, "width is 0"),
    ({"steps": 0}, "steps is 0"),
    ({"steps": 201}, "steps is 201; it must lie between 1 and 200"),
    ({"guidance": float("nan")}, "guidance is nan"),
    ({"guidance": -0.5}, "guidance is -0.5"),
    ({"guidance": float("inf")}, "guidance is inf"),
    ({"format": 7}, "format is 7"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_a_wrong_field_is_named_with_its_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Invalid, match=message):
        order_of(pb.GenerateRequest(**{"prompt": "a cat"} | fields), CARD)


def test_what_is_left_out_comes_from_the_model() -> None:
    card = Card("m", 128, 64, 8, 4.0, 16, 256)
    order = order_of(pb.GenerateRequest(prompt="a <|endoftext|> cat", seed=0), card)
    assert (order.prompt, order.seed) == ("a <|endoftext|> cat", 0)
    assert (order.width, order.height, order.steps, order.guidance) == (128, 64, 8, 4.0)


def test_a_wrong_request_never_reaches_the_model(connect) -> None:
    engine = HeldEngine()
    with running_server(engine) as server:
        error = failure(connect(server.address).Generate(ask("x" * 100_000)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt" in error.details()
    assert engine.orders == []


def test_a_full_queue_refuses_with_a_time_to_come_back_wave_after_wave(connect) -> None:
    engine = HeldEngine()
    with running_server(engine, queue_limit=2) as server:
        generate = connect(server.address).Generate
        for _ in range(3):  # a limit that leaks shows only after the first refusals
            positions, accepted = [], []
            for _ in range(3):
                accepted.append(generate(ask()))
                positions.append(next(accepted[-1]).queued.position)
            for _ in range(4):
                error = failure(generate(ask()))
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
            assert positions == [0, 1, 2]
            for call in accepted:
                call.cancel()
            until(lambda: not server.studio.busy)
    assert engine.stopped == len(engine.orders)


def test_positions_move_up_when_somebody_ahead_leaves(connect) -> None:
    engine = HeldEngine()
    with running_server(engine) as server:
        generate = connect(server.address).Generate
        calls = []
        for seed in range(3):
            calls.append(generate(ask(seed=seed)))
            assert next(calls[-1]).queued.position == seed
        _drawn, second, third = calls
        second.cancel()
        assert next(third).queued.position == 1
        engine.release()
        assert kinds(list(third))[-1] == "image"
    assert {order.seed for order in engine.orders} == {0, 2}


def test_leaving_stops_the_work_and_frees_the_place(connect) -> None:
    engine = HeldEngine()
    with running_server(engine, queue_limit=0) as server:
        generate = connect(server.address).Generate
        call = generate(ask())
        engine.wait_until_drawing()
        call.cancel()
        until(lambda: engine.stopped == 1)
        engine.release()
        until(lambda: not server.studio.busy)
        assert kinds(list(generate(ask())))[-1] == "image"


def test_the_callers_deadline_stops_the_work(connect) -> None:
    engine = HeldEngine()
    with running_server(engine) as server:
        error = failure(connect(server.address).Generate(ask(), timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: not server.studio.busy)
    assert engine.stopped == len(engine.orders)


def test_who_cannot_be_served_in_time_is_told_at_once(connect) -> None:
    engine = HeldEngine()
    with running_server(engine, queue_limit=60) as server:
        generate = connect(server.address).Generate
        ahead = [generate(ask()) for _ in range(60)]
        for call in ahead:
            next(call)
        error = failure(generate(ask(), timeout=50.0))  # a guessed second for each of the sixty
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "draw elsewhere" in error.details()
        for call in ahead:
            call.cancel()


def test_the_same_id_joins_the_picture_under_way_and_repeats_the_finished_one(connect) -> None:
    engine = HeldEngine()
    with running_server(engine) as server:
        generate = connect(server.address).Generate
        calls = [generate(ask(request_id="one")) for _ in range(2)]
        for call in calls:
            next(call)
        calls[0].cancel()  # the other still waits for it
        engine.release()
        joined = list(calls[1])[-1].image
        repeated = list(generate(ask(request_id="one")))
    assert kinds(repeated) == ["image"]
    assert repeated[0].image == joined
    assert len(engine.orders) == 1
    assert engine.stopped == 0


def test_the_same_id_for_another_request_is_refused(connect) -> None:
    with running_server(HeldEngine(held=False)) as server:
        generate = connect(server.address).Generate
        list(generate(ask(request_id="one")))
        error = failure(generate(ask("a dog", request_id="one")))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert "'one'" in error.details()


def test_an_id_whose_picture_was_given_up_can_be_used_again(connect) -> None:
    engine = HeldEngine()
    with running_server(engine) as server:
        generate = connect(server.address).Generate
        call = generate(ask(request_id="one"))
        engine.wait_until_drawing()
        call.cancel()
        until(lambda: engine.stopped == 1)
        engine.release()
        assert kinds(list(generate(ask(request_id="one"))))[-1] == "image"
    assert len(engine.orders) == 2


def test_only_the_last_few_pictures_are_remembered(connect) -> None:
    engine = HeldEngine(held=False)
    with running_server(engine) as server:
        generate = connect(server.address).Generate
        for number in (*range(33), 0):
            list(generate(ask(request_id=f"number {number}")))
    assert len(engine.orders) == 34


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DrawError("held/model could not draw 64x48: out of memory"), "out of memory"),
        (KeyError("secret path"), "the model failed"),
    ],
)
def test_a_failing_model_is_an_internal_error_without_a_traceback(
    error: Exception, told: str, connect
) -> None:
    with running_server(HeldEngine(error=error)) as server:
        generate = connect(server.address).Generate
        for _ in range(2):  # and the next request is served as ever
            answer = failure(generate(ask(request_id="same")))
            assert answer.code() is grpc.StatusCode.INTERNAL
            assert told in answer.details()
            assert "secret" not in answer.details()


def test_until_the_model_is_loaded_callers_are_sent_home(connect) -> None:
    loaded = threading.Event()

    def load() -> HeldEngine:
        loaded.wait(PATIENCE_S)
        return HeldEngine(held=False)

    with running_server(load) as server:
        stub = connect(server.address)
        error = failure(stub.Generate(ask()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "loading" in error.details()
        with pytest.raises(grpc.RpcError):
            stub.GetCapabilities(pb.GetCapabilitiesRequest())
        loaded.set()


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(connect) -> None:
    engine = HeldEngine()
    with running_server(engine) as server:
        stub = connect(server.address)
        accepted = [stub.Generate(ask()) for _ in range(2)]
        for call in accepted:
            next(call)
        stopped = server.stop(grace_s=PATIENCE_S)
        until(lambda: server.studio.draining)
        error = failure(stub.Generate(ask()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in error.details()
        engine.release()
        assert [kinds(list(call))[-1] for call in accepted] == ["image", "image"]
        stopped.result(PATIENCE_S)


def test_the_end_of_the_grace_stops_what_is_not_finished(connect) -> None:
    engine = HeldEngine()
    with running_server(engine) as server:
        call = connect(server.address).Generate(ask())
        engine.wait_until_drawing()
        stopped = server.stop(grace_s=0.05)
        error = failure(call)
        stopped.result(PATIENCE_S)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert engine.stopped == 1
