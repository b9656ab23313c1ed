"""The device's own side: a bundle's networks put together to what decides and what draws."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Lock

from edge_agent.diffusion.decoding import SMALL_TILE
from edge_agent.diffusion.generator import EdgeGenerator, guides, latents_of
from edge_agent.errors import AgentError
from edge_agent.routing.critic import Critic, critic_of
from edge_agent.routing.encoder import TextEncoder, Tokenizer
from edge_agent.routing.router import Router
from edge_agent.runtime.network import Backend, Shapes
from edge_agent.runtime.networks import LazyNetwork, Networks
from edge_agent.types import Memory, Request


class Edge:
    """Everything of a bundle that computes; networks are opened when first needed.

    Where the router reads prompts with a text encoder of the diffusion model, both share it.
    """

    def __init__(self, networks: Networks) -> None:
        self.bundle = networks.bundle
        self._networks = networks
        self._lock = Lock()
        self._text_encoders: dict[str, TextEncoder] = {}
        self._router: Router | None = None
        self._critic: Critic | None = None
        self._generator: EdgeGenerator | None = None

    def router(self, share: float, *, capped: bool = True) -> Router:
        """Return what decides."""
        with self._lock:
            if self._router is None:
                encoder, predictor = self._deciding()
                reader = self._text_encoder(encoder)
                spec = self.bundle.router
                self._router = Router(reader, predictor, spec, share, capped=capped)
            return self._router

    def critic(self, share: float, *, capped: bool = True) -> Critic:
        """Return what looks at pictures; raises ConfigError where the bundle has no critic."""
        with self._lock:
            if self._critic is None:
                encoder, network = self._looking()
                spec, metrics = critic_of(self.bundle), self.bundle.router.metrics
                reader = self._text_encoder(encoder)
                self._critic = Critic(reader, network, spec, metrics, share, capped=capped)
            return self._critic

    def generator(self, clock: Callable[[], float]) -> EdgeGenerator:
        """Return what draws."""
        with self._lock:
            if self._generator is None:
                *encoders, denoiser, vae_decoder = self._drawing()
                preview = self.bundle.diffusion.preview
                scarce = self._networks.memory is Memory.LOW
                self._generator = EdgeGenerator(
                    self.bundle.diffusion,
                    denoiser=denoiser,
                    vae_decoder=vae_decoder,
                    text_encoders={one.part.name: self._text_encoder(one) for one in encoders},
                    # A preview in the middle would cost the denoiser its place in memory.
                    preview_decoder=None
                    if preview is None or scarce
                    else self._networks.get(preview.decoder, static=True),
                    tile=SMALL_TILE if scarce else None,
                    clock=clock,
                )
            return self._generator

    def open(self, *, drawing: bool, looking: bool = False) -> None:
        """Open the networks that decide and, if so, those that draw and that look.

        Not in memory mode `low`, which opens each right before its run.
        """
        self._networks.open_now(*self._deciding(), known=self._fed())
        if drawing:
            self._networks.open_now(*self._drawing(), known=self._fed())
        if looking:
            self._networks.open_now(*self._looking(), known=self._fed())

    def open_soon(self, request: Request, *, likely: bool, looking: bool = False) -> None:
        """Open what would draw `request` in the background, if it is `likely` that it will.

        After it, if there will be `looking`, what looks at the picture.
        """
        if likely or self._networks.memory is Memory.HIGH:
            *encoders, denoiser, vae_decoder = self._drawing()
            known = self._fed(request.width, request.height, request.guidance)
            self._networks.open_soon(denoiser, *encoders, vae_decoder, known=known)
            if looking:
                with suppress(AgentError):  # which the look will tell
                    self._networks.open_soon(*self._looking(), known=known)

    def release(self) -> None:
        """Let go of what the memory mode does not keep between requests."""
        self._networks.release()

    def close(self) -> None:
        """Let go of all networks."""
        self._networks.close()

    @property
    def backends(self) -> dict[str, Backend]:
        """What ran or runs each network that was open."""
        return self._networks.backends

    def ran(self, *, drawing: bool, looking: bool = False) -> dict[str, str]:
        """Say what ran each network that decided and, if so, those that drew and that looked."""
        networks = self._deciding()
        networks += self._drawing() if drawing else []
        networks += self._looking() if looking else []
        used = {one.part.name for one in networks}
        return {name: str(backend) for name, backend in self.backends.items() if name in used}

    def _deciding(self) -> list[LazyNetwork]:
        spec = self.bundle.router
        predictor = self._networks.get(spec.predictor, precise=True)
        return [self._text_network(spec.text_encoder), predictor]

    def _looking(self) -> list[LazyNetwork]:
        spec = critic_of(self.bundle)
        network = self._networks.get(spec.network, precise=True)
        return [self._text_network(spec.text_encoder), network]

    def _drawing(self) -> list[LazyNetwork]:
        spec = self.bundle.diffusion
        return [
            *(self._text_network(name) for name in spec.text_encoders),
            self._networks.get(spec.denoiser, static=True),
            self._networks.get("vae_decoder", static=True),
        ]

    def _fed(
        self, width: int | None = None, height: int | None = None, guidance: float | None = None
    ) -> dict[str, Shapes]:
        """Return what is known of the networks' inputs before a prompt is read."""
        spec = self.bundle.diffusion
        latents = latents_of(spec, width or spec.width, height or spec.height)
        inputs = self.bundle.component(spec.denoiser).inputs
        twice = guides(spec.guidance if guidance is None else guidance, inputs)
        prompts: dict[str, Shapes] = {
            name: {"input_ids": (1, files.context_length)}
            for name, files in self.bundle.tokenizers.items()
        }
        return prompts | {
            spec.denoiser: {"sample": (1 + twice, *latents[1:])},
            "vae_decoder": {"latent_sample": latents},
        }

    def _text_network(self, name: str) -> LazyNetwork:
        padded = self.bundle.tokenizers[name].pad_id is not None
        # What decides is computed in 32 bits, so that no decision depends on the provider.
        critic = self.bundle.critic
        decides = name in (self.bundle.router.text_encoder, critic and critic.text_encoder)
        return self._networks.get(name, static=padded, precise=decides)

    def _text_encoder(self, network: LazyNetwork) -> TextEncoder:
        name = network.part.name
        if name not in self._text_encoders:
            files = self.bundle.tokenizers[name]
            tokenizer = Tokenizer(self.bundle.path / files.file, files.context_length, files.pad_id)
            self._text_encoders[name] = TextEncoder(network, tokenizer)
        return self._text_encoders[name]
