"""A cloud server as a painter: what is labelled is then what its callers get."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from textwrap import shorten
from typing import Any, TypeVar

import grpc
from PIL import Image

from cloud_server.errors import ConfigError, DrawError
from protos.address import parse_address
from protos.t2i.v1 import image_generation_pb2 as pb
from protos.t2i.v1 import image_generation_pb2_grpc as pb_grpc

AT_ONCE = 4  # pictures asked for; the server draws one while the next ones wait in its queue
ANSWER_S, PICTURE_S = 10.0, 600.0
PATIENCE_S = 300.0  # of waiting for one picture to be begun
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
_PUSHBACK = "grpc-retry-pushback-ms"
_LATER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.enable_retries", 0),  # they are counted here
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

_log = logging.getLogger(__name__)
T = TypeVar("T")


class RemotePainter:
    """The model of the cloud server at `address` (HOST:PORT), drawing with its own defaults.

    It is known by name, version and defaults: a server does not say which weights it has. Raises
    ConfigError for a malformed address; what goes wrong on the wire becomes a DrawError.
    """

    def __init__(
        self,
        address: str,
        *,
        patience_s: float = PATIENCE_S,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        try:
            parsed = parse_address(address)
        except ValueError as error:
            raise ConfigError(f"cloud {error}") from error
        self.address, self._loopback = str(parsed), parsed.loopback
        self._patience_s = patience_s
        self._given_up = threading.Event()
        self._wait = wait or self._given_up.wait

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address,)

    @property
    def name(self) -> str:
        """What the server calls its model."""
        return str(self._model.name)

    @property
    def settings(self) -> Mapping[str, float]:
        """What it draws with: width and height in pixels, steps, guidance."""
        names = ("width", "height", "steps", "guidance")
        return {name: getattr(self._model, f"default_{name}") for name in names}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the model's own digest, its name and defaults, and the server's version."""
        facts = [self.name, dict(self.settings), self._capabilities.version, self._model.digest]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _stub(self) -> pb_grpc.ImageGenerationStub:
        proxy = ("grpc.enable_http_proxy", 0 if self._loopback else 1)
        channel = grpc.insecure_channel(self.address, options=[*_OPTIONS, proxy])
        return pb_grpc.ImageGenerationStub(channel)

    @cached_property
    def _capabilities(self) -> pb.Capabilities:
        request = pb.GetCapabilitiesRequest()
        return self._patiently(lambda: self._stub.GetCapabilities(request, timeout=ANSWER_S))

    @property
    def _model(self) -> pb.Model:
        return self._capabilities.models[0]

    def check(self, prompts: Sequence[str]) -> None:
        """Raise DrawError where nobody is at the address, or a prompt is longer than it reads."""
        limit = self._capabilities.max_prompt_bytes
        for prompt in prompts:
            if limit and len(prompt.encode()) > limit:
                raise DrawError(
                    f"the cloud at {self.address} reads {limit} bytes of a prompt, and "
                    f"'{shorten(prompt, 40)}' has {len(prompt.encode())}; "
                    "shorten it"
                )

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Return a picture per prompt; several are asked for at once."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                return list(pool.map(self._draw, prompts, seeds))
            except BaseException:  # such as Ctrl-C, which no thread hears but the main one
                self._given_up.set()
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                self._given_up.clear()

    def _draw(self, prompt: str, seed: int) -> Image.Image:
        # Asked again with the same id, the server does not draw twice.
        known = hashlib.sha256(f"{self.digest} {seed} {prompt}".encode()).hexdigest()[:32]
        request = pb.GenerateRequest(
            request_id=f"label-{known}",
            prompt=prompt,
            seed=seed,
            width=int(self.settings["width"]),
            height=int(self.settings["height"]),
            steps=int(self.settings["steps"]),
            guidance=self.settings["guidance"],
            format=pb.IMAGE_FORMAT_PNG,
        )
        return self._patiently(lambda: self._answer(request))

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask until there is an answer, or nobody to wait for it."""
        waited_s = 0.0
        for attempt in itertools.count():
            try:
                return ask()
            except grpc.RpcError as error:
                wait_s = _wait_s(error, attempt)
                if wait_s is None or waited_s + wait_s > self._patience_s:
                    raise self._error(error) from error
            if attempt == 0:
                told = "the cloud at %s is busy or gone; waiting for it, %.0f s at most"
                _log.warning(told, self.address, self._patience_s)
            waited_s += wait_s
            if self._wait(wait_s):
                raise DrawError(f"the cloud at {self.address} was not waited for any longer")
        raise AssertionError("counting never ends")

    def _answer(self, request: pb.GenerateRequest) -> Image.Image:
        image = None
        for event in self._stub.Generate(request, timeout=PICTURE_S):
            if event.WhichOneof("event") == "image":
                image = event.image
        if image is None:
            raise DrawError(f"the cloud at {self.address} ended its answer without a picture")
        try:
            with Image.open(io.BytesIO(image.data), formats=["PNG"]) as opened:
                return opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DrawError(f"the cloud at {self.address} sent a damaged PNG: {error}") from error

    def _error(self, error: grpc.RpcError) -> DrawError:
        said = error.details() or error.code().name
        cure = "what is labelled is kept, so run the same command again once it does"
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            cure = "correct what it names; what is labelled is kept"
        return DrawError(
            f"the cloud at {self.address} draws no picture ({error.code().name}: {said}); {cure}"
        )


def _wait_s(error: grpc.RpcError, attempt: int) -> float | None:
    """Return how long to wait before asking again; None if that is of no use.

    The server's own delay counts, where it gives one; a negative one means never.
    """
    if error.code() not in _LATER:
        return None
    pushback = dict(error.trailing_metadata() or ()).get(_PUSHBACK)
    if pushback is None:
        return min(FIRST_WAIT_S * 2.0 ** min(attempt, 16), LONGEST_WAIT_S)
    try:
        milliseconds = int(pushback)
    except ValueError:
        return None
    return max(milliseconds / 1000, 0.01) if milliseconds >= 0 else None
