"""A cascade: drawn here first, looked at, and asked of the cloud where it fell short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_agent.agent import EdgeAgent
from edge_agent.bundle import open_bundle
from edge_agent.errors import (
    AgentError,
    BundleError,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    Refused,
    Unreachable,
)
from edge_agent.recognition.pictures import square
from edge_agent.routing.budget.ledger import Ledger, Limits
from edge_agent.routing.critic import seen
from edge_agent.runtime.networks import LazyNetwork
from edge_agent.types import Cancellation, Event, Fallback, Memory, Provider, Request, Route, Step
from tests.edge_agent.conftest import CRITIC_SIDE
from tests.edge_agent.test_agent import EASY, HARD, Cloud

PLEASED, HARSH = 0.9, 0.1
Hire = Callable[[Path, float], None]
MakeAgent = Callable[..., EdgeAgent]


@pytest.fixture
def make_agent(tiny_bundle: Path, hire_critic: Hire) -> Iterator[MakeAgent]:
    with ExitStack() as open_agents:

        def make(taste: float, **options: Any) -> EdgeAgent:
            hire_critic(tiny_bundle, taste)
            options = {"cascade": True, "threads": 1, **options}
            return open_agents.enter_context(EdgeAgent(open_bundle(tiny_bundle), **options))

        yield make


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[[int], Ledger]:
    return lambda pictures: Ledger(tmp_path / "ledger.sqlite3", Limits(pictures))


def test_a_picture_that_pleases_is_kept_however_hard_its_prompt(make_agent: MakeAgent) -> None:
    cloud = Cloud()
    result = make_agent(PLEASED, cloud=cloud).generate(Request(HARD, seed=3))
    assert result.drawn_on is result.decision.route is Route.EDGE
    assert not cloud.asked
    assert result.decision.score == pytest.approx(1 - PLEASED)
    assert result.fallback_from is None


@pytest.mark.parametrize("paced", [False, True])
def test_without_the_cap_even_what_pleases_is_drawn_again_for_a_full_share(
    make_agent: MakeAgent, ledger: Callable[[int], Ledger], paced: bool
) -> None:
    options = {"cloud": Cloud(), "share": 1.0, "budget": ledger(9) if paced else None}
    sent = make_agent(0.6, **options, capped=False).generate(Request(EASY))
    kept = make_agent(0.6, **options).generate(Request(EASY))
    assert (kept.drawn_on, kept.decision.threshold) == (Route.EDGE, 0.5)
    assert (sent.drawn_on, sent.decision.score) == (Route.CLOUD, pytest.approx(0.4))
    assert sent.decision.threshold < 0.4


def test_a_picture_that_fell_short_is_drawn_again_in_the_cloud(make_agent: MakeAgent) -> None:
    cloud, events = Cloud(), list[Event]()
    result = make_agent(HARSH, cloud=cloud).generate(Request(EASY, seed=3), events.append)
    assert result.drawn_on is result.decision.route is Route.CLOUD
    assert result.picture.model == "large"
    assert [asked["seed"] for asked in cloud.asked] == [3]
    assert events == [Step(index, 4) for index in range(1, 5)]  # here, and before the cloud's
    assert set(result.models) == {"router", "critic", "cloud"}
    assert set(result.backends) >= {"critic", "unet", "vae_decoder"}
    assert set(result.timings_ms) == {"open", "decide", "draw", "look", "total"}


def test_what_is_measured_is_the_picture_that_was_drawn(make_agent: MakeAgent) -> None:
    result = make_agent(PLEASED, cloud=Cloud()).generate(Request(EASY, seed=3))
    brightness = square(result.picture.image, CRITIC_SIDE).mean() / 255
    assert set(result.decision.quality) == set(result.decision.metrics)
    assert list(result.decision.quality.values()) == pytest.approx([brightness] * 3, abs=1e-5)


@pytest.mark.parametrize("taste", [0.35, 0.65])
def test_the_share_is_that_of_the_critics_own_scores(make_agent: MakeAgent, taste: float) -> None:
    # A score of 0.65 is beyond the quantile of 0.3 of the router's digest, but not the critic's.
    result = make_agent(taste, cloud=Cloud(), share=0.3).generate(Request(HARD))
    assert result.decision.threshold == pytest.approx(0.66, abs=0.01)
    assert result.drawn_on is Route.EDGE


@pytest.mark.parametrize(
    "error",
    [Unreachable("nobody answers"), Refused("busy"), DeadlineExceeded("late"), ConfigError("no")],
)
def test_without_the_clouds_picture_the_one_that_is_there_is_kept(
    make_agent: MakeAgent, error: AgentError
) -> None:
    events = list[Event]()
    agent = make_agent(HARSH, cloud=Cloud(error))
    result = agent.generate(Request(EASY, seed=3), events.append)
    assert (result.drawn_on, result.fallback_from) == (Route.EDGE, Route.CLOUD)
    assert result.fallback_reason == str(error)
    assert events == [*(Step(i, 4) for i in range(1, 5)), Fallback(Route.EDGE, str(error), True)]
    alone = agent.generate(Request(EASY, seed=3, route=Route.EDGE))
    assert result.picture.image.tobytes() == alone.picture.image.tobytes()


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        (Request(HARD, private=True), {}),
        (Request(HARD, route=Route.EDGE), {}),
        (Request(HARD), {"share": 0.0}),
        (Request(HARD), {"offline": True}),
    ],
)
def test_nobody_looks_where_the_cloud_may_not_be_asked(
    make_agent: MakeAgent, request_: Request, options: dict[str, Any]
) -> None:
    cloud = Cloud()
    result = make_agent(HARSH, cloud=cloud, **options).generate(request_)
    assert result.drawn_on is Route.EDGE
    assert not result.decision.quality
    assert "critic" not in result.models
    assert not cloud.asked


def test_who_asks_for_the_cloud_does_not_wait_for_the_edge(make_agent: MakeAgent) -> None:
    events = list[Event]()
    agent = make_agent(PLEASED, cloud=Cloud())
    result = agent.generate(Request(EASY, route=Route.CLOUD), events.append)
    assert result.drawn_on is Route.CLOUD
    assert events == []


def test_the_budget_counts_what_was_sent_and_keeps_the_rest_here(
    make_agent: MakeAgent, ledger: Callable[[int], Ledger]
) -> None:
    agent = make_agent(HARSH, cloud=Cloud(), budget=ledger(1), share=1.0)
    first, second = (agent.generate(Request(EASY, seed=3)) for _ in range(2))
    assert (first.drawn_on, second.drawn_on) == (Route.CLOUD, Route.EDGE)
    assert second.fallback_reason is not None
    assert "budget" in second.fallback_reason


def test_a_picture_that_pleases_spends_nothing(
    make_agent: MakeAgent, ledger: Callable[[int], Ledger]
) -> None:
    budget = ledger(5)
    make_agent(PLEASED, cloud=Cloud(), budget=budget).generate(Request(HARD))
    assert budget.spent().pictures == 0
    assert budget.pace().ahead < 0


def test_a_refused_call_is_given_back(
    make_agent: MakeAgent, ledger: Callable[[int], Ledger]
) -> None:
    budget = ledger(5)
    agent = make_agent(HARSH, cloud=Cloud(Refused("busy")), budget=budget, share=1.0)
    assert agent.generate(Request(EASY)).drawn_on is Route.EDGE
    assert budget.spent().pictures == 0


@pytest.mark.parametrize("error", [BundleError("the critic broke"), MemoryError()])
def test_a_look_that_fails_costs_no_picture(
    make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = LazyNetwork.run

    def broken(network: LazyNetwork, *given: Any) -> list[np.ndarray]:
        if network.part.name == "critic":
            raise error
        return run(network, *given)

    monkeypatch.setattr(LazyNetwork, "run", broken)
    cloud, events = Cloud(), list[Event]()
    result = make_agent(HARSH, cloud=cloud).generate(Request(EASY), events.append)
    assert result.drawn_on is result.decision.route is Route.EDGE
    told = f"nobody could look at it: {error!s}" if str(error) else "memory ran out"
    assert told in result.decision.reason
    assert not cloud.asked
    assert "critic" not in result.models
    assert isinstance(events[-1], Fallback)
    assert told in events[-1].reason


def test_a_critic_that_answers_no_numbers_costs_no_picture(make_agent: MakeAgent) -> None:
    result = make_agent(float("nan"), cloud=Cloud()).generate(Request(EASY))
    assert result.drawn_on is Route.EDGE
    assert "critic answered" in result.decision.reason


def test_what_the_edge_cannot_draw_the_cloud_does(
    make_agent: MakeAgent, tiny_bundle: Path, blank_decoder: Callable[[Path], None]
) -> None:
    blank_decoder(tiny_bundle)
    result = make_agent(PLEASED, cloud=Cloud()).generate(Request(EASY))
    assert (result.drawn_on, result.fallback_from) == (Route.CLOUD, Route.EDGE)
    assert not result.decision.quality


def test_all_networks_can_be_opened_beforehand(make_agent: MakeAgent) -> None:
    agent = make_agent(PLEASED, cloud=Cloud())
    agent.open()
    assert set(agent.backends) == {"text_encoder", "predictor", "unet", "vae_decoder", "critic"}


def test_low_memory_looks_as_well(make_agent: MakeAgent) -> None:
    cloud = Cloud()
    agent = make_agent(HARSH, cloud=cloud, memory=Memory.LOW)
    assert agent.generate(Request(EASY)).drawn_on is Route.CLOUD


def test_who_stops_the_cloud_stops_the_request(make_agent: MakeAgent) -> None:
    flag = Cancellation()
    with pytest.raises(Cancelled):
        make_agent(HARSH, cloud=Cloud(Cancelled("stopped"))).generate(
            Request(EASY), cancellation=flag
        )


def test_who_stops_during_the_look_spends_nothing(
    make_agent: MakeAgent, ledger: Callable[[int], Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, run, budget, cloud = Cancellation(), LazyNetwork.run, ledger(5), Cloud()

    def stopping(network: LazyNetwork, *given: Any) -> list[np.ndarray]:
        if network.part.name == "critic":
            flag.cancel()
        return run(network, *given)

    monkeypatch.setattr(LazyNetwork, "run", stopping)
    agent = make_agent(HARSH, cloud=cloud, budget=budget, share=1.0)
    with pytest.raises(Cancelled):
        agent.generate(Request(EASY), cancellation=flag)
    assert budget.spent().pictures == 0
    assert not cloud.asked


def test_the_cloud_gets_its_whole_deadline_however_long_the_edge_drew(
    make_agent: MakeAgent,
) -> None:
    clock, cloud = iter(range(0, 10_000, 10)), Cloud()
    agent = make_agent(HARSH, cloud=cloud, clock=lambda: float(next(clock)))
    result = agent.generate(Request(EASY, deadline_s=60.0))
    assert result.drawn_on is Route.CLOUD
    assert cloud.asked[0]["deadline_s"] == 60.0 - 2 * 10.0 - 10.0  # less deciding, and asking


def test_a_critic_that_cannot_be_opened_here_costs_no_picture(
    make_agent: MakeAgent, tiny_bundle: Path, rewrite: Callable[..., None], hire_critic: Hire
) -> None:
    def lower(content: dict[str, Any]) -> None:
        content["components"]["critic"]["precision"] = "fp16"  # which no processor computes in

    hire_critic(tiny_bundle, HARSH)
    rewrite(tiny_bundle, lower)
    options: dict[str, Any] = {"cascade": True, "cloud": Cloud(), "provider": Provider.CPU}
    with EdgeAgent(open_bundle(tiny_bundle), **options) as agent:
        result = agent.generate(Request(EASY))
    assert result.drawn_on is Route.EDGE
    assert "fp16" in result.decision.reason


@pytest.mark.parametrize("squashed", [True, False])
def test_a_wide_picture_is_seen_as_the_clip_sees_it(squashed: bool) -> None:
    wide = Image.new("RGB", (64, 32), "black")
    wide.paste("white", (0, 0, 8, 32))
    assert seen(wide, 16, squashed=squashed).any() == squashed
    assert seen(wide, 16, squashed=squashed).shape == (16, 16, 3)


def test_a_decision_without_drawing_is_the_routers(make_agent: MakeAgent) -> None:
    decision = make_agent(PLEASED, cloud=Cloud()).route(HARD)
    assert decision.route is Route.CLOUD
    assert not decision.quality


def test_a_bundle_without_a_critic_is_refused_at_once(tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="has no critic to look at pictures with"):
        EdgeAgent(open_bundle(tiny_bundle), cascade=True, cloud=Cloud())
    EdgeAgent(open_bundle(tiny_bundle), cascade=True).close()  # nobody will be asked
