"""Values that cross the rooms of the device: a request, what was decided, what came of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


class Route(StrEnum):
    """Where a picture is drawn; `AUTO` leaves it to the router."""

    AUTO = "auto"
    EDGE = "edge"
    CLOUD = "cloud"


class SamplerName(StrEnum):
    """How the device walks from noise to a picture."""

    DDIM = "ddim"
    EULER = "euler"
    EULER_A = "euler-a"
    DPMPP_2M = "dpmpp-2m"
    DPMPP_2M_KARRAS = "dpmpp-2m-karras"
    LCM = "lcm"
    FLOW_EULER = "flow-euler"


class Provider(StrEnum):
    """What runs the device's networks; `AUTO` is what measured fastest here, or the CPU.

    All but OpenVINO, which is an engine of its own, are onnxruntime's execution providers.
    """

    AUTO = "auto"
    CPU = "cpu"
    OPENVINO = "openvino"
    OPENVINO_F32 = "openvino:f32"
    CUDA = "cuda"
    TENSORRT = "tensorrt"
    COREML = "coreml"
    DIRECTML = "directml"

    @property
    def base(self) -> str:
        """The name without what follows the colon."""
        return self.value.partition(":")[0]


class Memory(StrEnum):
    """How much memory the device's networks may take: the less, the slower."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class Request:
    """One wish for a picture. `None` means: the default of the model that draws.

    `sampler` is the device's; the cloud draws with its own. `preview_every` asks for a `Preview`
    after every so many steps on the device, where its bundle has a decoder that is small enough.
    """

    prompt: str
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: SamplerName | None = None
    negative_prompt: str = ""
    route: Route = Route.AUTO
    deadline_s: float | None = None
    private: bool = False
    preview_every: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a prompt goes and why. On route `auto` the cloud if and only if `score > threshold`.

    `prs` is the Pareto relative superiority of the edge (above 0.5: edge better), `score` is
    1 - prs, `threshold` is 1 - alpha of the paper's section 5.2, `metrics` holds D_i by name,
    `ignored_tokens` counts the end of a prompt that is longer than the text encoder reads. Where
    nothing could be predicted there are no metrics, and `prs` is 0.5. In a cascade all is said of
    the edge's picture, and `quality` holds what was measured of it, by metric; where nobody could
    look at it, it is kept and the numbers are the router's.
    """

    route: Route
    reason: str
    prs: float
    score: float
    threshold: float
    share: float
    metrics: Mapping[str, float]
    ignored_tokens: int = 0
    quality: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Picture:
    """What a generator hands back: the image, and with which settings which model drew it."""

    image: Image
    model: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    timings_ms: Mapping[str, float]
    sampler: SamplerName | None = None  # where it is known: on the device


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a request. `drawn_on` differs from `decision.route` after a fallback.

    `backends` says what ran each network that was used here: equal seeds give equal pixels on equal
    backends. `peak_rss` is the most memory, in bytes, that this process has held so far.
    """

    request_id: str
    prompt: str
    picture: Picture
    decision: Decision
    drawn_on: Route
    timings_ms: Mapping[str, float]
    models: Mapping[str, str] = field(default_factory=dict)
    fallback_from: Route | None = None
    fallback_reason: str | None = None
    negative_prompt: str = ""
    backends: Mapping[str, str] = field(default_factory=dict)
    peak_rss: int | None = None


@dataclass(frozen=True, slots=True)
class Queued:
    """The cloud accepted the request; `position` prompts are ahead of it."""

    position: int


@dataclass(frozen=True, slots=True)
class Step:
    """Denoising step `index` of `total` is done."""

    index: int
    total: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What the picture is becoming, as step `index` saw it, decoded roughly."""

    index: int
    image: Image


@dataclass(frozen=True, slots=True)
class Fallback:
    """The first choice failed and the other side takes over; `drawn`: it has a picture already."""

    to: Route
    reason: str
    drawn: bool = False


Event = Queued | Step | Preview | Fallback
OnEvent = Callable[[Event], None]


class Cancellation:
    """A flag that a caller sets to stop work within a step; safe to set from a signal handler."""

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._hooks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Ask whoever works under this flag to stop."""
        self._flag.set()
        for hook in list(self._hooks):
            hook()

    def on_cancel(self, hook: Callable[[], None]) -> Callable[[], None]:
        """Call `hook` when cancelled, at once if already so; the returned function forgets it."""
        self._hooks.append(hook)
        if self._flag.is_set():
            hook()
        return lambda: self._hooks.remove(hook)

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._flag.is_set()
