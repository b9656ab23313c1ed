"""One cloud server as a generator of pictures: a synchronous client of t2i.v1.ImageGeneration.

Every way in which that can fail ends here as one of the CloudError family.
"""

from __future__ import annotations

import io
import math
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from edge_agent.errors import (
    Cancelled,
    CloudError,
    ConfigError,
    DeadlineExceeded,
    Misbehaved,
    Refused,
    Unreachable,
)
from edge_agent.prompt import DEFAULT_DEADLINE_S
from edge_agent.types import Cancellation, OnEvent, Picture, Queued, Request, Step
from protos.address import parse_address
from protos.t2i.v1 import image_generation_pb2 as pb
from protos.t2i.v1 import image_generation_pb2_grpc as pb_grpc

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
CONNECT_S = 2.0
MAX_PIXELS = 4096 * 4096
_SERVICE = pb.DESCRIPTOR.services_by_name["ImageGeneration"].full_name
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_HEAD = struct.Struct(">8s8xII")
# How gRPC says that no connection came about, in the last of its attempts: it tells nothing of the
# others. Where it says anything else, something may have been sent; should its words change, calls
# count as spent that were not.
_NEVER_CONNECTED = ("failed to connect to all addresses", "errors resolving ")
_PUSHBACK = "grpc-retry-pushback-ms"
_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)
# Before the second and the third attempt. gRPC could retry by itself, but would not tell whether an
# attempt before the last one had sent the request, which then may have been drawn and must be paid.
_PAUSES_S = (0.2, 0.4)


@dataclass(frozen=True, slots=True)
class CloudModel:
    """A model of the cloud: its defaults and limits; sizes in pixels."""

    name: str
    width: int
    height: int
    steps: int
    guidance: float
    min_size: int
    max_size: int
    size_multiple: int
    max_steps: int
    max_guidance: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a cloud server can draw."""

    models: tuple[CloudModel, ...]
    max_prompt_bytes: int
    version: str


@dataclass(slots=True)
class _Answer:
    """What came of a request so far."""

    image: pb.Image | None = None
    begun: bool = False


class CloudClient:
    """Draws on the server at `address` (HOST:PORT). Safe to share between threads; `close` it.

    Making one opens no socket. Raises ConfigError if the address is malformed.
    """

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        connect_s: float = CONNECT_S,
    ) -> None:
        try:
            parsed = parse_address(address)
        except ValueError as error:
            raise ConfigError(f"cloud {error}") from error
        self.address = str(parsed)
        self._max_message_bytes = max_message_bytes
        self._channel = grpc.insecure_channel(
            self.address,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.enable_retries", 0),
                # How long one attempt to connect may take, despite the name; 20 s by default.
                ("grpc.min_reconnect_backoff_ms", round(1000 * connect_s)),
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 1000),
                # Notices a server that vanished without a word in the middle of a picture.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.enable_http_proxy", 0 if parsed.loopback else 1),
            ],
        )
        self._stub = pb_grpc.ImageGenerationStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> CloudClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way end as Unreachable."""
        self._channel.close()

    def generate(
        self,
        request: Request,
        *,
        request_id: str,
        seed: int,
        deadline_s: float | None = None,
        on_event: OnEvent | None = None,
        cancellation: Cancellation | None = None,
    ) -> Picture:
        """Draw `request` with `seed`, in at most `deadline_s` (default 120) including connecting.

        A server that cannot be reached is asked up to three times, until a first event came.
        `on_event` gets Queued and Step as they come. Raises Unreachable, Refused, DeadlineExceeded,
        Misbehaved; Cancelled within a moment of `cancellation`. Asking again with the same
        `request_id` does not draw twice.
        """
        if cancellation is not None and cancellation.cancelled:
            raise Cancelled("the picture was cancelled")
        begun = time.monotonic()
        limit_s = DEFAULT_DEADLINE_S if deadline_s is None else deadline_s
        slow = f"had no picture within {limit_s:.1f} s; raise --deadline or use --route edge"
        message = _message(request, request_id, seed)
        maybe_drawn = False
        for pause_s in (*_PAUSES_S, math.inf):
            answer = _Answer()
            try:
                left_s = max(begun + limit_s - time.monotonic(), 0.0)
                with self._errors(slow):
                    self._ask(message, left_s, answer, on_event, cancellation)
                break
            except CloudError as error:
                if cancellation is not None and cancellation.cancelled:
                    raise Cancelled("the picture was cancelled") from None
                maybe_drawn |= error.maybe_drawn
                late = time.monotonic() + pause_s > begun + limit_s
                if answer.begun or late or not _worth_asking_again(error):
                    error.maybe_drawn = maybe_drawn
                    raise
            time.sleep(pause_s)
        if answer.image is None:
            raise Misbehaved(f"the server at {self.address} ended its answer without a picture")
        image = self._decode(answer.image, request, seed)
        told = (answer.image.guidance, *answer.image.timings_ms.values())
        if not all(map(math.isfinite, told)):
            raise Misbehaved(f"the server at {self.address} told guidance or times that are none")
        return Picture(
            image=image,
            model=_printable(answer.image.model),
            seed=seed,
            width=image.width,
            height=image.height,
            steps=answer.image.steps,
            guidance=answer.image.guidance,
            timings_ms={**answer.image.timings_ms, "total": 1000 * (time.monotonic() - begun)},
        )

    def _ask(
        self,
        message: pb.GenerateRequest,
        timeout_s: float,
        answer: _Answer,
        on_event: OnEvent | None,
        cancellation: Cancellation | None,
    ) -> None:
        """Send the request once and fill `answer` with what comes."""
        call = self._stub.Generate(message, timeout=timeout_s)
        forget = cancellation.on_cancel(call.cancel) if cancellation else lambda: None
        try:
            for event in call:
                answer.begun = True
                kind = event.WhichOneof("event")
                if kind == "image":
                    answer.image = event.image
                elif on_event is not None and kind == "queued":
                    on_event(Queued(event.queued.position))
                elif on_event is not None and kind == "step":
                    on_event(Step(event.step.index, event.step.total))
        finally:
            forget()
            call.cancel()  # no effect on a call that is over

    def healthy(self, timeout_s: float = CONNECT_S) -> bool:
        """Whether the server says, within `timeout_s`, that it serves pictures now."""
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        try:
            answer = self._health.Check(request, timeout=timeout_s)
        except (grpc.RpcError, ValueError):  # ValueError: the channel is closed
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def capabilities(self, timeout_s: float = CONNECT_S) -> Capabilities:
        """Ask what the server can draw. Raises as `generate` does."""
        with self._errors(f"did not answer within {timeout_s:g} s"):
            answer = self._stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=timeout_s)
        models = tuple(
            CloudModel(
                name=_printable(model.name),
                width=model.default_width,
                height=model.default_height,
                steps=model.default_steps,
                guidance=model.default_guidance,
                min_size=model.min_size,
                max_size=model.max_size,
                size_multiple=model.size_multiple,
                max_steps=model.max_steps,
                max_guidance=model.max_guidance,
            )
            for model in answer.models
        )
        return Capabilities(models, answer.max_prompt_bytes, _printable(answer.version))

    @contextmanager
    def _errors(self, slow: str) -> Iterator[None]:
        """Turn what gRPC raises into the error of ours that says the same.

        `slow` completes the sentence about a server that took too long.
        """
        try:
            yield
        except grpc.RpcError as error:
            raise self._mapped(error, slow) from error
        except ValueError as error:  # all that gRPC says of a closed channel
            if not str(error).startswith("Cannot invoke RPC"):
                raise  # it came from whoever listens to events
            raise Unreachable(
                f"the connection to {self.address} was closed; make another CloudClient",
                maybe_drawn=False,
            ) from error

    def _mapped(self, error: grpc.RpcError, slow: str) -> CloudError:
        code, said = error.code(), _printable(error.details() or "no reason given")
        pushback = dict(error.trailing_metadata() or ()).get(_PUSHBACK)
        where = f"the cloud at {self.address}"
        status = grpc.StatusCode
        # A server that tells when to come back is there, and did not begin; a broken connection
        # tells nothing.
        if code in _REFUSALS and "larger than max" not in said:
            return Refused(f"{where} refused: {said}", _retry_after_s(pushback))
        if code in (status.UNAVAILABLE, status.DEADLINE_EXCEEDED) and pushback is not None:
            return Refused(f"{where} refused: {said}", _retry_after_s(pushback))
        if code is status.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"{where} {slow} ({said})")
        if code is status.RESOURCE_EXHAUSTED and "larger than max" in said:
            return Misbehaved(
                f"{where} sent a message over {self._max_message_bytes} bytes ({said});"
                " ask for a smaller picture"
            )
        if code in (status.UNAVAILABLE, status.CANCELLED):
            return Unreachable(
                f"{where} cannot be reached ({said}); check that a cloud-server runs there",
                maybe_drawn=not said.startswith(_NEVER_CONNECTED),
            )
        return Misbehaved(
            f"{where} failed with {code.name}: {said}; see the server's log",
            maybe_drawn=code is not status.UNIMPLEMENTED,
        )

    def _decode(self, answer: pb.Image, request: Request, seed: int) -> Image.Image:
        """Return the picture in `answer` if it is a PNG of the size and seed asked for."""
        where, data = f"the cloud at {self.address}", answer.data
        stated = (answer.width, answer.height)
        asked = (request.width or answer.width, request.height or answer.height)
        if stated != asked or answer.seed != seed:
            raise Misbehaved(
                f"{where} drew {stated[0]}x{stated[1]} with seed {answer.seed}"
                f" and not {asked[0]}x{asked[1]} with seed {seed}"
            )
        # Sizes are read from the header before anything is unpacked to them.
        if len(data) < _PNG_HEAD.size or data[:8] != _PNG_SIGNATURE:
            raise Misbehaved(f"{where} answered with {len(data)} bytes that are not a PNG")
        real: tuple[int, int] = _PNG_HEAD.unpack_from(data)[1:]
        if real != stated or real[0] * real[1] > MAX_PIXELS:
            raise Misbehaved(
                f"{where} sent {real[0]}x{real[1]} pixels and announced {stated[0]}x{stated[1]};"
                f" at most {MAX_PIXELS} pixels are read"
            )
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
                opened.verify()  # checksums; leaves the image unusable
            with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
                if opened.size != stated:  # a second header came later
                    raise ValueError(f"it is {opened.width}x{opened.height} pixels after all")
                return opened.convert("RGB")
        except Exception as error:  # a stranger's bytes find whatever a decoder can raise
            raise Misbehaved(f"{where} answered with a damaged PNG: {error}") from error


def _message(request: Request, request_id: str, seed: int) -> pb.GenerateRequest:
    try:
        # None leaves a field absent: the model's default.
        return pb.GenerateRequest(
            request_id=request_id,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=seed,
            width=request.width,
            height=request.height,
            steps=request.steps,
            guidance=request.guidance,
            format=pb.IMAGE_FORMAT_PNG,
        )
    except ValueError as error:  # such as a width of 2**32 or half a surrogate pair
        raise ConfigError(f"the request cannot be sent: {error}; choose another value") from error


def _worth_asking_again(error: CloudError) -> bool:
    """Whether the server may be back in a moment: only UNAVAILABLE means that it had not begun."""
    cause = error.__cause__
    unavailable = isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.UNAVAILABLE
    return unavailable and isinstance(error, Unreachable)


def _retry_after_s(pushback: str | bytes | None) -> float | None:
    try:
        milliseconds = int(pushback or -1)
    except ValueError:
        return None
    return milliseconds / 1000 if milliseconds >= 0 else None


def _printable(text: str) -> str:
    """Make a stranger's words fit for a terminal and one sentence."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:300]
