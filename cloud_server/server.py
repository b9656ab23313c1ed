"""The server's life: bind, load, serve, drain. Health says SERVING only in the middle of it."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cloud_server.config import ServeSettings
from cloud_server.engine import Engine
from cloud_server.errors import ServerError
from cloud_server.service import SERVICE, ImageGenerationService
from cloud_server.studio import Studio
from protos.address import Address
from protos.t2i.v1 import image_generation_pb2_grpc as pb_grpc

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server takes every other call in silence
    ("grpc.max_receive_message_length", 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients ping every 30 s; by default that is punished with "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)
_LAST_WRITES_S = 2.0

_log = logging.getLogger(__name__)


class CloudServer:
    """One gRPC server around one model. Every method belongs to the running event loop."""

    def __init__(
        self,
        load: Callable[[], Engine],
        address: Address,
        *,
        queue_limit: int = 8,
        reflection: bool = False,
    ) -> None:
        self._address = address
        self.studio = Studio(load, queue_limit=queue_limit)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=_OPTIONS)
        pb_grpc.add_ImageGenerationServicer_to_server(
            ImageGenerationService(self.studio), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflection:
            from grpc_reflection.v1alpha import reflection as grpc_reflection

            names = (SERVICE, health.SERVICE_NAME, grpc_reflection.SERVICE_NAME)
            grpc_reflection.enable_server_reflection(names, self._server)

    async def start(self) -> Address:
        """Listen, not yet serving; return the address with the port really bound."""
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            port = self._server.add_insecure_port(str(self._address))
        except RuntimeError as error:
            raise ServerError(
                f"cannot listen on {self._address}: another server has that port, or this machine"
                " no such address; stop it or choose another --address"
            ) from error
        await self._server.start()
        return Address(self._address.host, port)

    async def warm(self) -> None:
        """Load the model and begin to serve."""
        await self.studio.open()
        await self._report(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new pictures, finish the accepted ones for up to `grace_s`, then stop the rest."""
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            # Still listening meanwhile: whoever asks is told to draw elsewhere, and health answers.
            await asyncio.wait_for(self.studio.drain(), grace_s)
        except TimeoutError:
            _log.warning("stopping unfinished pictures after %g s of grace", grace_s)
        await self.studio.close()
        await self._server.stop(_LAST_WRITES_S)

    async def _report(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)


async def run(
    settings: ServeSettings,
    load: Callable[[], Engine],
    announce: Callable[[str], None],
) -> signal.Signals:
    """Serve until SIGTERM or SIGINT, drain, and return which of them came.

    `announce` gets the line `listening on HOST:PORT` once the port is bound.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[signal.Signals] = loop.create_future()

    def on_signal(received: signal.Signals) -> None:
        if stop.done():  # both came in one moment
            signal.raise_signal(received)
            return
        stop.set_result(received)
        for either in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(either)
            signal.signal(either, signal.SIG_DFL)  # asked a second time, die at once

    server = CloudServer(
        load,
        settings.address,
        queue_limit=settings.queue_limit,
        reflection=settings.reflection,
    )
    for either in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(either, on_signal, either)
    announce(f"listening on {await server.start()}")
    begun = time.monotonic()
    warm = asyncio.create_task(server.warm())
    first_of: tuple[asyncio.Future[Any], ...] = (warm, stop)
    try:
        await asyncio.wait(first_of, return_when=asyncio.FIRST_COMPLETED)
        if warm.done():
            warm.result()
            _log.info("serving %s after %.1f s", settings.model, time.monotonic() - begun)
        return await stop
    finally:
        warm.cancel()
        await server.stop(settings.grace_s)
