"""A real server on loopback around an engine that a test holds in its hands."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from PIL import Image

from cloud_server.config import ServeSettings
from cloud_server.engine import Card, Engine, Order, Stopped
from cloud_server.server import CloudServer, run
from protos.address import Address

PATIENCE_S = 120.0  # far more than anything here takes; only a hang reaches it


class HeldEngine:
    """An `Engine` that steps on and on until `release`, so that a test decides when it is done."""

    card = Card("held/model", 64, 48, 4, 5.0, min_size=16, max_size=256)

    def __init__(self, *, held: bool = True, error: Exception | None = None) -> None:
        self.orders: list[Order] = []
        self.stopped = 0
        self._error = error
        self._free = threading.Event()
        self._begun = threading.Semaphore(0)
        if not held:
            self._free.set()

    def release(self) -> None:
        """Let this picture and all later ones be finished."""
        self._free.set()

    def wait_until_drawing(self) -> None:
        """Return once one more picture has been begun."""
        assert self._begun.acquire(timeout=PATIENCE_S)

    def draw(
        self,
        order: Order,
        on_step: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Image.Image:
        """Paint one colour made of the seed."""
        self.orders.append(order)
        self._begun.release()
        if self._error is not None:
            raise self._error
        on_step(1, order.steps)
        while not self._free.wait(0.005):
            if cancelled():
                self.stopped += 1
                raise Stopped
        for index in range(1, order.steps):
            on_step(index + 1, order.steps)
        colour = (order.seed % 251, order.steps % 256, len(order.prompt) % 256)
        return Image.new("RGB", (order.width, order.height), colour)


class Running:
    """A server in a thread of its own: its address, and calls into its loop."""

    def __init__(self, address: str, server: CloudServer, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self.studio = server.studio
        self._server = server
        self._loop = loop

    def stop(self, grace_s: float) -> Future[None]:
        """Begin to drain; the future is done when the server has stopped."""
        return asyncio.run_coroutine_threadsafe(self._server.stop(grace_s), self._loop)


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server in a process of its own."""

    address: str
    process: subprocess.Popen[str]


@contextmanager
def running_server(
    engine: Engine | Callable[[], Engine],
    *,
    port: int = 0,
    queue_limit: int = 8,
    reflection: bool = False,
) -> Iterator[Running]:
    """Serve `engine` on loopback, port 0 a free one; a callable is loaded after the block began."""
    ready: Future[tuple[Address, CloudServer, asyncio.AbstractEventLoop]] = Future()
    over = threading.Event()

    async def live() -> None:
        load = engine if callable(engine) else lambda: engine
        server = CloudServer(
            load, Address("127.0.0.1", port), queue_limit=queue_limit, reflection=reflection
        )
        address = await server.start()
        warm = asyncio.create_task(server.warm())
        if not callable(engine):
            await warm
        ready.set_result((address, server, asyncio.get_running_loop()))
        try:
            await asyncio.to_thread(over.wait)
            await warm
        finally:
            await server.stop(0)

    thread = threading.Thread(target=asyncio.run, args=(live(),))
    thread.start()
    address, server, loop = ready.result(PATIENCE_S)
    try:
        yield Running(str(address), server, loop)
    finally:
        over.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def until(condition: Callable[[], bool], *, every_s: float = 0.01) -> None:
    """Return as soon as `condition` holds."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(every_s)


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def tcp_server(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run `talk` on every connection to the address it yields; whatever it speaks, not gRPC."""
    open_now: list[socket.socket] = []

    def accept(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, suppress(OSError):  # the other end may leave first
                open_now.append(connection)
                talk(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept, args=(server,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            for either in (server, *open_now):
                with suppress(OSError):
                    either.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE_S)
    assert not thread.is_alive()


def _main() -> None:
    """`python -m tests.wire`: a process that can be killed; a line on stdin releases its engine."""
    engine = HeldEngine()

    def release_when_told() -> None:
        if sys.stdin.readline():
            engine.release()

    threading.Thread(target=release_when_told, daemon=True).start()
    settings = ServeSettings("held/model", Address("127.0.0.1", 0), reflection=True)
    received = asyncio.run(run(settings, lambda: engine, lambda line: print(line, flush=True)))
    print(f"stopped by {received.name}", flush=True)


@contextmanager
def server_process(*arguments: str, module: str = "tests.wire") -> Iterator[ServerProcess]:
    """Run `python -m MODULE ARGUMENTS` and yield it once it listens; kill it in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:"), line
        yield ServerProcess(line.removeprefix("listening on ").strip(), process)
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait(PATIENCE_S)


if __name__ == "__main__":
    _main()
