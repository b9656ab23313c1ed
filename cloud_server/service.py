"""The gRPC face of the studio: checks what comes in, streams progress, speaks in status codes."""

from __future__ import annotations

import logging
import math
import secrets
import unicodedata
import uuid
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import grpc

from cloud_server.engine import Card, Order
from cloud_server.errors import DrawError
from cloud_server.studio import Closed, Drawn, Full, IdTaken, Job, Progress, Studio, Waiting
from protos.t2i.v1 import image_generation_pb2 as pb
from protos.t2i.v1 import image_generation_pb2_grpc as pb_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["ImageGeneration"].full_name
MAX_PROMPT_BYTES = 4096
MAX_ID_BYTES = 128
MAX_SEED = 2**63 - 1
PROGRESS_INTERVAL_S = 0.1

_log = logging.getLogger(__name__)


class Invalid(Exception):
    """A field of the request is wrong; the message names it and its value."""


class ImageGenerationService(pb_grpc.ImageGenerationServicer):
    """Serves t2i.v1.ImageGeneration on grpc.aio."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Stream the progress of one picture, then the picture."""
        job = await self._accept(request, context)
        order = job.order
        try:
            async for progress in job.follow(PROGRESS_INTERVAL_S):
                await context.write(_event(progress))
            if job.finished.cancelled():
                told = "the server shut down before the picture was done"
                await self._abort_closed(context, Closed(told))
            if (error := job.finished.exception()) is not None:
                _log.error("%s failed: %s", job.request_id, error, exc_info=error)
                known = isinstance(error, DrawError)
                details = str(error) if known else "the model failed; the server's log says how"
                await context.abort(grpc.StatusCode.INTERNAL, details)
            drawn = job.finished.result()
            await context.write(pb.GenerateEvent(image=_image(drawn, order)))
        finally:
            self._studio.leave(job)
        _log.info(
            "drew %s: %dx%d, %d steps, seed %d, %.0f ms after %.0f ms in the queue",
            job.request_id,
            order.width,
            order.height,
            order.steps,
            order.seed,
            drawn.timings_ms["draw"],
            drawn.timings_ms["queue"],
        )

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Any
    ) -> pb.Capabilities:
        """Say what the model is called, its defaults and its limits."""
        try:
            card = self._studio.card
        except Closed as error:
            await self._abort_closed(context, error)
        model = pb.Model(
            name=card.name,
            default_width=card.width,
            default_height=card.height,
            min_size=card.min_size,
            max_size=card.max_size,
            size_multiple=card.size_multiple,
            default_steps=card.steps,
            max_steps=card.max_steps,
            default_guidance=card.guidance,
            max_guidance=card.max_guidance,
            digest=card.digest,
        )
        return pb.Capabilities(
            models=[model], max_prompt_bytes=MAX_PROMPT_BYTES, version=server_version()
        )

    async def _accept(self, request: pb.GenerateRequest, context: Any) -> Job:
        """Return the job of a request that may be drawn; abort the call otherwise."""
        studio = self._studio
        # The id is compared with what was asked: a seed drawn here is not part of that.
        fingerprint = request.SerializeToString(deterministic=True)
        try:
            card = studio.card
            order = order_of(request, card)
            if request.request_id and (job := studio.join(request.request_id, fingerprint)):
                return job
            left_s = context.time_remaining()
            if left_s is not None and 0 < studio.wait_s >= left_s:
                await self._abort_later(
                    context,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"the queue takes about {studio.wait_s:.1f} s and the caller waits only"
                    f" {left_s:.1f} s; raise the deadline or draw elsewhere",
                    studio.wait_s,
                )
            return studio.submit(request.request_id or str(uuid.uuid4()), fingerprint, order)
        except Invalid as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except IdTaken:
            await context.abort(
                grpc.StatusCode.ALREADY_EXISTS,
                f"request_id {request.request_id!r} was used for another request; choose a new one",
            )
        except Full as error:
            await self._abort_later(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the queue is full; try again in about {error.retry_after_s:.1f} s",
                error.retry_after_s,
            )
        except Closed as error:
            await self._abort_closed(context, error)
        raise AssertionError("abort returned")

    async def _abort_later(
        self, context: Any, code: grpc.StatusCode, details: str, retry_after_s: float
    ) -> NoReturn:
        pushback_ms = str(math.ceil(1000 * retry_after_s))
        await context.abort(code, details, (("grpc-retry-pushback-ms", pushback_ms),))
        raise AssertionError("abort returned")

    async def _abort_closed(self, context: Any, error: Closed) -> NoReturn:
        unavailable = grpc.StatusCode.UNAVAILABLE
        if error.retry_after_s is not None:
            told = f"{error}; try again in about {error.retry_after_s:.0f} s"
            await self._abort_later(context, unavailable, told, error.retry_after_s)
        # -1: never; this server is going.
        await context.abort(unavailable, str(error), (("grpc-retry-pushback-ms", "-1"),))
        raise AssertionError("abort returned")


def order_of(request: pb.GenerateRequest, card: Card) -> Order:
    """Fill in what `request` leaves out from `card`; raise Invalid for a field that is wrong."""
    _check_text("prompt", request.prompt, MAX_PROMPT_BYTES)
    if not request.prompt.strip():
        raise Invalid("prompt is empty; describe a picture")
    _check_text("negative_prompt", request.negative_prompt, MAX_PROMPT_BYTES)
    _check_text("request_id", request.request_id, MAX_ID_BYTES, spaces=" ")
    if request.format not in (pb.IMAGE_FORMAT_UNSPECIFIED, pb.IMAGE_FORMAT_PNG):
        raise Invalid(f"format is {request.format}; only IMAGE_FORMAT_PNG (1) is drawn")
    seed = request.seed if request.HasField("seed") else secrets.randbelow(MAX_SEED + 1)
    width = request.width if request.HasField("width") else card.width
    height = request.height if request.HasField("height") else card.height
    steps = request.steps if request.HasField("steps") else card.steps
    guidance = request.guidance if request.HasField("guidance") else card.guidance
    _check_range("seed", seed, 0, MAX_SEED)
    for name, side in (("width", width), ("height", height)):
        _check_range(name, side, card.min_size, card.max_size)
        if side % card.size_multiple:
            raise Invalid(f"{name} is {side}; it must be a multiple of {card.size_multiple}")
    _check_range("steps", steps, 1, card.max_steps)
    _check_range("guidance", guidance, 0.0, card.max_guidance)
    return Order(request.prompt, request.negative_prompt, seed, width, height, steps, guidance)


def server_version() -> str:
    """Return the installed version of this project, `dev` from a bare checkout."""
    try:
        return version("routet2i-edge")
    except PackageNotFoundError:
        return "dev"


def _check_text(name: str, text: str, limit_bytes: int, spaces: str = "\t\n\r") -> None:
    size = len(text.encode("utf-8"))
    if size > limit_bytes:
        raise Invalid(f"{name} has {size} bytes; at most {limit_bytes} are read, shorten it")
    for place, character in enumerate(text):
        if unicodedata.category(character) == "Cc" and character not in spaces:
            raise Invalid(
                f"{name} holds the control character U+{ord(character):04X} at {place}; remove it"
            )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is not in any range
        raise Invalid(f"{name} is {value}; it must lie between {low} and {high}")


def _event(progress: Progress) -> pb.GenerateEvent:
    if isinstance(progress, Waiting):
        return pb.GenerateEvent(queued=pb.Queued(position=progress.position))
    return pb.GenerateEvent(step=pb.Step(index=progress.index, total=progress.total))


def _image(drawn: Drawn, order: Order) -> pb.Image:
    return pb.Image(
        data=drawn.png,
        format=pb.IMAGE_FORMAT_PNG,
        seed=order.seed,
        width=order.width,
        height=order.height,
        steps=order.steps,
        guidance=order.guidance,
        model=drawn.model,
        timings_ms=drawn.timings_ms,
    )
