"""What the rest of the device knows of a network, whichever engine runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edge_agent.errors import GenerationError
from edge_agent.types import Cancellation, Provider

if TYPE_CHECKING:  # where memory runs out, numpy may be what does not load
    import numpy as np

Shapes = Mapping[str, tuple[int, ...]]  # of every input, by name


@dataclass(frozen=True, slots=True)
class Backend:
    """What really runs a network: provider, engine with version, precision of its arithmetic.

    `nodes` counts the network's nodes by who took them, in onnxruntime's names; it is empty where
    all run in one place anyway, or where the engine does not tell.
    """

    provider: Provider
    engine: str
    precision: str = ""
    nodes: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        told = " ".join(filter(None, [self.provider.base, self.precision]))
        nodes = ", ".join(f"{count} {name}" for name, count in self.nodes.items())
        return f"{told} ({self.engine}{'; nodes: ' + nodes if nodes else ''})"


class Network(Protocol):
    """A network that can be run; `inputs` are the names of what it is fed."""

    @property
    def inputs(self) -> Collection[str]:
        """The names of the inputs."""
        ...

    def run(
        self, feeds: Mapping[str, np.ndarray], cancellation: Cancellation | None = None
    ) -> list[np.ndarray]:
        """Run the network on arrays, cast to its own types, and return its outputs in order.

        Raises Cancelled when `cancellation` is set before or during the run, GenerationError when
        the run fails.
        """
        ...


class Engine(Network, Protocol):
    """A network that is open in an engine; letting go of it gives back its memory."""

    @property
    def backend(self) -> Backend:
        """What runs it."""
        ...


def cast(feeds: Mapping[str, np.ndarray], types: Mapping[str, np.dtype]) -> dict[str, np.ndarray]:
    """Return inputs in the network's own types; one it does not know is for the engine to name."""
    return {
        name: feed.astype(types.get(name, feed.dtype), copy=False) for name, feed in feeds.items()
    }


def name_of(path: Path) -> str:
    """Return what a person calls the network in `path`: in a bundle, the folder's name."""
    return path.parent.name if path.stem == "model" else path.stem


def run_error(path: Path, engine: str, err: Exception) -> GenerationError:
    """Say in one sentence that `engine` failed to run the network in `path`."""
    if is_out_of_memory(err):
        return out_of_memory(name_of(path))
    return GenerationError(
        f"{engine} failed in {path} ({first_line(err)}); "
        "check the --size, or run `edge-agent doctor`"
    )


def out_of_memory(what: str) -> GenerationError:
    """Say in one sentence that there was not enough memory for `what`, such as a network."""
    return GenerationError(
        f"{what} ran out of memory; "
        "ask for --memory low or a smaller --size, or close other programs"
    )


def is_out_of_memory(err: Exception) -> bool:
    """Tell an error for want of memory from others; those of engines have no type of their own."""
    text = str(err).lower()
    signs = (
        "bad_alloc",
        "failed to allocate",
        "cannot allocate",
        "out of memory",
        "bad allocation",
        "can't alloc",
        "failed to map segment",  # of a library that is loaded
    )
    return isinstance(err, MemoryError) or any(sign in text for sign in signs)


def first_line(err: Exception) -> str:
    """Return the first line of an engine's message that says something, at most 300 letters."""
    lines = [line.strip().removeprefix("Caught exception: ") for line in str(err).splitlines()]
    # OpenVINO begins with where in its own source the exception was made.
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return (said or lines or [""])[0][:300]
