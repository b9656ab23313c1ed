"""A limit that no crowd of processes, no kill and no clock exceeds by one picture."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import ConfigError, LedgerError, OverBudget
from edge_agent.routing.budget.ledger import Ledger, Limits
from edge_agent.routing.budget.pacer import Pace, Pacer

ROOT = Path(__file__).parents[4]
DAY_S = 86_400.0
PACER = Pacer([0.51 + 0.002 * index for index in range(200)], 0.5)


class Clock:
    """Shows the time a test sets."""

    def __init__(self, days: float = 20_000.0) -> None:
        self.days = days

    def __call__(self) -> float:
        return self.days * DAY_S


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite3"


def reserved(ledger: Ledger, most: int = 1000) -> int:
    """Reserve until nothing is left; return how often that went well."""
    for count in range(most):
        try:
            ledger.reserve()
        except OverBudget:
            return count
    return most


def test_no_picture_more_than_the_limit(file: Path) -> None:
    ledger = Ledger(file, Limits(pictures=3), clock=Clock())
    assert reserved(ledger) == 3
    with pytest.raises(OverBudget, match="3 cloud pictures a day is spent on 2024-10-04") as over:
        ledger.reserve()
    assert not over.value.maybe_drawn
    assert ledger.admit(PACER, 1.0).reservation is None


def test_money_is_exact_to_the_last_cent(file: Path) -> None:
    """As floats a hundred cents are more than one dollar."""
    limits = Limits(cost=Decimal("1.00"), price=Decimal("0.01"))
    assert reserved(Ledger(file, limits)) == 100
    assert Ledger(file, limits).spent().cost == 1
    with pytest.raises(OverBudget, match=r"budget of 1\.00 a day has no room .* at 0\.01"):
        Ledger(file, limits).reserve()


@given(st.decimals(0, 1, places=6), st.decimals("0.1", 2, places=6))
@settings(max_examples=15, deadline=None)
def test_the_cost_never_passes_its_limit(
    tmp_path_factory: pytest.TempPathFactory, cost: Decimal, price: Decimal
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("l") / "l", Limits(cost=cost, price=price))
    assert reserved(ledger) == cost // price
    assert ledger.spent().cost <= cost


def test_both_limits_hold_and_none_is_no_limit(file: Path) -> None:
    both = Limits(pictures=5, cost=Decimal(1), price=Decimal("0.4"))
    assert reserved(Ledger(file, both)) == 2
    assert reserved(Ledger(file), most=20) == 20
    assert reserved(Ledger(file, Limits(pictures=23))) == 1


def test_a_cost_without_a_price_is_refused() -> None:
    for price in (None, Decimal(0)):
        with pytest.raises(ConfigError, match="price of a picture; give it with --cloud-cost"):
            Limits(cost=Decimal(5), price=price)


def test_what_is_settled_stays_spent_and_what_is_released_comes_back_once(file: Path) -> None:
    ledger = Ledger(file, Limits(pictures=2))
    first, second = ledger.reserve(), ledger.reserve()
    ledger.settle(first)
    ledger.release(first)
    assert reserved(ledger) == 0
    ledger.release(second)
    ledger.release(second)
    assert reserved(ledger) == 1
    assert (ledger.spent().pictures, ledger.spent().unsure) == (2, 1)


def test_a_new_day_opens_a_new_budget_and_forgets_the_unsure(file: Path) -> None:
    clock = Clock()
    ledger = Ledger(file, Limits(pictures=2), clock=clock)
    assert reserved(ledger) == 2
    clock.days += 0.999
    assert reserved(ledger) == 0
    clock.days += 0.001
    assert reserved(ledger) == 2


def test_a_clock_set_back_opens_no_second_budget(file: Path) -> None:
    clock = Clock()
    ledger = Ledger(file, Limits(pictures=2), clock=clock)
    assert reserved(ledger) == 2
    clock.days -= 3
    assert reserved(ledger) == 0
    assert reserved(Ledger(file, Limits(pictures=2), clock=clock)) == 0
    with pytest.raises(OverBudget, match=r"on 2024-10-04, the latest .* clock says 2024-10-01"):
        ledger.reserve()
    clock.days = 20_001
    assert reserved(ledger) == 2


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), max_size=12))
@settings(max_examples=15, deadline=None)
def test_however_the_clock_jumps_a_budget_opens_only_with_a_later_day(
    tmp_path_factory: pytest.TempPathFactory, jumps: list[tuple[int, int]]
) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path_factory.mktemp("l") / "l", Limits(pictures=2), clock=clock)
    days = {clock.days}
    total = reserved(ledger)
    for jump, calls in jumps:
        clock.days += jump
        days.add(clock.days)
        total += reserved(ledger, calls)
    assert total <= 2 * (max(days) - 20_000 + 1)


def test_a_call_released_after_midnight_frees_nothing_of_the_new_day(file: Path) -> None:
    clock = Clock(20_000.9)
    ledger = Ledger(file, Limits(pictures=1), clock=clock)
    late = ledger.reserve()
    clock.days = 20_001.1
    assert reserved(ledger) == 1
    ledger.release(late)
    assert reserved(ledger) == 0


def test_pace_and_limits_survive_a_restart_and_are_shared(file: Path) -> None:
    one, other = (Ledger(file, Limits(pictures=100)) for _ in range(2))
    pace = Pace()
    for score in (0.9, 0.9, 0.52, 0.9, 0.52):
        for ledger in (one, other):
            admission = ledger.admit(PACER, score)
            sent = score > PACER.threshold(pace)
            assert admission.threshold == PACER.threshold(pace)
            assert (admission.reservation is not None) == sent
            pace = PACER.decided(pace, sent=sent)
    assert Ledger(file).pace() == pace


def test_released_calls_and_a_spent_budget_leave_no_trace_in_the_pace(file: Path) -> None:
    ledger = Ledger(file, Limits(pictures=1))
    for _ in range(20):
        admission = ledger.admit(PACER, 0.9)
        assert admission.reservation is not None
        ledger.release(admission.reservation)
        ledger.admit(PACER, 0.1)
    admission = ledger.admit(PACER, 0.9)
    assert admission.reservation is not None
    ledger.settle(admission.reservation)
    assert ledger.pace() == Pace(pytest.approx(0.5 - 0.5))  # one prompt stayed, one was sent
    for _ in range(20):
        assert ledger.admit(PACER, 0.9).reservation is None
    assert ledger.pace() == Pace(pytest.approx(0.0))


def test_threads_share_one_ledger(file: Path) -> None:
    ledger = Ledger(file, Limits(pictures=10))
    with ThreadPoolExecutor(4) as threads:
        counts = list(threads.map(lambda _: reserved(ledger), range(4)))
    assert sum(counts) == 10


PROGRAM = """
import sys
from pathlib import Path
from edge_agent.errors import OverBudget
from edge_agent.routing.budget.ledger import Ledger, Limits
ledger = Ledger(Path(sys.argv[1]), Limits(pictures=int(sys.argv[2])), patience_s=120)
print("ready", flush=True)
sys.stdin.readline()
"""


@contextmanager
def process(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run PROGRAM and `program` after it once a line comes on stdin; kill it in the end."""
    running = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdin is not None
    assert running.stdout is not None
    try:
        yield running
    finally:
        running.kill()
        running.stdin.close()
        running.stdout.close()
        running.wait(120)


def start(running: subprocess.Popen[str]) -> None:
    assert running.stdin is not None
    running.stdin.write("go\n")
    running.stdin.flush()


def line_of(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def test_eight_processes_at_once_draw_exactly_the_limit(file: Path) -> None:
    """Each settles some calls and gives others back, as fast as it can, until none is left."""
    program = """
drawn = 0
for turn in range(10_000):
    try:
        call = ledger.reserve()
    except OverBudget:
        break
    if turn % 3 == 2:
        ledger.release(call)
    else:
        ledger.settle(call)
        drawn += 1
print(drawn, flush=True)
"""
    with ExitStack() as stack:
        crowd = [stack.enter_context(process(program, file, 40)) for _ in range(8)]
        assert [line_of(one) for one in crowd] == ["ready"] * 8
        for one in crowd:
            start(one)
        counts = [int(line_of(one)) for one in crowd]
    spent = Ledger(file).spent()
    assert sum(counts) == spent.pictures <= 40
    # Who was refused while another held the last call, to give it back, has left before the end.
    assert spent.pictures + reserved(Ledger(file, Limits(pictures=40))) == 40
    assert spent.unsure == 0


def test_a_process_killed_with_a_reservation_leaves_it_spent_until_the_day_ends(
    file: Path,
) -> None:
    with process("ledger.reserve(); print('reserved', flush=True); input()", file, 1) as one:
        start(one)
        assert (line_of(one), line_of(one)) == ("ready", "reserved")
        one.send_signal(signal.SIGKILL)
        one.wait(120)
    clock = Clock(Ledger(file).spent().day.toordinal() - 719_163)
    ledger = Ledger(file, Limits(pictures=1), clock=clock)
    assert ledger.spent().unsure == 1
    assert reserved(ledger) == 0
    clock.days += 1
    assert reserved(ledger) == 1


def test_kills_at_any_moment_lose_no_call_and_damage_nothing(file: Path) -> None:
    program = """
while True:
    call = ledger.reserve()
    print("sent", flush=True)
    ledger.settle(call)
"""
    sent = 0
    moments = random.Random(0)
    for _ in range(4):
        with process(program, file, 100_000) as one:
            assert line_of(one) == "ready"
            start(one)
            for _ in range(moments.randrange(1, 12)):
                assert line_of(one) == "sent"
            one.send_signal(signal.SIGKILL)
            assert one.stdout is not None
            sent += one.stdout.read().count("sent")
    total = Ledger(file).spent()
    with sqlite3.connect(file) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    assert total.pictures >= sent
    assert total.unsure <= 4


def test_a_kill_inside_a_transaction_undoes_it_whole(file: Path) -> None:
    Ledger(file).reserve()
    program = """
with ledger._transaction() as db:
    ledger._insert(db, 99_999, paced=False)
    print("written", flush=True)
    input()
"""
    with process(program, file, 1) as one:
        start(one)
        assert (line_of(one), line_of(one)) == ("ready", "written")
        one.send_signal(signal.SIGKILL)
        one.wait(120)
    assert Ledger(file).spent().pictures == 1


@pytest.mark.parametrize("content", [b"not a database, but long enough to be one" * 40, b"x"])
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(
    file: Path, content: bytes
) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(LedgerError, match=r"(cannot be read|is no budget's ledger).*--ledger"):
        Ledger(file).reserve()
    assert file.read_bytes() == content


def test_a_damaged_ledger_is_refused(file: Path) -> None:
    ledger = Ledger(file)
    ledger.reserve()
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + bytes(range(256)) * ((len(whole) - 4096) // 256))
    with pytest.raises(LedgerError, match=str(file)):
        ledger.reserve()


def test_a_newer_ledger_and_a_stranger_s_database_are_refused(file: Path) -> None:
    Ledger(file).reserve()
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(LedgerError, match=r"format 7, made by a newer version .* upgrade"):
        Ledger(file).reserve()
    stranger = file.with_name("photos.sqlite3")
    with sqlite3.connect(stranger) as db:
        db.execute("CREATE TABLE photos (name)")
    db.close()
    before = stranger.read_bytes()
    with pytest.raises(LedgerError, match=r"photos[.]sqlite3 is no budget's ledger"):
        Ledger(stranger).reserve()
    assert stranger.read_bytes() == before


def test_a_locked_ledger_is_one_sentence(file: Path) -> None:
    ledger = Ledger(file, patience_s=0.0)
    ledger.reserve()
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="locked by another program for 0 s; try again"):
        ledger.reserve()
    holder.close()
    assert ledger.spent().pictures == 1


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "ledger.sqlite3"):
        with pytest.raises(LedgerError, match="--ledger"):
            Ledger(place).reserve()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_ledger_is_one_sentence(file: Path) -> None:
    Ledger(file).reserve()
    file.chmod(0o400)
    with pytest.raises(LedgerError, match="cannot be written"):
        Ledger(file).reserve()
