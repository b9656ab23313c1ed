"""The evaluation in a few sentences, as its numbers have it."""

from __future__ import annotations

from typing import Any, Final

Report = dict[str, Any]

NONE: Final = "\N{EN DASH}"
MINUS: Final = "\N{MINUS SIGN}"


def verdict(report: Report) -> Report:
    """Return the key of the `best` other way at 50 % routing, and `sentences`."""
    methods = {row["key"]: row for row in report["methods"]}
    others = [row for row in report["methods"] if row["key"] not in ("ours", "random")]
    best = max(others, key=lambda row: row["numbers"]["delta_p_50"]["mean"])
    return {
        "best": best["key"],
        "sentences": [
            _quality(report, methods["ours"], best),
            _calls(report, methods["ours"], best),
            *([_look(report["cascade"])] if report["cascade"] else []),
        ],
    }


def _quality(report: Report, ours: Report, best: Report) -> str:
    reached = ours["numbers"]["delta_p_50"]
    everything = f"{100 * report['pair']['cloud_delta_p']['mean']:.0f}\N{NO-BREAK SPACE}%"
    more = best["ours_more"]["delta_p_50"]
    random = ours_against(report, "random", "delta_p_50")
    by_chance = (
        "better than random routing" if random["low"] > 0
        else "worse than random routing" if random["high"] < 0
        else "no better than random routing as far as can be told"
    )  # fmt: skip
    return (
        f"With half of the prompts sent to the cloud, our router reaches ΔP {percent(reached)}, "
        f"{by_chance} and {_compared(more)} the best of the other ways, {best['name']} "
        f"(difference {points_of(more)}); sending every prompt scores {everything} "
        f"(ours more: {points_of(ours['numbers']['over_cloud_50'])})."
    )


def _calls(report: Report, ours: Report, best: Report) -> str:
    numbers = ours["numbers"]
    if numbers["apgr"]["mean"] is None:
        overall = (
            "sending every prompt gains nothing, so there is no gap to recover; over all budgets "
            f"the area above random routing is {points_of(numbers['gain_area'])} points of ΔP, "
            f"the other's {points_of(best['numbers']['gain_area'])}."
        )
    else:
        overall = (
            f"over all budgets its APGR is {decimal(numbers['apgr'])}, where random is 0.5 and the "
            f"other {decimal(best['numbers']['apgr'])}."
        )
    if reached_never(numbers["calls_50"]):
        return f"ΔP 50 % is never reached, however many prompts are sent; {overall}"
    others = best["numbers"]["calls_50"]
    beside = "never" if reached_never(others) else percent(others)
    needed = (
        f"For ΔP 50 % it sends {percent(numbers['calls_50'])} of the prompts (the other: {beside})"
    )
    random = next(row for row in report["methods"] if row["key"] == "random")
    if reached_never(random["numbers"]["calls_50"]):
        return f"{needed}, which random routing never reaches; {overall}"
    return (
        f"{needed} and saves {percent(numbers['saved_50'])} of the calls of random routing; "
        f"{overall}"
    )


def _look(cascade: Report) -> str:
    """Return what looking at the edge's pictures first is worth, by CLIP and by the other judge."""
    rows = {row["key"]: row for row in cascade["rows"]}
    reached, unlearnt = (rows[key]["numbers"]["delta_p_50"] for key in ("after", "quality"))
    more = {key: turned(less) for key, less in rows["after"]["ours_more"].items()}
    judged = (
        f"; by the judge that is not CLIP the difference is {points_of(more['judge_50'])} points"
        if "judge_50" in more
        else ""
    )
    return (
        f"After a look at the edge's picture, half of the calls give ΔP {percent(reached)}, "
        f"{_compared(more['delta_p_50'])} choosing before drawing (difference "
        f"{points_of(more['delta_p_50'])}){judged}; that picture's quality alone, which learns "
        f"nothing, gives {percent(unlearnt)}."
    )


def _compared(more: Report) -> str:
    points = 100 * more["mean"]
    if more["low"] > 0:
        return f"{points:.1f} points above"
    if more["high"] < 0:
        return f"{-points:.1f} points below"
    return "not told apart from"


def reached_never(estimate: Report | None) -> bool:
    """Return whether a share of calls is "never"."""
    return bool(estimate and estimate.get("never"))


def ours_against(report: Report, key: str, number: str) -> Report:
    """Return what ours has more of a number than the method with this key."""
    rows = (row for row in report["methods"] if row["key"] == key)
    found: Report = next(rows)["ours_more"][number]
    return found


def turned(estimate: Report) -> Report:
    """Return a difference the other way round."""
    ends = {"mean": "mean", "low": "high", "high": "low"}
    other = {to: estimate[end] for to, end in ends.items()}
    return estimate | {to: None if value is None else -value for to, value in other.items()}


def interval(estimate: Report | None, factor: float, digits: int, sign: bool = False) -> str:
    """Return "mean [low, high]", "never" for what is not reached, a dash if not defined.

    Without the interval where it is not defined in every resample.
    """
    if estimate is None or estimate["mean"] is None:
        return "never" if estimate and estimate.get("never") else NONE
    plus = "+" if sign else ""

    def one(value: float | None, else_: str) -> str:
        return else_ if value is None else f"{factor * value:{plus}.{digits}f}".replace("-", MINUS)

    low, high = one(estimate["low"], NONE), one(estimate["high"], "never")
    mean = one(estimate["mean"], NONE)
    return mean if estimate["low"] is None or low == high == mean else f"{mean} [{low}, {high}]"


def percent(estimate: Report | None) -> str:
    """Return a share with its interval, in %."""
    mean, space, ends = interval(estimate, 100, 1).partition(" ")
    return f"{mean}\N{NO-BREAK SPACE}%{space}{ends}"


def points_of(estimate: Report | None) -> str:
    """Return a signed difference of shares with its interval, in points."""
    return interval(estimate, 100, 1, sign=True)


def decimal(estimate: Report | None) -> str:
    """Return a number with its interval, to three places."""
    return interval(estimate, 1, 3)
