"""The server's life on real sockets: health, reflection, the port, signals."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cloud_server.config import ServeSettings
from cloud_server.errors import ModelError, ServerError
from cloud_server.server import CloudServer, run
from cloud_server.service import SERVICE
from edge_agent.cloud.client import CloudClient
from edge_agent.errors import Unreachable
from edge_agent.types import Event, Request, Step
from protos.address import Address
from tests.wire import PATIENCE_S, HeldEngine, running_server, server_process, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health_of(address: str) -> list[int]:
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        names = ("", SERVICE)
        return [check(health_pb2.HealthCheckRequest(service=name)).status for name in names]


def test_health_says_serving_only_between_loading_and_draining() -> None:
    loaded, engine = threading.Event(), HeldEngine()

    def load() -> HeldEngine:
        loaded.wait(PATIENCE_S)
        return engine

    with running_server(load) as server, CloudClient(server.address) as client:
        assert health_of(server.address) == [NOT_SERVING, NOT_SERVING]
        with grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == NOT_SERVING
            loaded.set()
            assert next(watch).status == SERVING
            watch.cancel()
        assert health_of(server.address) == [SERVING, SERVING]
        drawing = threading.Thread(
            target=client.generate, args=(Request("a cat"),), kwargs={"request_id": "", "seed": 1}
        )
        drawing.start()
        engine.wait_until_drawing()
        stopped = server.stop(grace_s=PATIENCE_S)
        until(lambda: server.studio.draining)
        assert health_of(server.address) == [NOT_SERVING, NOT_SERVING]
        engine.release()
        drawing.join(PATIENCE_S)
        stopped.result(PATIENCE_S)


@pytest.mark.parametrize("asked_for", [True, False])
def test_reflection_answers_only_when_asked_for(asked_for: bool) -> None:
    with (
        running_server(HeldEngine(), reflection=asked_for) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = stub.ServerReflectionInfo(iter([request]))
        if asked_for:
            services = next(answers).list_services_response.service
            assert {SERVICE, "grpc.health.v1.Health"} <= {service.name for service in services}
            answers.cancel()
        else:
            with pytest.raises(grpc.RpcError) as caught:
                next(answers)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        async def start() -> None:
            await CloudServer(HeldEngine, Address("127.0.0.1", port)).start()

        with pytest.raises(ServerError, match=f"cannot listen on 127.0.0.1:{port}"):
            asyncio.run(start())


def test_two_servers_do_not_share_a_port() -> None:
    with running_server(HeldEngine()) as server:

        async def start() -> None:
            host, _, port = server.address.rpartition(":")
            await CloudServer(HeldEngine, Address(host, int(port))).start()

        with pytest.raises(ServerError, match="another server"):
            asyncio.run(start())


def test_a_model_that_does_not_load_ends_the_server() -> None:
    def load() -> HeldEngine:
        raise ModelError("no such model")

    announced: list[str] = []
    with pytest.raises(ModelError, match="no such model"):
        asyncio.run(run(ServeSettings("m", Address("127.0.0.1", 0)), load, announced.append))
    assert announced[0].startswith("listening on 127.0.0.1:")


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_picture_be_finished(which: signal.Signals) -> None:
    with server_process() as server, CloudClient(server.address) as client:
        until(client.healthy)
        assert server.process.stdin is not None
        release = server.process.stdin

        def stop(event: Event) -> None:
            if isinstance(event, Step) and not release.closed:
                server.process.send_signal(which)
                until(lambda: not client.healthy())
                release.write("go on\n")
                release.close()

        picture = client.generate(Request("a cat"), request_id="", seed=5, on_event=stop)
        assert picture.seed == 5
        assert server.process.wait(PATIENCE_S) == 0
        assert server.process.stdout is not None
        assert server.process.stdout.read() == f"stopped by {which.name}\n"


def test_a_second_signal_ends_it_at_once() -> None:
    with server_process() as server, CloudClient(server.address) as client:
        until(client.healthy)

        def stop(event: Event) -> None:
            if isinstance(event, Step):
                server.process.terminate()
                until(lambda: not client.healthy())
                server.process.terminate()

        with pytest.raises(Unreachable):
            client.generate(Request("a cat"), request_id="", seed=5, on_event=stop)
        assert server.process.wait(PATIENCE_S) == -signal.SIGTERM
