"""The client against real sockets: pictures, and everything that can answer instead of one."""

from __future__ import annotations

import io
import math
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from PIL import Image

from cloud_server.errors import DrawError
from edge_agent.cloud.client import CloudClient
from edge_agent.errors import (
    Cancelled,
    CloudError,
    ConfigError,
    DeadlineExceeded,
    Misbehaved,
    Refused,
    Unreachable,
)
from edge_agent.types import Cancellation, Event, Picture, Queued, Request, Step
from protos.t2i.v1 import image_generation_pb2 as pb
from protos.t2i.v1 import image_generation_pb2_grpc as pb_grpc
from tests.wire import (
    PATIENCE_S,
    HeldEngine,
    free_port,
    running_server,
    server_process,
    tcp_server,
    until,
)

CAT = Request("a cat")


def draw(client: CloudClient, request: Request = CAT, **options: Any) -> Picture:
    return client.generate(request, **{"request_id": "", "seed": 7} | options)


def png(width: int = 64, height: int = 48) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()


def image(data: bytes | None = None, **fields: Any) -> pb.GenerateEvent:
    usual = {"seed": 7, "width": 64, "height": 48, "steps": 4, "guidance": 5.0, "model": "m"}
    answer = pb.Image(data=png() if data is None else data, **usual | fields)
    return pb.GenerateEvent(image=answer)


@contextmanager
def scripted_server(answer: Callable[[Any], Iterator[pb.GenerateEvent]]) -> Iterator[str]:
    """A gRPC server that answers Generate with whatever `answer(context)` yields or raises."""

    class Service(pb_grpc.ImageGenerationServicer):
        calls = 0

        def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateEvent]:
            Service.calls += 1
            context.set_trailing_metadata((("calls", str(Service.calls)),))
            yield from answer(context)

    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads, options=[("grpc.max_send_message_length", -1)])
        pb_grpc.add_ImageGenerationServicer_to_server(Service(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(0).wait(PATIENCE_S)


def events_of(*events: pb.GenerateEvent) -> Callable[[Any], Iterator[pb.GenerateEvent]]:
    return lambda _context: iter(events)


def test_a_picture_comes_with_its_settings_and_progress() -> None:
    told: list[Event] = []
    engine = HeldEngine(held=False)
    request = Request("two dogs", width=32, height=24, steps=9, guidance=4.1, negative_prompt="fog")
    with running_server(engine) as server, CloudClient(server.address) as client:
        picture = draw(client, request, on_event=told.append)
    assert picture.image.mode == "RGB"
    assert picture.image.size == (picture.width, picture.height) == (32, 24)
    assert picture.image.getpixel((0, 0)) == (7, 9, len("two dogs"))
    assert (picture.seed, picture.steps, picture.guidance) == (7, 9, 4.1)
    assert picture.model == "held/model"
    assert {"queue", "draw", "encode", "total"} <= set(picture.timings_ms)
    assert told[0] == Queued(0)
    assert all(isinstance(event, Step) for event in told[1:])
    (order,) = engine.orders
    assert (order.prompt, order.negative_prompt) == ("two dogs", "fog")


def test_the_same_id_does_not_draw_twice() -> None:
    engine = HeldEngine(held=False)
    with running_server(engine) as server, CloudClient(server.address) as client:
        first, second = (draw(client, request_id="one") for _ in range(2))
    assert first.image == second.image
    assert len(engine.orders) == 1


def test_health_and_capabilities_answer() -> None:
    with running_server(HeldEngine()) as server, CloudClient(server.address) as client:
        assert client.healthy()
        answer = client.capabilities()
    (model,) = answer.models
    assert (model.name, model.width, model.height, model.max_size) == ("held/model", 64, 48, 256)
    assert answer.max_prompt_bytes == 4096


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:0", "http://localhost:80", "a b:1", "[::1:5", "x:99999"]
)
def test_a_malformed_address_is_named_before_any_socket(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc, "insecure_channel", lambda *_a, **_k: pytest.fail("opened a channel"))
    with pytest.raises(ConfigError) as caught:
        CloudClient(address)
    assert repr(address) in str(caught.value)


def test_making_a_client_opens_no_socket() -> None:
    code = (
        "import sys, os\n"
        "from edge_agent.cloud.client import CloudClient\n"
        "opened = []\n"
        "sys.addaudithook(lambda name, a: opened.append(name) if 'socket' in name else None)\n"
        "client = CloudClient('127.0.0.1:9')\n"
        "links = [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')\n"
        "         if os.path.exists(f'/proc/self/fd/{n}')]\n"
        "assert not opened and not any('socket' in link for link in links), (opened, links)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_port_where_nobody_listens_is_unreachable() -> None:
    address = f"127.0.0.1:{free_port()}"
    with CloudClient(address) as client:
        assert not client.healthy()
        with pytest.raises(Unreachable, match=f"{address} cannot be reached") as nobody:
            draw(client)
        assert not nobody.value.maybe_drawn
        with pytest.raises(Unreachable):
            client.capabilities()


def speak_http(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def speak_garbage(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(range(256)))


def hang_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def say_nothing(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


@pytest.mark.parametrize("talk", [speak_http, speak_garbage, hang_up, say_nothing])
def test_something_that_is_no_grpc_server_is_unreachable_soon(
    talk: Callable[[socket.socket], None],
) -> None:
    with tcp_server(talk) as address, CloudClient(address, connect_s=0.3) as client:
        with pytest.raises(Unreachable):  # and not DeadlineExceeded after the default minute
            draw(client)
        assert not client.healthy(timeout_s=0.3)


def test_a_server_without_our_service_misbehaves() -> None:
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with CloudClient(f"127.0.0.1:{port}") as client:
            with pytest.raises(Misbehaved, match="UNIMPLEMENTED") as caught:
                draw(client)
            assert not caught.value.maybe_drawn
            assert not client.healthy()
        server.stop(0).wait(PATIENCE_S)


def broken_png() -> bytes:
    data = bytearray(png())
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_of(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


PIXELS = chunk(b"IDAT", zlib.compress(bytes(48 * (1 + 64 * 3))))


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (image(b""), "0 bytes that are not a PNG"),
        (image(b"<html>no</html>"), "not a PNG"),
        (image(jpeg()), "not a PNG"),
        (image(png()[:60]), "damaged PNG"),
        (image(png()[:-20]), "damaged PNG"),
        (image(broken_png()), "damaged PNG"),
        (image(png_of(header(64, 48))), "damaged PNG"),  # no pixels
        (image(png_of(header(64, 48), chunk(b"iCCP", b"\0"), PIXELS)), "damaged PNG"),
        (image(png_of(header(64, 48), header(60_000, 60_000), PIXELS)), "damaged PNG"),
        (image(png_of(header(64, 48), header(32, 32), PIXELS)), "is 32x32 pixels after all"),
        (image(guidance=math.nan), "guidance or times that are none"),
        (image(timings_ms={"draw": math.inf}), "guidance or times that are none"),
        (image(png(32, 32)), "32x32 pixels and announced 64x48"),
        (
            image(png_of(header(60_000, 60_000)), width=60_000, height=60_000),
            "at most 16777216 pixels",
        ),
        (image(seed=8), "seed 8 and not 64x48 with seed 7"),
        (pb.GenerateEvent(step=pb.Step(index=4, total=4)), "without a picture"),
        (pb.GenerateEvent(), "without a picture"),
    ],
)
def test_what_is_not_the_picture_asked_for_is_misbehaviour(
    answer: pb.GenerateEvent, told: str
) -> None:
    with (
        scripted_server(events_of(answer)) as address,
        CloudClient(address) as client,
        pytest.raises(Misbehaved, match=told),
    ):
        draw(client)


def test_a_picture_of_another_size_than_asked_for_is_misbehaviour() -> None:
    with (
        scripted_server(events_of(image())) as address,
        CloudClient(address) as client,
        pytest.raises(Misbehaved, match="drew 64x48 with seed 7 and not 128x48"),
    ):
        draw(client, Request("a cat", width=128))


def test_bytes_that_are_no_message_are_misbehaviour() -> None:
    handler = grpc.unary_stream_rpc_method_handler(lambda _request, _context: iter([b"\xff" * 9]))
    service = pb.DESCRIPTOR.services_by_name["ImageGeneration"].full_name
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        generic = grpc.method_handlers_generic_handler(service, {"Generate": handler})
        server.add_generic_rpc_handlers((generic,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with CloudClient(f"127.0.0.1:{port}") as client, pytest.raises(Misbehaved):
            draw(client)
        server.stop(0).wait(PATIENCE_S)


def test_a_message_over_the_limit_is_misbehaviour_that_names_the_limit() -> None:
    with (
        scripted_server(events_of(image(bytes(20_000)))) as address,
        CloudClient(address, max_message_bytes=10_000) as client,
        pytest.raises(Misbehaved, match="over 10000 bytes"),
    ):
        draw(client)


def test_a_picture_over_grpcs_own_limit_arrives() -> None:
    padding = b"tEXt" + b"comment\0" + b" " * (5 * 2**20)
    chunk = struct.pack(">I", len(padding) - 4) + padding + struct.pack(">I", zlib.crc32(padding))
    data = png()
    large = data[:33] + chunk + data[33:]  # after the header
    with scripted_server(events_of(image(large))) as address, CloudClient(address) as client:
        assert draw(client).image.size == (64, 48)


def test_a_server_that_gives_up_mid_stream_is_not_asked_again() -> None:
    calls = []

    def one_step_then_gone(context: Any) -> Iterator[pb.GenerateEvent]:
        calls.append(1)
        yield pb.GenerateEvent(step=pb.Step(index=1, total=8))
        context.abort(grpc.StatusCode.UNAVAILABLE, "going")

    told: list[Event] = []
    with (
        scripted_server(one_step_then_gone) as address,
        CloudClient(address) as client,
        pytest.raises(Unreachable, match="going"),
    ):
        draw(client, on_event=told.append)
    assert told == [Step(1, 8)]
    assert len(calls) == 1


def test_unavailable_before_anything_came_is_tried_again() -> None:
    calls = []

    def second_time_lucky(context: Any) -> Iterator[pb.GenerateEvent]:
        calls.append(1)
        if len(calls) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        yield image()

    with scripted_server(second_time_lucky) as address, CloudClient(address) as client:
        assert draw(client).model == "m"
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, Refused),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Refused),
        (grpc.StatusCode.PERMISSION_DENIED, Refused),
        (grpc.StatusCode.UNAUTHENTICATED, Refused),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, Unreachable),
        (grpc.StatusCode.INTERNAL, Misbehaved),
        (grpc.StatusCode.UNKNOWN, Misbehaved),
        (grpc.StatusCode.DATA_LOSS, Misbehaved),
    ],
)
def test_every_status_has_one_error_and_only_one_attempt(
    code: grpc.StatusCode, kind: type[CloudError]
) -> None:
    calls = []

    def refuse(context: Any) -> Iterator[pb.GenerateEvent]:
        calls.append(1)
        context.abort(code, "because\n\x1b[31mso")
        yield image()

    with (
        scripted_server(refuse) as address,
        CloudClient(address) as client,
        pytest.raises(kind) as caught,
    ):
        draw(client)
    assert type(caught.value) is kind
    assert "because  [31mso" in str(caught.value)  # nothing that a terminal obeys
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("code", "pushback", "retry_after_s"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "1500", 1.5),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "-1", None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "soon", None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None, None),
        (grpc.StatusCode.UNAVAILABLE, "2000", 2.0),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "4600", 4.6),  # the queue alone takes longer
    ],
)
def test_a_refusal_tells_when_to_come_back(
    code: grpc.StatusCode, pushback: str | None, retry_after_s: float | None
) -> None:
    def refuse(context: Any) -> Iterator[pb.GenerateEvent]:
        if pushback is not None:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback),))
        context.abort(code, "full")
        yield image()

    with (
        scripted_server(refuse) as address,
        CloudClient(address) as client,
        pytest.raises(Refused, match="full") as caught,
    ):
        draw(client)
    assert (caught.value.retry_after_s, caught.value.maybe_drawn) == (retry_after_s, False)


def test_names_that_a_server_tells_are_fit_for_a_terminal() -> None:
    answer = image(model="\x1b[31mm\nfake")
    with scripted_server(events_of(answer)) as address, CloudClient(address) as client:
        assert draw(client).model == " [31mm fake"


def test_a_closed_client_says_so() -> None:
    client = CloudClient("127.0.0.1:9")
    client.close()
    with pytest.raises(Unreachable, match="was closed") as caught:
        draw(client)
    assert not caught.value.maybe_drawn
    assert not client.healthy()


def test_a_full_queue_is_a_refusal_with_a_delay() -> None:
    engine = HeldEngine()
    with (
        running_server(engine, queue_limit=0) as server,
        CloudClient(server.address) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        first = threads.submit(draw, client)
        engine.wait_until_drawing()
        with pytest.raises(Refused) as caught:
            draw(client)
        engine.release()
        first.result(PATIENCE_S)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0


def test_a_server_that_is_draining_refuses() -> None:
    engine = HeldEngine()
    with (
        running_server(engine) as server,
        CloudClient(server.address) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        accepted = threads.submit(draw, client)
        engine.wait_until_drawing()
        stopped = server.stop(grace_s=PATIENCE_S)
        with pytest.raises(Refused, match="shutting down"):
            draw(client)
        assert not client.healthy()
        engine.release()
        assert accepted.result(PATIENCE_S).seed == 7
        stopped.result(PATIENCE_S)


def test_a_failing_model_is_misbehaviour_with_its_reason() -> None:
    engine = HeldEngine(error=DrawError("m could not draw 64x48: out of memory"))
    with (
        running_server(engine) as server,
        CloudClient(server.address) as client,
        pytest.raises(Misbehaved, match="out of memory"),
    ):
        draw(client)


def test_past_the_deadline_the_answer_names_it_and_the_work_stops() -> None:
    engine = HeldEngine()
    with running_server(engine) as server, CloudClient(server.address) as client:
        with pytest.raises(DeadlineExceeded, match=r"within 0\.3 s"):
            draw(client, deadline_s=0.3)
        until(lambda: not server.studio.busy)


def test_a_deadline_already_past_does_not_hang() -> None:
    with (
        running_server(HeldEngine()) as server,
        CloudClient(server.address) as client,
        pytest.raises(DeadlineExceeded),
    ):
        draw(client, deadline_s=-1.0)


@pytest.mark.parametrize("request_", [Request("a cat", width=2**32), Request("\ud800")])
def test_what_the_wire_cannot_carry_is_a_wrong_request(request_: Request) -> None:
    with (
        CloudClient(f"127.0.0.1:{free_port()}") as client,
        pytest.raises(ConfigError, match="cannot be sent"),
    ):
        draw(client, request_)


def test_cancelling_ends_the_call_and_stops_the_work_within_a_step() -> None:
    engine, cancellation = HeldEngine(), Cancellation()
    with (
        running_server(engine) as server,
        CloudClient(server.address) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        picture = threads.submit(draw, client, cancellation=cancellation)
        engine.wait_until_drawing()
        cancellation.cancel()
        with pytest.raises(Cancelled):
            picture.result(PATIENCE_S)
        until(lambda: engine.stopped == 1)


def test_cancelled_before_it_began_asks_for_nothing() -> None:
    engine, cancellation = HeldEngine(), Cancellation()
    cancellation.cancel()
    with running_server(engine) as server, CloudClient(server.address) as client:
        with pytest.raises(Cancelled):
            draw(client, cancellation=cancellation)
        assert engine.orders == []


def test_cancelling_while_nobody_answers_ends_at_once() -> None:
    cancellation = Cancellation()
    timer = threading.Timer(0.05, cancellation.cancel)
    with tcp_server(say_nothing) as address, CloudClient(address, connect_s=PATIENCE_S) as client:
        timer.start()
        with pytest.raises(Cancelled):
            draw(client, cancellation=cancellation)
    timer.join()


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError])
def test_a_listener_that_fails_ends_the_call_with_its_own_error(error: type[Exception]) -> None:
    engine = HeldEngine()

    def fail(_event: Event) -> None:
        raise error("listening")

    with running_server(engine) as server, CloudClient(server.address) as client:
        with pytest.raises(error, match="listening"):
            draw(client, on_event=fail)
        until(lambda: not server.studio.busy)


def test_a_server_killed_in_the_middle_of_a_picture_is_unreachable() -> None:
    with server_process() as server, CloudClient(server.address) as client:

        def kill(event: Event) -> None:
            if isinstance(event, Step):
                server.process.send_signal(signal.SIGKILL)

        with pytest.raises(Unreachable) as broken:
            draw(client, on_event=kill)
    assert broken.value.maybe_drawn


def test_a_host_without_an_address_was_certainly_not_asked() -> None:
    with CloudClient("no-such-host.invalid:50051") as client, pytest.raises(Unreachable) as lost:
        draw(client)
    assert not lost.value.maybe_drawn


def test_a_server_that_vanishes_with_the_request_may_have_drawn() -> None:
    def vanish(context: Any) -> Iterator[pb.GenerateEvent]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        yield image()

    with (
        scripted_server(vanish) as address,
        CloudClient(address) as client,
        pytest.raises(Unreachable) as lost,
    ):
        draw(client)
    assert lost.value.maybe_drawn


def test_a_client_finds_a_server_that_came_back() -> None:
    with running_server(HeldEngine(held=False)) as server:
        address = server.address
        client = CloudClient(address)
        draw(client)
    with pytest.raises(Unreachable):
        draw(client)
    with running_server(HeldEngine(held=False), port=int(address.rpartition(":")[2])):
        until(client.healthy)  # it looks again about once a second
        assert draw(client).seed == 7
    client.close()


def test_a_request_that_was_sent_before_the_server_went_may_have_been_drawn() -> None:
    stop: list[Callable[[], object]] = []

    def vanish(_context: Any) -> Iterator[pb.GenerateEvent]:
        stop[0]()
        yield from ()

    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        service = pb_grpc.ImageGenerationServicer()
        service.Generate = lambda _request, context: vanish(context)
        pb_grpc.add_ImageGenerationServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        stop.append(lambda: server.stop(0).wait(0.5))
        server.start()
        # The last attempts find nobody and by themselves would say that nothing was sent.
        with (
            CloudClient(f"127.0.0.1:{port}") as client,
            pytest.raises(Unreachable, match="failed to connect") as lost,
        ):
            draw(client, deadline_s=20)
    assert lost.value.maybe_drawn
