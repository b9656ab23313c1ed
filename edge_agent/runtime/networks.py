"""The networks of a bundle: opened when first needed, by the plan's provider, and let go again.

How long they stay is the memory mode's. `low`: one at a time, without the arena and without copies
of weights. `normal`: from their first use on. `high`: opened all at once, one for each size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np

from edge_agent.bundle import Bundle, Component
from edge_agent.errors import AgentError, Cancelled
from edge_agent.precision import W8A8, check_precision, suits
from edge_agent.runtime import providers, sizes
from edge_agent.runtime.checked import Checked
from edge_agent.runtime.network import Backend, Engine, Shapes
from edge_agent.runtime.openvino import OpenVinoSession
from edge_agent.runtime.plan import Choice, Measured, Plan, cache_folder, digest_of
from edge_agent.runtime.session import Session, default_threads
from edge_agent.types import Cancellation, Memory, Provider

NOTHING: Mapping[str, Shapes] = {}


class LazyNetwork:
    """One network of a bundle, open while it is needed; any number of threads may run it.

    `static` says that it is fed few shapes, so that a provider may compile for each. `by_shape`:
    this one does, and opens ahead of its first run only for shapes that it was opened for before.
    """

    def __init__(
        self, networks: Networks, part: Component, choice: Choice, static: bool, precise: bool
    ) -> None:
        self.part, self.choice, self.precise = part, choice, precise
        self.inputs, self.static = part.inputs, static
        self._networks = networks
        self.by_shape = static and choice.provider in providers.STATIC
        self._lock = Lock()
        self._open: dict[tuple[tuple[str, tuple[int, ...]], ...], Engine] = {}
        self.backend: Backend | None = None

    def open(self, known: Shapes | None = None) -> None:
        """Open it now, not at its first run; raises what running it would.

        `known` are the shapes of inputs that are known already; those of all must be by shape.
        """
        shapes = self._networks.sizes_like(self, known or {}) if self.by_shape else None
        if shapes is not None or not self.by_shape:
            self._engine(shapes)

    def close(self) -> None:
        """Let go of it; a run in another thread ends in peace."""
        with self._lock:
            self._open.clear()

    def run(
        self, feeds: Mapping[str, np.ndarray], cancellation: Cancellation | None = None
    ) -> list[np.ndarray]:
        """Open the network if needed and run it; raises also what opening raises."""
        if cancellation is not None and cancellation.cancelled:
            raise Cancelled("stopped")
        shapes = {name: feeds[name].shape for name in self.inputs if name in feeds}
        return self._engine(shapes if self.by_shape else None).run(feeds, cancellation)

    def _engine(self, shapes: Shapes | None) -> Engine:
        self._networks.make_room_for(self)
        key = tuple((shapes or {}).items())
        with self._lock:
            if key not in self._open:
                if self._networks.memory is not Memory.HIGH:
                    self._open.clear()
                self._open[key] = engine = self._start(shapes)
                self.backend = engine.backend
            return self._open[key]

    def _start(self, shapes: Shapes | None) -> Engine:
        networks, part, provider = self._networks, self.part, self.choice.provider
        engine = networks.start(part, provider, shapes)
        if shapes is not None:
            networks.remember_size(part, provider, shapes)
        if provider is Provider.CPU or not self.precise:
            return engine
        known = networks.plan.measured(part, [provider]).get(provider)
        if known is not None and known.right:
            return engine
        return Checked(
            part.name,
            engine,
            lambda: networks.start(part, Provider.CPU, None),
            lambda near: networks.plan.remember(part, {provider: Measured(psnr_db=near)}),
        )


class Networks:
    """All networks of `bundle`, on the providers that `provider` stands for.

    Raises ConfigError when the provider is absent or onnxruntime is installed more than once.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: Provider = Provider.AUTO,
        memory: Memory = Memory.NORMAL,
        threads: int | None = None,
        cache: Path | None = None,
    ) -> None:
        providers.check(provider)
        self.bundle, self.memory = bundle, memory
        self.threads = threads or default_threads()
        self._cache = cache or cache_folder()
        self.plan = Plan(provider, self.threads, self._cache)
        self._lock = Lock()
        self._known: dict[str, LazyNetwork] = {}
        self._opening: ThreadPoolExecutor | None = None

    def get(self, name: str, *, static: bool = False, precise: bool = False) -> LazyNetwork:
        """Return a component's network, not open yet; raises BundleError when there is none.

        `precise` asks for arithmetic in 32 bits, `static` says that it is fed few shapes.
        """
        with self._lock:
            if name not in self._known:
                part = self.bundle.component(name)
                choice = self.plan.choose(part, precise=precise)
                self.check(part, choice.provider)
                self._known[name] = LazyNetwork(self, part, choice, static, precise)
            return self._known[name]

    def check(self, part: Component, provider: Provider) -> None:
        """Raise BundleError for a precision that is not to be computed there."""
        check_precision(part, provider)

    def open_now(self, *networks: LazyNetwork, known: Mapping[str, Shapes] = NOTHING) -> None:
        """Open networks before they are run, where memory allows; raises what running would.

        `known` are shapes that they will be fed, by name.
        """
        if self.memory is not Memory.LOW:
            for network in networks:
                network.open(known.get(network.part.name))

    def open_soon(self, *networks: LazyNetwork, known: Mapping[str, Shapes] = NOTHING) -> None:
        """Open networks in the background, where memory allows; what fails is told at the run."""
        if self.memory is Memory.LOW:
            return
        with self._lock:
            # One at a time: a network that opens takes a processor, and there is other work.
            self._opening = self._opening or ThreadPoolExecutor(1, "opening")
            for network in networks:
                self._opening.submit(_try_to_open, network, known.get(network.part.name))

    def release(self) -> None:
        """Let go of what the memory mode does not keep between requests."""
        if self.memory is Memory.LOW:
            for network in self.known:
                network.close()

    def close(self) -> None:
        """Let go of all networks."""
        with self._lock:
            opening, self._opening = self._opening, None
        if opening is not None:
            opening.shutdown(cancel_futures=True)
        for network in self.known:
            network.close()

    @property
    def known(self) -> list[LazyNetwork]:
        """The networks that were asked for so far, open or not."""
        return list(self._known.values())

    @property
    def backends(self) -> dict[str, Backend]:
        """What ran or runs each network that was open."""
        return {one.part.name: one.backend for one in self.known if one.backend is not None}

    def make_room_for(self, network: LazyNetwork) -> None:
        """In memory mode `low`, let go of all other networks."""
        if self.memory is Memory.LOW:
            for other in self.known:
                if other is not network:
                    other.close()

    def start(self, part: Component, provider: Provider, shapes: Shapes | None) -> Engine:
        """Open a network in the engine that its provider stands for."""
        file = self.bundle.path / part.file
        if provider.base == Provider.OPENVINO:
            return OpenVinoSession(
                file,
                threads=self.threads,
                inputs=part.inputs,
                f32=provider is Provider.OPENVINO_F32,
                shapes=shapes,
                compiled=self.kept(part, provider, shapes).with_suffix(".blob"),
                halved=None
                if part.precision == W8A8
                else self.kept(part, Provider.OPENVINO, None).with_suffix(".xml"),
            )
        return Session(
            file,
            provider=provider,
            threads=self.threads,
            # Over fp16 on its CPU provider onnxruntime's optimiser can end the process (1.31).
            optimized=part.optimized or not suits(part, provider),
            memory=self.memory,
            shapes=shapes,
            cache=None if provider is Provider.CPU else self.kept(part, provider, shapes),
        )

    def remember_size(self, part: Component, provider: Provider, shapes: Shapes) -> None:
        """Note what a network was opened for, so that it is opened for it ahead next time."""
        sizes.remember(self._sizes(part, provider), shapes)

    def sizes_like(self, network: LazyNetwork, known: Shapes) -> Shapes | None:
        """Return the shapes that a network was opened for before, if any agree with `known`."""
        return sizes.remembered(self._sizes(network.part, network.choice.provider), known)

    def _sizes(self, part: Component, provider: Provider) -> Path:
        return self.kept(part, provider, None).with_suffix(".sizes.json")

    def kept(self, part: Component, provider: Provider, shapes: Shapes | None) -> Path:
        """Return where `provider` keeps what it compiles: never one place for two outcomes."""
        about = [digest_of(part), provider, providers.engine_of(provider)]
        about += [
            providers.device_of(provider),
            str(self.threads),
            repr(sorted((shapes or {}).items())),
        ]
        if provider is Provider.TENSORRT:  # whose engines are built for it
            about.append(self.memory)
        key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:24]
        return self._cache / "compiled" / f"{part.name}-{provider.base}-{key}"


def _try_to_open(network: LazyNetwork, known: Shapes | None) -> None:
    with suppress(AgentError):
        network.open(known)
