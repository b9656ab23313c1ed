"""The bounded queue in front of the one worker thread on which the model lives.

Everything but the drawing itself runs on the event loop and belongs to it; nothing here knows gRPC.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cloud_server.engine import Card, Engine, Order, Stopped

_REMEMBERED = 32  # finished pictures kept for callers who ask again with the same id
ENGINE_THREAD = "engine"
LOADING_S = 2.0  # after which to ask again while the model loads
_FIRST_GUESS_S = 1.0  # of one picture, before any was drawn


@dataclass(frozen=True, slots=True)
class Waiting:
    """`position` orders are drawn before this one."""

    position: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """Step `index` of `total` is done."""

    index: int
    total: int


Progress = Waiting | Drawing


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished picture as PNG, and the model that drew it."""

    png: bytes
    model: str
    timings_ms: Mapping[str, float]


class Full(Exception):
    """The queue has no place; come back in `retry_after_s` seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class Closed(Exception):
    """The studio is not taking orders; come back in `retry_after_s` seconds, where it says any."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class IdTaken(Exception):
    """The request id belongs to another request."""


class Job:
    """One order on its way to a picture, watched by everyone who asked for it."""

    def __init__(self, request_id: str, fingerprint: bytes, order: Order, engine: Engine) -> None:
        self.request_id = request_id
        self.fingerprint = fingerprint
        self.order = order
        self.engine = engine
        self.finished: asyncio.Future[Drawn] = asyncio.get_running_loop().create_future()
        self.cancelled = threading.Event()
        self.watchers = 0
        self.progress: Progress = Waiting(0)
        self.born = time.monotonic()
        self._news = asyncio.Event()
        self.finished.add_done_callback(lambda _future: self._news.set())

    def tell(self, progress: Progress) -> None:
        """Replace the progress that watchers see next."""
        if progress != self.progress:
            self.progress = progress
            self._news.set()
            self._news = asyncio.Event()

    async def follow(self, interval_s: float) -> AsyncIterator[Progress]:
        """Yield the newest progress, at most once per `interval_s`, until the job is finished."""
        told: Progress | None = None
        while not self.finished.done():
            if self.progress != told:
                told = self.progress
                yield told
                await asyncio.wait([self.finished], timeout=interval_s)
            else:
                await self._news.wait()


class Studio:
    """Takes orders, draws them one after another, and remembers the last few."""

    def __init__(self, load: Callable[[], Engine], *, queue_limit: int) -> None:
        self._load = load
        self._limit = queue_limit
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=ENGINE_THREAD)
        self._engine: Engine | None = None
        self._draining = False
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._drawing: asyncio.Task[None] | None = None
        self._known: OrderedDict[str, Job] = OrderedDict()  # waiting, running, then remembered
        self._idle = asyncio.Event()
        self._idle.set()
        self._watchers = 0
        self._mean_s: float | None = None

    async def open(self) -> None:
        """Load the model on the worker thread, then take orders."""
        self._engine = await asyncio.get_running_loop().run_in_executor(self._worker, self._load)

    @property
    def card(self) -> Card:
        """The model's name, defaults and limits; raises Closed when not taking orders."""
        return self._open_engine().card

    @property
    def draining(self) -> bool:
        """Whether new orders are refused for good."""
        return self._draining

    @property
    def busy(self) -> bool:
        """Whether any order is being drawn, waits or is still watched."""
        return not self._idle.is_set()

    @property
    def wait_s(self) -> float:
        """Expected seconds until an order given now is begun; 0 when nobody is ahead."""
        ahead = len(self._waiting) + (self._running is not None)
        return ahead * (_FIRST_GUESS_S if self._mean_s is None else self._mean_s)

    def join(self, request_id: str, fingerprint: bytes) -> Job | None:
        """Return the job under this id, if there is one; `leave` it in the end.

        Raises IdTaken if the id belongs to a request with another fingerprint.
        """
        job = self._known.get(request_id)
        if job is None:
            return None
        if job.fingerprint != fingerprint:
            raise IdTaken(request_id)
        self._watch(job)
        return job

    def submit(self, request_id: str, fingerprint: bytes, order: Order) -> Job:
        """Queue a new order and return its job; `leave` it in the end. Raises Full or Closed."""
        engine = self._open_engine()
        if self._running is not None and len(self._waiting) >= self._limit:
            raise Full(self.wait_s)
        job = Job(request_id, fingerprint, order, engine)
        self._known[request_id] = job
        self._waiting.append(job)
        self._watch(job)
        self._advance()
        return job

    def leave(self, job: Job) -> None:
        """Stop watching `job`; the last to leave an unfinished one stops it."""
        job.watchers -= 1
        self._watchers -= 1
        if job.watchers == 0 and not job.finished.done():
            job.cancelled.set()
            job.finished.cancel()
            self._forget(job)
            if job in self._waiting:
                self._waiting.remove(job)
        self._advance()

    async def drain(self) -> None:
        """Refuse new orders from now on and wait until the accepted ones are drawn and fetched."""
        self._draining = True
        await self._idle.wait()

    async def close(self) -> None:
        """Stop all work within a step and let the worker thread go."""
        self._draining = True
        for job in (*self._waiting, *((self._running,) if self._running else ())):
            job.cancelled.set()
            job.finished.cancel()
        self._waiting.clear()
        if self._drawing is not None:
            await self._drawing
        self._worker.shutdown(wait=False)

    def _open_engine(self) -> Engine:
        if self._draining:
            raise Closed("the server is shutting down; draw elsewhere")
        if self._engine is None:
            raise Closed("the server is still loading its model", LOADING_S)
        return self._engine

    def _advance(self) -> None:
        if self._running is None and self._waiting:
            self._running = self._waiting.pop(0)
            self._running.tell(Waiting(0))
            self._drawing = asyncio.create_task(self._draw(self._running))
        for ahead, job in enumerate(self._waiting, start=1):
            job.tell(Waiting(ahead))
        if self._running is None and self._watchers == 0:
            self._idle.set()

    def _watch(self, job: Job) -> None:
        job.watchers += 1
        self._watchers += 1
        self._idle.clear()

    async def _draw(self, job: Job) -> None:
        loop = asyncio.get_running_loop()
        try:
            drawn = await loop.run_in_executor(self._worker, self._on_worker, job, loop)
        except Stopped:
            self._forget(job)
            job.finished.cancel()
        except Exception as error:  # it belongs to those who wait for the picture
            self._forget(job)
            if not job.finished.done():
                job.finished.set_exception(error)
                job.finished.exception()  # nobody may be left to look at it
        else:
            took_s = drawn.timings_ms["draw"] / 1000
            self._mean_s = took_s if self._mean_s is None else (3 * self._mean_s + took_s) / 4
            if not job.finished.done():
                job.finished.set_result(drawn)
                self._remember(job)
        finally:
            self._running = None
            self._advance()

    @staticmethod
    def _on_worker(job: Job, loop: asyncio.AbstractEventLoop) -> Drawn:
        begun = time.monotonic()
        image = job.engine.draw(
            job.order,
            lambda index, total: _call(loop, job.tell, Drawing(index, total)),
            job.cancelled.is_set,
        )
        drawn = time.monotonic()
        png = io.BytesIO()
        image.save(png, format="PNG")
        encoded = time.monotonic()
        return Drawn(
            png.getvalue(),
            job.engine.card.name,
            {
                "queue": 1000 * (begun - job.born),
                "draw": 1000 * (drawn - begun),
                "encode": 1000 * (encoded - drawn),
            },
        )

    def _remember(self, job: Job) -> None:
        self._known.move_to_end(job.request_id)
        finished = [other for other in self._known.values() if other.finished.done()]
        for other in finished[:-_REMEMBERED]:
            self._forget(other)

    def _forget(self, job: Job) -> None:
        if self._known.get(job.request_id) is job:
            del self._known[job.request_id]


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)
