"""How fast each provider runs each network on this device, and how near it comes to the CPU.

What is measured are the networks' own first inputs when the CPU draws a prompt in one step, or two
where a decoder of its own shows a preview between them, in the size and with the guidance that the
bundle draws with unless told otherwise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from edge_agent.bundle import Bundle, Component
from edge_agent.edge import Edge
from edge_agent.errors import AgentError
from edge_agent.runtime import providers
from edge_agent.runtime.checked import psnr_db
from edge_agent.runtime.network import Backend, Engine, Shapes
from edge_agent.runtime.networks import LazyNetwork, Networks
from edge_agent.runtime.plan import Measured, candidates
from edge_agent.types import Cancellation, Memory, Provider, Request

PROMPT, SEED = "a red car on the beach", 1
MOST_RUNS, ENOUGH_S = 5, 4.0
Feeds = Mapping[str, np.ndarray]
OnResult = Callable[[str, Provider, Measured], None]


class _Listening:
    """An engine whose first inputs and outputs are kept."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.heard: tuple[Feeds, list[np.ndarray]] | None = None

    @property
    def inputs(self) -> Sequence[str]:
        return tuple(self._engine.inputs)

    @property
    def backend(self) -> Backend:
        return self._engine.backend

    def run(self, feeds: Feeds, cancellation: Cancellation | None = None) -> list[np.ndarray]:
        outputs = self._engine.run(feeds, cancellation)
        self.heard = self.heard or (dict(feeds), outputs)
        return outputs


class _Recorder(Networks):
    """Networks on the CPU that keep what they were first fed and answered, by component."""

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        super().__init__(bundle, provider=Provider.CPU, memory=Memory.HIGH, threads=threads)
        self.listening: dict[str, _Listening] = {}

    def check(self, part: Component, provider: Provider) -> None:
        """Take any precision: what the CPU answers is what the others are compared with."""

    def start(self, part: Component, provider: Provider, shapes: Shapes | None) -> Engine:
        engine = _Listening(super().start(part, provider, shapes))
        self.listening[part.name] = engine
        return engine


def measure(bundle: Bundle, threads: int | None, on_result: OnResult) -> None:
    """Measure every provider that is installed and remember the results for `auto`.

    Recognition is left out. Raises GenerationError when the CPU itself cannot draw.
    """
    recorder = _Recorder(bundle, threads)
    edge = Edge(recorder)
    decision, encoded = edge.router(0.0).decide(PROMPT)
    shared = {bundle.router.text_encoder: encoded}
    preview = bundle.diffusion.preview
    shown = preview is not None and preview.decoder != "vae_decoder"
    request = Request(PROMPT, steps=1 + shown, preview_every=1)
    generator = edge.generator(time.perf_counter)
    drawn = generator.generate(request, shared, SEED, on_event=lambda _: None)
    if bundle.critic:
        edge.critic(0.0).judge(drawn.image, PROMPT, encoded, decision.metrics)
    inputs = {name: one.heard for name, one in recorder.listening.items()}
    recorder.close()  # a provider is not to share the memory with the CPU's copy
    plain = Networks(bundle, provider=Provider.CPU, threads=threads)
    for network in recorder.known:
        heard = inputs.get(network.part.name)
        if heard is None:
            continue
        results = dict(_results(plain, network, *heard))
        plain.plan.remember(network.part, results)
        for provider, result in results.items():
            on_result(network.part.name, provider, result)


def _results(
    networks: Networks, network: LazyNetwork, feeds: Feeds, wanted: list[np.ndarray]
) -> Iterator[tuple[Provider, Measured]]:
    for provider in candidates(network.precise):
        shapes = {name: feeds[name].shape for name in network.inputs}
        fixed = network.static and provider in providers.STATIC
        try:
            engine = networks.start(network.part, provider, shapes if fixed else None)
            found = engine.run(feeds)
            yield provider, Measured(_seconds(engine, feeds), psnr_db(wanted, found))
        except AgentError as err:
            yield provider, Measured(error=str(err))


def _seconds(engine: Engine, feeds: Feeds) -> float:
    """Return the median of a few runs; the first run of all has been before."""
    times: list[float] = []
    while len(times) < MOST_RUNS and sum(times) < ENOUGH_S:
        started = time.perf_counter()
        engine.run(feeds)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
