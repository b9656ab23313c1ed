"""The one door of the device: a request in; decided, drawn here or in the cloud; a result out.

In a cascade it is drawn here first, and decided by a look at the picture. A cloud that does not
answer with a picture, or for which the budget has no room or cannot be read, is replaced by the
edge, and the result says why. Neither a cloud client nor the budget is touched for a private
request, for route `edge`, or by an offline agent.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol, Self

from edge_agent.bundle import Bundle
from edge_agent.edge import Edge
from edge_agent.errors import (
    BundleError,
    Cancelled,
    CloudError,
    ConfigError,
    DeadlineExceeded,
    GenerationError,
    LedgerError,
    Misbehaved,
    Unreachable,
)
from edge_agent.prompt import DEFAULT_DEADLINE_S, MAX_SEED, check_prompt, check_request
from edge_agent.routing.budget.ledger import Ledger, Reservation
from edge_agent.routing.budget.pacer import Pacer
from edge_agent.routing.critic import critic_of
from edge_agent.routing.encoder import Encoded
from edge_agent.routing.router import undecided, under
from edge_agent.runtime.memory import peak_rss
from edge_agent.runtime.network import Backend, out_of_memory
from edge_agent.runtime.networks import Networks
from edge_agent.types import (
    Cancellation,
    Decision,
    Fallback,
    Memory,
    OnEvent,
    Picture,
    Provider,
    Request,
    Result,
    Route,
)


class CloudGenerator(Protocol):
    """Something elsewhere that draws; raises CloudError when no picture comes."""

    def generate(
        self,
        request: Request,
        *,
        request_id: str,
        seed: int,
        deadline_s: float,
        on_event: OnEvent | None = None,
        cancellation: Cancellation | None = None,
    ) -> Picture:
        """Draw `request` within `deadline_s` seconds."""
        ...

    def close(self) -> None:
        """Give back the connection."""
        ...


class LazyCloud:
    """A cloud built at its first use, so that a picture drawn here never loads gRPC."""

    def __init__(self, build: Callable[[], CloudGenerator]) -> None:
        self._build = build
        self._lock = threading.Lock()
        self._built: CloudGenerator | None = None

    def generate(
        self,
        request: Request,
        *,
        request_id: str,
        seed: int,
        deadline_s: float,
        on_event: OnEvent | None = None,
        cancellation: Cancellation | None = None,
    ) -> Picture:
        """Build the cloud if needed and let it draw."""
        with self._lock:
            if self._built is None:
                self._built = self._build()
        return self._built.generate(
            request,
            request_id=request_id,
            seed=seed,
            deadline_s=deadline_s,
            on_event=on_event,
            cancellation=cancellation,
        )

    def close(self) -> None:
        """Close the cloud if it was ever built."""
        with self._lock:
            if self._built is not None:
                self._built.close()


@dataclass(frozen=True, slots=True)
class _Call:
    """One request on its way through the agent; `deadline` is a reading of the agent's clock.

    `encoded` is None where nothing could be decided. `admitted` is the call to the cloud that the
    decision has reserved, or why it could not be.
    """

    request: Request
    request_id: str
    seed: int
    encoded: Encoded | None
    deadline: float
    admitted: Reservation | LedgerError | None
    on_event: OnEvent | None
    cancellation: Cancellation | None


class EdgeAgent:
    """Routes prompts and draws pictures with a bundle, and with a cloud where there is one.

    Networks are opened when first needed: deciding opens the text encoder and the predictor only.
    `memory` says how long they stay open, `provider` what runs them.
    `share` is the share of prompts that may go to the cloud, by default the bundle's own; `budget`
    keeps it over time, and its limits with it. Unless `capped`, prompts that the device draws at
    least as well go there too, until the share is full: for curves over all shares. With `cascade`
    the device draws first, where the cloud may be asked at all, and asks it only for what fell
    short. Calls may come from several threads. Raises ConfigError when `provider` is absent, or the
    critic that a cascade with this cloud needs.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        cloud: CloudGenerator | None = None,
        share: float | None = None,
        capped: bool = True,
        budget: Ledger | None = None,
        cascade: bool = False,
        offline: bool = False,
        provider: Provider = Provider.AUTO,
        memory: Memory = Memory.NORMAL,
        threads: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.bundle = bundle
        networks = Networks(bundle, provider=provider, memory=memory, threads=threads)
        self._edge = Edge(networks)
        self._cloud = None if offline else cloud
        self._share = bundle.router.default_share if share is None else share
        self._capped = capped
        self._budget = None if self._cloud is None else budget
        self._critic = critic_of(bundle) if cascade and self._cloud is not None else None
        self._pacer = self._pacer_by((self._critic or bundle.router).score_digest)
        self._offline = offline
        self._clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the cloud and let go of the networks."""
        if self._cloud is not None:
            self._cloud.close()
        self._edge.close()

    @property
    def backends(self) -> dict[str, Backend]:
        """What runs each network that was opened so far."""
        return self._edge.backends

    def open(self, *, drawing: bool = True) -> None:
        """Open the networks now, not at the first request; without `drawing` those that decide."""
        self._edge.open(drawing=drawing, looking=drawing and self._critic is not None)

    def route(self, prompt: str) -> Decision:
        """Decide where `prompt` would be drawn; opens no socket, draws and spends nothing.

        That is what the prompt alone says: a cascade decides when it has a picture.
        """
        check_prompt(prompt)
        try:
            decision, _ = self._edge.router(self._share, capped=self._capped).decide(prompt)
        finally:
            self._edge.release()
        if self._budget is None:
            return decision
        pacer = self._pacer_by(self.bundle.router.score_digest)
        return under(pacer.threshold(self._budget.pace()), decision)

    def generate(
        self,
        request: Request,
        on_event: OnEvent | None = None,
        cancellation: Cancellation | None = None,
    ) -> Result:
        """Draw `request` on the side it belongs to, or on the other when that one fails.

        Where nothing could be decided the device is asked first, and the decision's reason says so.
        Raises ConfigError for a request nobody could draw, Cancelled, or GenerationError when the
        last side that was allowed has failed.
        """
        check_request(request)
        if request.route is Route.CLOUD and not self._cloud_allowed(request):
            raise ConfigError(self._why_no_cloud(request))
        try:
            return self._generate(request, on_event, cancellation)
        finally:
            self._edge.release()

    def _generate(
        self, request: Request, on_event: OnEvent | None, cancellation: Cancellation | None
    ) -> Result:
        started = self._clock()
        looking = self._critic is not None and self._share > 0 and self._is_open(request)
        likely = request.route is not Route.CLOUD
        self._edge.open_soon(request, likely=likely, looking=looking)
        opened, encoded, admitted = started, None, None
        try:
            self._edge.open(drawing=False)
            router = self._edge.router(self._share, capped=self._capped)
            opened = self._clock()
            decision, encoded = router.decide(request.prompt)
            _stop_if(cancellation)  # before a call is reserved
        except (BundleError, GenerationError, MemoryError) as err:
            why = str(err) or "memory ran out"
            spec = self.bundle.router
            told = undecided(spec, self._share, why, capped=self._capped)
            decision = self._overrule(told, request)
            looking = False
        else:
            if looking:
                decision = replace(decision, route=Route.EDGE, reason="a cascade draws here first")
            else:
                decision, admitted = self._admit(self._overrule(decision, request), request)
        decided = self._clock()
        call = _Call(
            request=request,
            request_id=secrets.token_hex(16),
            seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
            encoded=encoded,
            deadline=started + (request.deadline_s or DEFAULT_DEADLINE_S),
            admitted=admitted,
            on_event=on_event,
            cancellation=cancellation,
        )
        picture, drawn_on, fallback_reason = self._draw(call, decision.route)
        drawn = looked = ended = self._clock()
        looking = looking and drawn_on is Route.EDGE
        if looking:
            decision, call = self._look(call, picture, decision)
            looked = ended = self._clock()
            # How long to wait for the cloud does not count what was drawn here.
            call = replace(call, deadline=call.deadline + looked - decided)
            if decision.route is Route.CLOUD:
                picture, drawn_on, fallback_reason = self._draw_again(call, picture)
                ended = self._clock()
        return Result(
            request_id=call.request_id,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            picture=picture,
            decision=decision,
            drawn_on=drawn_on,
            timings_ms={
                "open": 1e3 * (opened - started),
                "decide": 1e3 * (decided - opened),
                "draw": 1e3 * (drawn - decided + ended - looked),
                **({"look": 1e3 * (looked - drawn)} if looking else {}),
                "total": 1e3 * (ended - started),
            },
            models=self._models(drawn_on, picture, looked=bool(decision.quality)),
            fallback_from=None if drawn_on is decision.route else decision.route,
            fallback_reason=fallback_reason,
            backends=self._edge.ran(
                drawing=drawn_on is Route.EDGE or looking, looking=bool(decision.quality)
            ),
            peak_rss=peak_rss(),
        )

    def _pacer_by(self, digest: Sequence[float]) -> Pacer:
        return Pacer(digest, self._share, capped=self._capped)

    def _cloud_allowed(self, request: Request) -> bool:
        return (
            self._cloud is not None
            and not self._offline
            and not request.private
            and request.route is not Route.EDGE
        )

    def _is_open(self, request: Request) -> bool:
        """Tell whether it is for the scores to say which side draws a request."""
        return request.route is Route.AUTO and self._cloud_allowed(request)

    def _why_no_cloud(self, request: Request) -> str:
        if request.private:
            return "the route cloud and a private request exclude each other; drop one of them"
        if self._offline:
            return "the route cloud and --offline exclude each other; drop one of them"
        return "no cloud is configured; give its address with --cloud HOST:PORT"

    def _overrule(self, decision: Decision, request: Request) -> Decision:
        """Put what the request or the agent demands above what the router thinks."""
        if request.route is not Route.AUTO:
            return replace(decision, route=request.route, reason=f"asked for {request.route.value}")
        if decision.route is Route.EDGE:
            return decision
        if request.private:
            return replace(decision, route=Route.EDGE, reason="private: stays on this device")
        if self._offline:
            return replace(decision, route=Route.EDGE, reason="offline: drawn on this device")
        return decision

    def _admit(
        self, decision: Decision, request: Request
    ) -> tuple[Decision, Reservation | LedgerError | None]:
        """Decide under the budget's threshold where scores have the say; reserve the call."""
        if self._budget is None or not self._is_open(request):
            return decision, None
        try:
            admission = self._budget.admit(self._pacer, decision.score)
        except LedgerError as err:
            # Nothing is sent that is not noted first: should the decision be the cloud, the device
            # draws, and says so.
            return decision, err
        return under(admission.threshold, decision), admission.reservation

    def _look(self, call: _Call, drawn: Picture, decision: Decision) -> tuple[Decision, _Call]:
        """Decide by a look at the edge's picture, under the budget's threshold as `_admit`."""
        assert call.encoded is not None  # or there would be no look
        try:
            critic = self._edge.critic(self._share, capped=self._capped)
            judged = critic.judge(drawn.image, call.request.prompt, call.encoded, decision.metrics)
        except (BundleError, GenerationError, MemoryError) as err:
            reason = f"nobody could look at it: {str(err) or 'memory ran out'}"
            if call.on_event is not None:
                call.on_event(Fallback(Route.EDGE, reason, drawn=True))
            return replace(decision, reason=f"kept, since {reason}"), call
        _stop_if(call.cancellation)
        decision, admitted = self._admit(judged, call.request)
        return decision, replace(call, admitted=admitted)

    def _draw_again(self, call: _Call, drawn: Picture) -> tuple[Picture, Route, str | None]:
        """Let the cloud draw what the edge drew already; the answer is as of `_draw`."""
        try:
            return self._draw_on(Route.CLOUD, call), Route.CLOUD, None
        except (CloudError, ConfigError, LedgerError) as err:
            reason = str(err)
        if call.on_event is not None:
            call.on_event(Fallback(Route.EDGE, reason, drawn=True))
        return drawn, Route.EDGE, reason

    def _draw(self, call: _Call, first: Route) -> tuple[Picture, Route, str | None]:
        """Return the picture, the side that drew it and, after a fallback, the reason for it."""
        try:
            return self._draw_on(first, call), first, None
        except (CloudError, GenerationError, BundleError, LedgerError) as err:
            if first is Route.EDGE and not self._cloud_allowed(call.request):
                raise
            failure = err
        second = Route.EDGE if first is Route.CLOUD else Route.CLOUD
        reason = str(failure)
        if call.on_event is not None:
            call.on_event(Fallback(second, reason))
        try:
            return self._draw_on(second, call), second, reason
        except (CloudError, ConfigError, GenerationError, BundleError, LedgerError) as err:
            raise GenerationError(
                f"neither side could draw: {first.value}: {reason}; {second.value}: {err}"
            ) from err

    def _draw_on(self, route: Route, call: _Call) -> Picture:
        if route is Route.EDGE:
            try:
                return self._edge.generator(self._clock).generate(
                    call.request,
                    {} if call.encoded is None else {self.bundle.router.text_encoder: call.encoded},
                    call.seed,
                    call.on_event,
                    call.cancellation,
                )
            except MemoryError as err:
                raise out_of_memory("drawing") from err
        if self._cloud is None:
            raise Unreachable(self._why_no_cloud(call.request))
        with self._paid(call):
            remaining_s = call.deadline - self._clock()
            if remaining_s <= 0:
                raise DeadlineExceeded(
                    "the deadline passed before the cloud could be asked", maybe_drawn=False
                )
            return self._cloud.generate(
                call.request,
                request_id=call.request_id,
                seed=call.seed,
                deadline_s=remaining_s,
                on_event=call.on_event,
                cancellation=call.cancellation,
            )

    @contextmanager
    def _paid(self, call: _Call) -> Iterator[None]:
        """Reserve a call to the cloud; give it back only if the cloud certainly drew nothing.

        What came of it is settled where it is known. After a deadline, a broken connection or a
        stop it is not: then the call stays spent, and counts as one without an answer.
        """
        if isinstance(call.admitted, LedgerError):
            raise call.admitted
        if self._budget is None:
            yield
            return
        reservation = call.admitted or self._budget.reserve()
        finish: Callable[[Reservation], None] | None = None
        try:
            yield
            finish = self._budget.settle
        except (CloudError, ConfigError) as err:  # ConfigError: it could not even be sent
            if isinstance(err, ConfigError) or not err.maybe_drawn:
                finish = self._budget.release
            elif isinstance(err, Misbehaved):
                finish = self._budget.settle
            raise
        finally:
            # What cannot be noted stays spent: no reason to lose the picture, or the error.
            if finish is not None:
                with suppress(LedgerError):
                    finish(reservation)

    def _models(self, drawn_on: Route, picture: Picture, *, looked: bool) -> dict[str, str]:
        deciding = {"router": self.bundle.router.predictor}
        if looked and self.bundle.critic:
            deciding["critic"] = self.bundle.critic.network
        digest = f"@{self.bundle.diffusion.digest[:12]}" if drawn_on is Route.EDGE else ""
        return {
            **{role: self._version(name) for role, name in deciding.items()},
            drawn_on.value: picture.model + digest,
        }

    def _version(self, component: str) -> str:
        part = self.bundle.component(component)
        return f"{part.name}@{part.files[part.file].sha256[:12]}"


def _stop_if(cancellation: Cancellation | None) -> None:
    if cancellation is not None and cancellation.cancelled:
        raise Cancelled("stopped")
