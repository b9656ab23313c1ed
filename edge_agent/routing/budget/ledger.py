"""Limits per day on what the cloud draws, kept in one SQLite file by all processes of a device.

A call counts as spent from the moment it is reserved, and durably so before anything is sent; only
a call that certainly drew nothing is released. So a process that is killed can never let the others
exceed a limit: what it had reserved stays counted, since nobody knows what the cloud did, and
expires with its day. Days are those of UTC, and the latest day ever seen is remembered: a clock set
back opens no second budget for the same day.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path

from edge_agent.errors import ConfigError, LedgerError, OverBudget
from edge_agent.routing.budget.pacer import Pace, Pacer

FORMAT = 1
APPLICATION = 0x52543249  # "RT2I" in SQLite's header, so that no other database is taken for ours
PATIENCE_S = 10.0
_DAY_S = 86_400
_MILLIONTHS = 1_000_000  # money is counted in whole millionths: sums of floats drift

_SCHEMA = (
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {FORMAT}",
    "CREATE TABLE state (day INTEGER NOT NULL, ahead REAL NOT NULL, credit REAL NOT NULL)",
    "INSERT INTO state VALUES (0, 0, 0)",
    # AUTOINCREMENT: an id is never given twice, so that a late release cannot hit another's call.
    "CREATE TABLE calls (id INTEGER PRIMARY KEY AUTOINCREMENT, day INTEGER NOT NULL, "
    "cost INTEGER NOT NULL, paced INTEGER NOT NULL, settled INTEGER NOT NULL DEFAULT 0)",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the cloud may draw and cost a day, `None` for no limit; `price` is that of a picture.

    Raises ConfigError for a limit on the cost without a price.
    """

    pictures: int | None = None
    cost: Decimal | None = None
    price: Decimal | None = None

    def __post_init__(self) -> None:
        if self.cost is not None and not self.price:
            raise ConfigError(
                f"a budget of {self.cost} a day says nothing without the price of a picture; "
                "give it with --cloud-cost"
            )


@dataclass(frozen=True, slots=True)
class Reservation:
    """One call to the cloud that counts as spent until it is released."""

    id: int


@dataclass(frozen=True, slots=True)
class Admission:
    """A paced decision: the threshold that held; above it a reservation, if there was room."""

    threshold: float
    reservation: Reservation | None


@dataclass(frozen=True, slots=True)
class Spent:
    """What a day has cost so far; `unsure` of the `pictures` were reserved and never settled."""

    day: date
    pictures: int
    cost: Decimal
    unsure: int


class Ledger:
    """The budget's file at `path`, made at its first use. Safe for threads and processes alike.

    `clock` gives seconds since 1970; a lock of another process is waited for `patience_s` seconds.
    Every method raises LedgerError for a file that cannot be used.
    """

    def __init__(
        self,
        path: Path,
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.time,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.path = path
        self.limits = limits or Limits()
        self._price = _millionths(self.limits.price or Decimal(0), ROUND_CEILING)
        self._clock = clock
        self._patience_s = patience_s

    def pace(self) -> Pace:
        """Return what the pacer remembers."""
        with self._transaction() as db:
            return _pace(db)

    def spent(self) -> Spent:
        """Return what today has cost so far."""
        with self._transaction() as db:
            day = self._day(db)
            pictures, cost = _sums(db, day)
            open_calls = "SELECT count(*) FROM calls WHERE day = ? AND NOT settled"
            (unsure,) = db.execute(open_calls, (day,)).fetchone()
            return Spent(_date(day), pictures, Decimal(cost) / _MILLIONTHS, unsure)

    def admit(self, pacer: Pacer, score: float) -> Admission:
        """Decide on a prompt's score, count it in the pace and reserve its call, all at once.

        While the limits leave no room nothing can be sent, so nothing is counted either.
        """
        with self._transaction() as db:
            pace, day = _pace(db), self._day(db)
            limit = pacer.threshold(pace)
            if self._refusal(db, day) is not None:
                return Admission(limit, None)
            sent = score > limit
            _write_pace(db, pacer.decided(pace, sent=sent))
            return Admission(limit, self._insert(db, day, paced=True) if sent else None)

    def reserve(self) -> Reservation:
        """Set one call aside that the router did not decide; raises OverBudget if none is left."""
        with self._transaction() as db:
            day = self._day(db)
            if (refusal := self._refusal(db, day)) is not None:
                raise OverBudget(refusal, maybe_drawn=False)
            return self._insert(db, day, paced=False)

    def settle(self, reservation: Reservation) -> None:
        """Note that the call was made: it stays spent."""
        with self._transaction() as db:
            db.execute("UPDATE calls SET settled = 1 WHERE id = ?", (reservation.id,))
            _write_pace(db, _pace(db).answered())

    def release(self, reservation: Reservation) -> None:
        """Give back a call that certainly drew nothing; no effect on one settled or given back."""
        with self._transaction() as db:
            gone = "DELETE FROM calls WHERE id = ? AND NOT settled RETURNING paced"
            for (paced,) in db.execute(gone, (reservation.id,)).fetchall():
                _write_pace(db, _pace(db).failed(counted=bool(paced)))

    def _insert(self, db: sqlite3.Connection, day: int, *, paced: bool) -> Reservation:
        db.execute("UPDATE state SET day = ?", (day,))
        # Yesterday's calls are kept: one may still be under way and be released.
        db.execute("DELETE FROM calls WHERE day < ? - 1", (day,))
        values = (day, self._price, paced)
        row = db.execute("INSERT INTO calls (day, cost, paced) VALUES (?, ?, ?)", values).lastrowid
        assert row is not None
        return Reservation(row)

    def _refusal(self, db: sqlite3.Connection, day: int) -> str | None:
        """Return why one more picture on `day` would exceed a limit, or None."""
        pictures, cost = _sums(db, day)
        limits = self.limits
        if limits.pictures is not None and pictures + 1 > limits.pictures:
            what = f"the budget of {limits.pictures} cloud pictures a day is spent"
        elif limits.cost is not None and cost + self._price > _millionths(limits.cost, ROUND_FLOOR):
            what = (
                f"the budget of {limits.cost} a day has no room for a cloud picture at "
                f"{limits.price}: {Decimal(cost) / _MILLIONTHS} is spent"
            )
        else:
            return None
        if day > self._today():
            return (
                f"{what} on {_date(day)}, the latest day in the ledger {self.path}, though the "
                f"clock says {_date(self._today())}; correct the clock, or move the ledger away"
            )
        return f"{what} on {_date(day)}; the next day begins at midnight UTC"

    def _today(self) -> int:
        return int(self._clock() // _DAY_S)

    def _day(self, db: sqlite3.Connection) -> int:
        (latest,) = db.execute("SELECT day FROM state").fetchone()
        return max(int(latest), self._today())

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the ledger with its write lock held; all is written at the end, or nothing is.

        A connection each keeps threads and forks apart; SQLite's rollback journal with its default
        `synchronous = FULL` makes what was written survive the process and the power.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(
                sqlite3.connect(self.path, timeout=self._patience_s, isolation_level=None)
            ) as db:
                db.execute("BEGIN IMMEDIATE")
                self._check_format(db)
                yield db
                db.execute("COMMIT")
        except sqlite3.OperationalError as err:
            if err.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise LedgerError(
                    f"the budget's ledger {self.path} was locked by another program for "
                    f"{self._patience_s:g} s; try again when it is done"
                ) from err
            raise LedgerError(
                f"the budget's ledger {self.path} cannot be written ({err}); "
                "check its owner and the disk, or name another file with --ledger"
            ) from err
        except (OSError, sqlite3.Error) as err:
            raise LedgerError(
                f"the budget's ledger {self.path} cannot be read ({err}); move it away to start "
                "today's budget anew, or name another file with --ledger"
            ) from err

    def _check_format(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if self.path.stat().st_size == 0:
            for statement in _SCHEMA:
                db.execute(statement)
        elif application != APPLICATION:
            raise LedgerError(
                f"{self.path} is no budget's ledger; move it away, "
                "or name another file with --ledger"
            )
        elif version > FORMAT:
            raise LedgerError(
                f"the budget's ledger {self.path} has format {version}, made by a newer version of "
                f"routet2i-edge than this one, which reads up to {FORMAT}; upgrade routet2i-edge"
            )


def _pace(db: sqlite3.Connection) -> Pace:
    return Pace(*db.execute("SELECT ahead, credit FROM state").fetchone())


def _write_pace(db: sqlite3.Connection, pace: Pace) -> None:
    db.execute("UPDATE state SET ahead = ?, credit = ?", (pace.ahead, pace.credit))


def _sums(db: sqlite3.Connection, day: int) -> tuple[int, int]:
    """Return pictures and cost in millionths of a day."""
    sums = "SELECT count(*), coalesce(sum(cost), 0) FROM calls WHERE day = ?"
    pictures, cost = db.execute(sums, (day,)).fetchone()
    return pictures, cost


def _millionths(amount: Decimal, rounding: str) -> int:
    return int((amount * _MILLIONTHS).to_integral_value(rounding))


def _date(day: int) -> date:
    return date(1970, 1, 1) + timedelta(days=day)
