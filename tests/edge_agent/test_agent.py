"""Where a request ends up: on the router's side, on the other, or in one clear error."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_agent.agent import EdgeAgent, LazyCloud
from edge_agent.bundle import Component, open_bundle
from edge_agent.cloud.client import CloudClient
from edge_agent.diffusion.generator import EdgeGenerator
from edge_agent.errors import (
    AgentError,
    BundleError,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    GenerationError,
    LedgerError,
    Misbehaved,
    Refused,
    Unreachable,
)
from edge_agent.routing.budget.ledger import Ledger, Limits, Reservation
from edge_agent.routing.budget.pacer import Pace
from edge_agent.runtime import openvino
from edge_agent.runtime.network import Engine
from edge_agent.runtime.networks import Networks
from edge_agent.types import (
    Cancellation,
    Event,
    Fallback,
    Memory,
    OnEvent,
    Picture,
    Provider,
    Request,
    Route,
    Step,
)
from tests.wire import server_process

EASY, HARD = "a cat", "two red cats and a dog and the house"
SwapUnet = Callable[..., None]


class Cloud:
    """Answers with a picture, or with the error it was given; remembers what it was asked."""

    def __init__(self, error: AgentError | None = None) -> None:
        self.error = error
        self.asked: list[dict[str, Any]] = []
        self.closed = False

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
        self.asked.append({"prompt": request.prompt, "seed": seed, "deadline_s": deadline_s})
        if self.error is not None:
            raise self.error
        image = Image.new("RGB", (64, 64), "blue")
        return Picture(image, "large", seed, 64, 64, 20, 7.5, {"total": 1.0})

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def make_agent(tiny_bundle: Path) -> Iterator[Callable[..., EdgeAgent]]:
    made: list[EdgeAgent] = []

    def make(**options: Any) -> EdgeAgent:
        made.append(EdgeAgent(open_bundle(tiny_bundle), threads=1, **options))
        return made[-1]

    yield make
    for agent in made:
        agent.close()


MakeAgent = Callable[..., EdgeAgent]


def test_easy_prompts_are_drawn_here_and_hard_ones_in_the_cloud(make_agent: MakeAgent) -> None:
    cloud = Cloud()
    agent = make_agent(cloud=cloud)
    easy, hard = agent.generate(Request(EASY)), agent.generate(Request(HARD, seed=3))
    assert (easy.drawn_on, easy.picture.model) == (Route.EDGE, "tiny")
    assert (hard.drawn_on, hard.picture.model) == (Route.CLOUD, "large")
    assert [asked["prompt"] for asked in cloud.asked] == [HARD]
    assert hard.models["cloud"] == "large"
    assert hard.fallback_from is None


def test_the_decision_is_the_same_with_and_without_drawing(make_agent: MakeAgent) -> None:
    agent = make_agent(cloud=Cloud())
    for prompt in (EASY, HARD):
        decision = agent.route(prompt)
        assert decision == agent.generate(Request(prompt)).decision
        assert (decision.route is Route.CLOUD) == (decision.score > decision.threshold)


def test_a_seed_is_drawn_and_reported_and_draws_the_same_again(make_agent: MakeAgent) -> None:
    agent = make_agent()
    first = agent.generate(Request(EASY))
    again = agent.generate(Request(EASY, seed=first.picture.seed))
    assert 0 <= first.picture.seed < 2**63
    assert first.picture.image.tobytes() == again.picture.image.tobytes()
    assert first.request_id != again.request_id


def test_the_cloud_gets_the_seed_that_is_reported(make_agent: MakeAgent) -> None:
    cloud = Cloud()
    result = make_agent(cloud=cloud).generate(Request(HARD))
    assert cloud.asked[0]["seed"] == result.picture.seed


@pytest.mark.parametrize("route", [Route.AUTO, Route.CLOUD])
@pytest.mark.parametrize(
    "error",
    [
        Unreachable("nobody answers at host:1"),
        Refused("busy", retry_after_s=2.0),
        DeadlineExceeded("no picture within 3 s"),
        Misbehaved("not a picture"),
    ],
)
def test_a_cloud_without_a_picture_is_replaced_by_the_edge(
    make_agent: MakeAgent, error: AgentError, route: Route
) -> None:
    events: list[Event] = []
    agent = make_agent(cloud=Cloud(error))
    result = agent.generate(Request(HARD, seed=3, route=route), events.append)
    assert result.decision.route is Route.CLOUD
    assert (result.drawn_on, result.fallback_from) == (Route.EDGE, Route.CLOUD)
    assert result.fallback_reason == str(error)
    assert events[0] == Fallback(Route.EDGE, str(error))
    assert events[1] == Step(1, 4)
    assert result.picture.seed == 3


def test_a_server_killed_in_the_middle_of_a_picture_still_ends_in_one(
    make_agent: MakeAgent,
) -> None:
    events: list[Event] = []
    with server_process() as server:

        def kill(event: Event) -> None:
            events.append(event)
            if isinstance(event, Step):  # of the server while it lives, then of the device
                server.process.kill()

        agent = make_agent(cloud=CloudClient(server.address))
        result = agent.generate(Request(HARD, seed=3, route=Route.CLOUD), kill)
    assert (result.drawn_on, result.fallback_from) == (Route.EDGE, Route.CLOUD)
    assert result.fallback_reason is not None
    assert server.address in result.fallback_reason
    before = events[: events.index(Fallback(Route.EDGE, result.fallback_reason))]
    assert any(isinstance(event, Step) for event in before)


def test_without_a_cloud_a_hard_prompt_is_drawn_here_and_says_why(make_agent: MakeAgent) -> None:
    result = make_agent().generate(Request(HARD))
    assert (result.decision.route, result.drawn_on) == (Route.CLOUD, Route.EDGE)
    assert result.fallback_reason == (
        "no cloud is configured; give its address with --cloud HOST:PORT"
    )


def test_the_cloud_gets_what_is_left_of_the_deadline(tiny_bundle: Path) -> None:
    now = iter([10.0, 10.5, 11.0, 11.0, 20.0])
    cloud = Cloud()
    agent = EdgeAgent(open_bundle(tiny_bundle), cloud=cloud, clock=lambda: next(now))
    agent.generate(Request(HARD, deadline_s=3.0))
    assert cloud.asked[0]["deadline_s"] == 2.0


def test_a_deadline_that_has_passed_asks_no_cloud(tiny_bundle: Path) -> None:
    clock = iter(range(0, 1000, 10))
    cloud = Cloud()
    agent = EdgeAgent(open_bundle(tiny_bundle), cloud=cloud, clock=lambda: float(next(clock)))
    result = agent.generate(Request(HARD, deadline_s=3.0))
    assert not cloud.asked
    assert result.fallback_reason == "the deadline passed before the cloud could be asked"


@pytest.mark.parametrize(
    ("options", "request_", "reason"),
    [
        ({}, Request(HARD, route=Route.EDGE), "asked for edge"),
        ({}, Request(HARD, private=True), "private: stays on this device"),
        ({"offline": True}, Request(HARD), "offline: drawn on this device"),
    ],
)
def test_edge_private_and_offline_never_build_a_cloud(
    make_agent: MakeAgent, options: dict[str, Any], request_: Request, reason: str
) -> None:
    def build() -> Cloud:
        raise AssertionError("a cloud was built")

    result = make_agent(cloud=LazyCloud(build), **options).generate(request_)
    assert (result.decision.route, result.drawn_on) == (Route.EDGE, Route.EDGE)
    assert result.decision.reason == reason
    assert result.decision.score > result.decision.threshold
    assert result.fallback_from is None


@pytest.mark.parametrize(
    ("options", "private", "message"),
    [
        ({"cloud": Cloud()}, True, "a private request exclude each other"),
        ({"cloud": Cloud(), "offline": True}, False, "--offline exclude each other"),
        ({}, False, "no cloud is configured; give its address"),
    ],
)
def test_a_route_to_the_cloud_that_is_not_allowed_is_a_usage_error(
    make_agent: MakeAgent, options: dict[str, Any], private: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_agent(**options).generate(Request(EASY, route=Route.CLOUD, private=private))


def test_a_failing_edge_is_replaced_by_an_allowed_cloud(
    make_agent: MakeAgent, tiny_bundle: Path, swap_unet: SwapUnet
) -> None:
    swap_unet(tiny_bundle, factor=float("inf"))
    result = make_agent(cloud=Cloud()).generate(Request(EASY))
    assert (result.drawn_on, result.fallback_from) == (Route.CLOUD, Route.EDGE)
    assert result.fallback_reason is not None
    assert "no longer finite" in result.fallback_reason


@pytest.mark.parametrize(
    ("options", "request_"),
    [
        ({}, Request(EASY)),
        ({"cloud": Cloud()}, Request(EASY, route=Route.EDGE)),
        ({"cloud": Cloud()}, Request(EASY, private=True)),
        ({"cloud": Cloud(), "offline": True}, Request(EASY)),
    ],
)
def test_a_failing_edge_without_an_allowed_cloud_is_one_error(
    make_agent: MakeAgent,
    tiny_bundle: Path,
    swap_unet: SwapUnet,
    options: dict[str, Any],
    request_: Request,
) -> None:
    swap_unet(tiny_bundle, factor=float("inf"))
    with pytest.raises(GenerationError, match=r"^drawing broke down"):
        make_agent(**options).generate(request_)
    if "cloud" in options:
        assert not options["cloud"].asked


def test_both_sides_failing_is_one_error_with_both_reasons(
    make_agent: MakeAgent, tiny_bundle: Path, swap_unet: SwapUnet
) -> None:
    swap_unet(tiny_bundle, factor=float("inf"))
    with pytest.raises(
        GenerationError, match="neither side could draw: cloud: gone; edge: drawing"
    ):
        make_agent(cloud=Cloud(Unreachable("gone"))).generate(Request(HARD))


def test_a_network_that_does_not_load_counts_as_a_failing_edge(
    make_agent: MakeAgent, tiny_bundle: Path
) -> None:
    agent = make_agent(cloud=Cloud())
    (tiny_bundle / "unet" / "model.onnx").write_bytes(b"damaged while running")
    assert agent.generate(Request(EASY)).drawn_on is Route.CLOUD
    with pytest.raises(BundleError, match="cannot load"):
        agent.generate(Request(EASY, route=Route.EDGE))


def test_a_picture_of_one_grey_is_a_failing_edge(
    make_agent: MakeAgent, tiny_bundle: Path, blank_decoder: Callable[[Path], None]
) -> None:
    blank_decoder(tiny_bundle)
    result = make_agent(cloud=Cloud()).generate(Request(EASY))
    assert (result.drawn_on, result.fallback_from) == (Route.CLOUD, Route.EDGE)
    assert result.fallback_reason is not None
    assert "one colour (128, 128, 128) in all pixels" in result.fallback_reason
    with pytest.raises(GenerationError, match="one colour"):
        make_agent(cloud=Cloud()).generate(Request(EASY, private=True))


def test_cancelling_an_agent_stops_inside_a_step_and_asks_no_cloud(
    make_agent: MakeAgent, tiny_bundle: Path, slow_unet: Callable[[Path], None]
) -> None:
    slow_unet(tiny_bundle)  # one step of it takes hours
    cloud, events, cancellation = Cloud(), list[Event](), Cancellation()
    agent = make_agent(cloud=cloud)
    agent.open()
    timer = threading.Timer(0.3, cancellation.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        agent.generate(Request(EASY), events.append, cancellation)
    timer.join()
    assert events == []
    assert cloud.asked == []


def test_cancelling_is_never_taken_for_a_failure(make_agent: MakeAgent) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        make_agent(cloud=Cloud()).generate(Request(EASY), cancellation=cancellation)
    with pytest.raises(Cancelled):
        make_agent(cloud=Cloud(Cancelled("stopped"))).generate(Request(HARD))


def test_deciding_opens_only_the_networks_that_decide(make_agent: MakeAgent) -> None:
    agent = make_agent()
    agent.route(EASY)
    assert set(agent.backends) == {"text_encoder", "predictor"}


def test_what_goes_to_the_cloud_for_sure_opens_nothing_that_draws(make_agent: MakeAgent) -> None:
    agent = make_agent(cloud=Cloud())
    result = agent.generate(Request(EASY, route=Route.CLOUD))
    assert set(agent.backends) == set(result.backends) == {"text_encoder", "predictor"}


def test_with_much_memory_everything_opens_wherever_it_is_drawn(make_agent: MakeAgent) -> None:
    agent = make_agent(cloud=Cloud(), memory=Memory.HIGH)
    result = agent.generate(Request(EASY, route=Route.CLOUD))
    agent.open()
    assert set(agent.backends) == {"text_encoder", "predictor", "unet", "vae_decoder"}
    assert set(result.backends) == {"text_encoder", "predictor"}


@pytest.mark.skipif(openvino.version() is None, reason="OpenVINO is not installed")
def test_networks_compiled_for_a_size_open_ahead_the_next_time(make_agent: MakeAgent) -> None:
    drawing, guided = {"unet", "vae_decoder"}, Request(EASY, width=48, guidance=3.0)
    first = make_agent(provider=Provider.OPENVINO)
    first.open()
    assert not drawing & first.backends.keys()
    first.generate(Request(EASY))
    first.generate(guided)
    again = make_agent(provider=Provider.OPENVINO)
    again.open()
    assert drawing < again.backends.keys()

    opened, start, ahead = [], Networks.start, threading.Event()

    def noting(networks: Networks, part: Component, *how: Any) -> Engine:
        if part.name == "unet":
            ahead.set()
        elif part.name == "text_encoder":
            assert ahead.wait(60)  # while it is not decided yet
        opened.append(part.name)
        return start(networks, part, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Networks, "start", noting)
        make_agent(provider=Provider.OPENVINO).generate(guided)
    assert sorted(name for name in opened if name in drawing) == sorted(drawing)


@pytest.mark.parametrize("memory", list(Memory))
def test_memory_changes_neither_decision_nor_picture(make_agent: MakeAgent, memory: Memory) -> None:
    request = Request(EASY, seed=2, negative_prompt="a dog")
    usual, result = make_agent().generate(request), make_agent(memory=memory).generate(request)
    wanted, found = (np.asarray(each.picture.image, int) for each in (usual, result))
    assert np.abs(wanted - found).max() <= 1
    assert result.decision.prs == pytest.approx(usual.decision.prs, abs=1e-6)
    assert result.backends["unet"].endswith("low memory)") == (memory is Memory.LOW)
    assert (result.peak_rss or 0) > 1e7


def test_no_memory_left_while_drawing_counts_as_a_failing_edge(
    make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, alone = make_agent(cloud=Cloud()), make_agent()

    def no_room(*_: object) -> None:
        raise MemoryError("unable to allocate 9 TiB")

    monkeypatch.setattr(EdgeGenerator, "generate", no_room)
    assert agent.generate(Request(EASY)).drawn_on is Route.CLOUD
    with pytest.raises(GenerationError, match="drawing ran out of memory; ask for --memory low"):
        alone.generate(Request(EASY))


def test_a_share_of_zero_keeps_everything_here(make_agent: MakeAgent) -> None:
    assert make_agent(share=0.0).route(HARD).route is Route.EDGE


@pytest.mark.parametrize("paced", [False, True])
def test_without_the_cap_a_full_share_takes_easy_prompts_too(
    make_agent: MakeAgent, ledger: Ledger, paced: bool
) -> None:
    options = {"cloud": Cloud(), "share": 1.0, "budget": ledger if paced else None}
    kept, sent = make_agent(**options), make_agent(**options, capped=False)
    assert kept.route(EASY).threshold == 0.5
    assert sent.route(EASY).threshold < 0.5
    assert [agent.generate(Request(EASY)).drawn_on.value for agent in (kept, sent)] == [
        "edge",
        "cloud",
    ]


def test_literal_control_tokens_are_plain_text(make_agent: MakeAgent) -> None:
    agent = make_agent()
    assert agent.route("a cat <|endoftext|> two dogs").score > agent.route("a cat").score


def test_a_model_with_its_own_text_encoder_is_conditioned_by_that(
    make_agent: MakeAgent,
    tiny_bundle: Path,
    rewrite: Callable[[Path, Callable[[dict[str, Any]], None]], None],
) -> None:
    shared = make_agent().generate(Request(EASY, seed=1)).picture.image.tobytes()

    def change(content: dict[str, Any]) -> None:
        own = dict(content["components"]["text_encoder"])
        content["components"]["text_encoder_diffusion"] = own
        tokenizers = content["tokenizers"]
        tokenizers["text_encoder_diffusion"] = tokenizers["text_encoder"]
        content["diffusion"]["text_encoders"] = ["text_encoder_diffusion"]

    rewrite(tiny_bundle, change)
    agent = make_agent()
    assert agent.generate(Request(EASY, seed=1)).picture.image.tobytes() == shared
    assert "text_encoder_diffusion" in agent.backends


def test_closing_the_agent_closes_the_cloud(make_agent: MakeAgent) -> None:
    cloud = Cloud()
    with make_agent(cloud=cloud):
        pass
    assert cloud.closed


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A budget of two pictures a day, on a day that never ends."""
    return Ledger(tmp_path / "ledger.sqlite3", Limits(pictures=2), clock=lambda: 1e9)


def test_a_spent_budget_draws_here_and_says_why(make_agent: MakeAgent, ledger: Ledger) -> None:
    cloud = Cloud()
    agent = make_agent(cloud=cloud, budget=ledger, share=1.0)
    results = [agent.generate(Request(HARD, route=route)) for route in (*Route, Route.AUTO)]
    assert [result.drawn_on.value for result in results] == ["cloud", "edge", "cloud", "edge"]
    assert results[-1].decision.route is Route.CLOUD
    assert results[-1].fallback_from is Route.CLOUD
    assert results[-1].fallback_reason is not None
    assert "budget of 2 cloud pictures a day is spent" in results[-1].fallback_reason
    asked = agent.generate(Request(EASY, route=Route.CLOUD))
    assert (asked.drawn_on, asked.fallback_from) == (Route.EDGE, Route.CLOUD)
    assert len(cloud.asked) == 2
    assert (ledger.spent().pictures, ledger.spent().unsure) == (2, 0)


@pytest.mark.parametrize("route", [Route.AUTO, Route.CLOUD])
@pytest.mark.parametrize(
    ("error", "spent", "unsure"),
    [
        (Unreachable("no connection", maybe_drawn=False), 0, 0),
        (Unreachable("the connection broke"), 1, 1),
        (Refused("busy"), 0, 0),
        (DeadlineExceeded("no picture within 3 s"), 1, 1),
        (Misbehaved("not a picture"), 1, 0),
        (Misbehaved("UNIMPLEMENTED", maybe_drawn=False), 0, 0),
        (Cancelled("stopped"), 1, 1),
        (ConfigError("half a surrogate pair"), 0, 0),
    ],
    ids=lambda value: str(value),
)
def test_only_what_certainly_was_not_drawn_is_given_back(
    make_agent: MakeAgent,
    ledger: Ledger,
    error: AgentError,
    spent: int,
    unsure: int,
    route: Route,
) -> None:
    agent = make_agent(cloud=Cloud(error), budget=ledger)
    with suppress(Cancelled, ConfigError):  # the others end in a picture from the edge
        assert agent.generate(Request(HARD, route=route)).fallback_reason == str(error)
    assert (ledger.spent().pictures, ledger.spent().unsure) == (spent, unsure)
    ahead, credit = (0.7, 0.3 * unsure) if spent and route is Route.AUTO else (0.0, 0.0)
    assert ledger.pace() == Pace(pytest.approx(ahead), pytest.approx(credit))


def test_a_deadline_that_has_passed_spends_nothing(tiny_bundle: Path, ledger: Ledger) -> None:
    clock = iter(range(0, 1000, 10))
    agent = EdgeAgent(
        open_bundle(tiny_bundle),
        cloud=Cloud(),
        budget=ledger,
        clock=lambda: float(next(clock)),
    )
    assert agent.generate(Request(HARD, deadline_s=3.0)).drawn_on is Route.EDGE
    assert ledger.spent().pictures == 0


def test_a_fallback_to_the_cloud_reserves_like_any_call(
    make_agent: MakeAgent, tiny_bundle: Path, swap_unet: SwapUnet, ledger: Ledger
) -> None:
    swap_unet(tiny_bundle, factor=float("inf"))
    cloud = Cloud()
    agent = make_agent(cloud=cloud, budget=ledger)
    for _ in range(2):
        assert agent.generate(Request(EASY)).drawn_on is Route.CLOUD
    with pytest.raises(GenerationError, match=r"neither side .*; cloud: the budget of 2 "):
        agent.generate(Request(EASY))
    assert len(cloud.asked) == ledger.spent().pictures == 2


@pytest.mark.parametrize(
    ("options", "request_"),
    [
        ({"cloud": Cloud()}, Request(HARD, route=Route.EDGE)),
        ({"cloud": Cloud()}, Request(HARD, private=True)),
        ({"cloud": Cloud(), "offline": True}, Request(HARD)),
        ({}, Request(HARD)),
    ],
)
def test_what_stays_on_the_device_never_touches_the_ledger(
    make_agent: MakeAgent, ledger: Ledger, options: dict[str, Any], request_: Request
) -> None:
    agent = make_agent(budget=ledger, **options)
    assert agent.generate(request_).drawn_on is Route.EDGE
    assert not ledger.path.exists()


def test_a_decision_shows_the_threshold_that_held_and_asking_for_one_spends_nothing(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite3")
    agent = make_agent(cloud=Cloud(), budget=ledger)
    thresholds = []
    for _ in range(14):
        asked = [agent.route(HARD) for _ in range(2)]
        decision = agent.generate(Request(HARD)).decision
        assert asked == [decision] * 2
        assert (decision.route is Route.CLOUD) == (decision.score > decision.threshold)
        thresholds.append(decision.threshold)
    assert thresholds[0] == make_agent().route(HARD).threshold
    sent = [after > before for before, after in pairwise(thresholds)]
    assert True in sent
    assert False in sent


@pytest.mark.parametrize("route", [Route.AUTO, Route.CLOUD])
def test_with_a_ledger_that_cannot_be_read_nothing_is_sent_and_the_device_draws(
    make_agent: MakeAgent, ledger: Ledger, route: Route
) -> None:
    ledger.path.write_bytes(b"garbage")
    cloud = Cloud()
    result = make_agent(cloud=cloud, budget=ledger).generate(Request(HARD, route=route))
    assert result.drawn_on is Route.EDGE
    assert result.fallback_from is Route.CLOUD
    assert result.fallback_reason is not None
    assert "not a database" in result.fallback_reason
    assert not cloud.asked
    assert ledger.path.read_bytes() == b"garbage"


def test_asked_where_a_prompt_belongs_an_agent_says_that_its_ledger_cannot_be_read(
    make_agent: MakeAgent, ledger: Ledger
) -> None:
    ledger.path.write_bytes(b"garbage")
    with pytest.raises(LedgerError, match="not a database"):
        make_agent(cloud=Cloud(), budget=ledger).route(HARD)


def test_a_picture_is_not_lost_when_its_call_cannot_be_settled(
    make_agent: MakeAgent, ledger: Ledger
) -> None:
    class Breaking(Cloud):
        def generate(self, *arguments: Any, **options: Any) -> Picture:
            picture = super().generate(*arguments, **options)
            ledger.path.rename(ledger.path.with_suffix(".whole"))
            ledger.path.write_bytes(b"garbage")
            return picture

    result = make_agent(cloud=Breaking(), budget=ledger).generate(Request(HARD))
    assert result.drawn_on is Route.CLOUD
    ledger.path.with_suffix(".whole").replace(ledger.path)
    assert (ledger.spent().pictures, ledger.spent().unsure) == (1, 1)


def break_predictor(content: dict[str, Any]) -> None:
    """Let the bundle name one metric less than its predictor answers."""
    metrics = content["router"]["metrics"]
    metrics.pop()
    for metric in metrics:
        metric["weight"] = 1 / len(metrics)


def test_where_nothing_can_be_decided_a_picture_comes_all_the_same(
    make_agent: MakeAgent, tiny_bundle: Path, rewrite: Callable[..., None]
) -> None:
    rewrite(tiny_bundle, break_predictor)
    with pytest.raises(BundleError, match="predictor answered"):
        make_agent().route(HARD)
    result = make_agent(cloud=Cloud(), share=1.0).generate(Request(HARD))
    assert (result.drawn_on, result.decision.route) == (Route.EDGE, Route.EDGE)
    assert (result.decision.metrics, result.decision.score) == ({}, 0.5)
    assert "nothing could be decided" in result.decision.reason
    asked = make_agent(cloud=Cloud()).generate(Request(HARD, route=Route.CLOUD))
    assert (asked.drawn_on, asked.fallback_from) == (Route.CLOUD, None)


def test_a_text_encoder_that_does_not_open_leaves_the_picture_to_the_cloud(
    make_agent: MakeAgent, tiny_bundle: Path
) -> None:
    agent = make_agent(cloud=Cloud())
    (tiny_bundle / "text_encoder" / "model.onnx").write_bytes(b"damaged while running")
    result = agent.generate(Request(EASY))
    assert (result.drawn_on, result.fallback_from) == (Route.CLOUD, Route.EDGE)
    assert result.fallback_reason is not None
    assert "text_encoder" in result.fallback_reason
    with pytest.raises(BundleError, match="text_encoder"):
        agent.generate(Request(EASY, private=True))


def test_an_edge_that_cannot_draw_the_size_says_why_the_cloud_did_not(
    make_agent: MakeAgent,
) -> None:
    agent = make_agent(cloud=Cloud(Unreachable("nobody there")))
    with pytest.raises(GenerationError, match=r"cloud: nobody there; edge: the width 512 is over"):
        agent.generate(Request(EASY, width=512, route=Route.CLOUD))


def test_a_locked_ledger_is_waited_for_once(make_agent: MakeAgent, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    Ledger(path).spent()
    ledger = Ledger(path, Limits(pictures=2), patience_s=0.01)
    tried = []
    reserve = ledger.reserve

    def counting() -> Reservation:
        tried.append(1)
        return reserve()

    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledger, "reserve", counting)
            agent = make_agent(cloud=Cloud(), budget=ledger, share=1.0)
            result = agent.generate(Request(HARD))
    assert (result.drawn_on, result.fallback_from) == (Route.EDGE, Route.CLOUD)
    assert result.fallback_reason is not None
    assert "locked by another program" in result.fallback_reason
    assert tried == []
