"""The figures of the page, drawn by matplotlib as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Report = dict[str, Any]

OURS: Final = "#c2410c"
INK: Final = "#334155"
QUIET: Final = "#94a3b8"
ORACLE: Final = "#e2e8f0"
# Told apart by line as well as by colour; good on white, and for the colour-blind (Okabe and Ito).
LINES: Final = (
    ("#0072b2", "-"), ("#009e73", "-"), ("#56b4e9", "-"), ("#cc79a7", "-"), ("#e69f00", "-"),
    ("#000000", ":"), ("#0072b2", ":"), ("#009e73", "--"), ("#cc79a7", "--"),
)  # fmt: skip
STYLE: Final[dict[Any, Any]] = {
    "font.size": 10.5,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8edf3",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "evaluate-router",
}


def figures(report: Report) -> dict[str, str]:
    """Return the SVG text of every figure that the report has numbers for."""
    drawn: dict[str, Callable[[Report], Figure] | None] = {
        "curve": lambda r: cost_quality(r, "delta_p", "ΔP: gain over always-edge (%)", 100),
        "differences": differences,
        "metrics": by_metric if len(report["labels"]["metrics"]) > 1 else None,
        "nouns": nouns,
        "reliability": reliability,
        "shares": shares,
        "drift": drift,
        "cascade": cascade if report["cascade"] else None,
        "judge": judged if report.get("judge") else None,
    }
    with mpl.rc_context(STYLE):
        return {name: _svg(draw(report)) for name, draw in drawn.items() if draw}


def _svg(figure: Figure) -> str:
    with io.StringIO() as text:
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
        return text.getvalue()[text.getvalue().index("<svg") :]


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]


def cost_quality(report: Report, view: str, label: str, factor: float) -> Figure:
    """Draw one curve a method over the share of prompts sent, with the oracles as a band."""
    figure, (axes,) = _axes(10.2, 4.9)
    share = [100 * x for x in report["grid"]]

    def values(row: Report) -> list[float]:
        return [factor * y for y in row["curves"][view]]

    oracles = [values(row) for row in report["oracles"]]
    if view == "judge":
        axes.plot(share, oracles[0], color=QUIET, lw=1, label="by the labels themselves")
    elif len(oracles) == 2:
        axes.fill_between(
            share,
            oracles[0],
            oracles[1],
            color=ORACLE,
            lw=0,
            label="between the oracles: split-half, naive",
        )
    else:
        axes.plot(share, oracles[0], color=QUIET, lw=1, label="oracle, naive (one picture each)")
    if view == "delta_p":
        low, high = ([factor * y for y in report["band"][end]] for end in ("low", "high"))
        axes.fill_between(
            share, low, high, color=OURS, alpha=0.13, lw=0, label="ours, 95 % interval"
        )
    others = [row for row in report["methods"] if row["key"] not in ("ours", "random")]
    others.sort(key=lambda row: -row["numbers"]["gain_area"]["mean"])
    by_key = {row["key"]: row for row in report["methods"]}
    axes.plot(share, values(by_key["ours"]), color=OURS, lw=3, zorder=5, label="ours")
    for row, (colour, line) in zip(others, LINES, strict=False):
        axes.plot(share, values(row), color=colour, ls=line, lw=1.3, label=row["name"])
    straight = values(by_key["random"])
    axes.plot(share, straight, color=QUIET, ls=(0, (5, 3)), lw=1.3, label="random (analytic)")
    ends: dict[str, Any] = {"color": INK, "ms": 6, "ls": "", "clip_on": False, "zorder": 6}
    axes.plot([0], [0], "o", markerfacecolor="white", label="always-edge", **ends)
    axes.plot([100], [straight[-1]], "o", label="always-cloud", **ends)
    axes.set(xlim=(0, 100), xlabel="prompts sent to the cloud (%)", ylabel=label)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9.5)
    return figure


def differences(report: Report) -> Figure:
    """Draw what ours has more than every other, with paired intervals."""
    rows = [row for row in report["methods"] if row["key"] != "ours"][::-1]
    figure, both = _axes(10.2, 0.9 + 0.34 * len(rows), 2)
    kinds = (("delta_p_50", 100, "ΔP at 50 % (points)"), ("apgr", 1, "APGR"))
    for axes, (key, factor, label) in zip(both, kinds, strict=True):
        axes.axvline(0, color=INK, lw=1)
        for y, row in enumerate(rows):
            found = row["ours_more"][key]
            if found is None or None in (found["low"], found["high"]):
                continue
            low, mean, high = (factor * found[end] for end in ("low", "mean", "high"))
            clear = OURS if low > 0 else INK if high < 0 else QUIET
            axes.plot([low, high], [y, y], color=clear, lw=2.2)
            axes.plot([mean], [y], "o", color=clear, ms=6)
        axes.set(xlabel=f"ours more: {label}", ylim=(-0.6, len(rows) - 0.4))
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.grid(axis="y", visible=False)
    both[1].set_yticklabels([])
    return figure


def by_metric(report: Report) -> Figure:
    """Draw the gain on every metric at half of the prompts, for ours and the best of the others."""
    names = [metric["name"] for metric in report["pair"]["metrics"]]
    figure, (axes,) = _axes(10.2, 0.9 + 0.36 * len(names))
    rows = {row["key"]: row for row in report["methods"]}
    shown = [("random", QUIET, "s", 0.2), ("ours", OURS, "o", -0.2)]
    best = report["verdict"]["best"]
    shown.insert(1, (best, LINES[0][0], "D", 0.0))
    for key, colour, marker, off in shown:
        for y, name in enumerate(names):
            found = rows[key]["numbers"][f"metric_50 {name}"]
            at = len(names) - 1 - y + off
            ends = [100 * found["low"], 100 * found["high"]]
            axes.plot(ends, [at, at], color=colour, lw=1.8)
            axes.plot(
                [100 * found["mean"]], [at], marker, color=colour, ms=5.5,
                label=rows[key]["name"] if y == 0 else None,
            )  # fmt: skip
    cloud = [100 * metric["cloud_delta_p"] for metric in report["pair"]["metrics"]]
    ats = range(len(names) - 1, -1, -1)
    axes.plot(cloud, ats, "|", color=INK, ms=15, mew=1.6, ls="", label="always-cloud")
    axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(list(ats), names)
    axes.set(ylim=(-0.6, len(names) - 0.4))
    axes.set(xlabel="gain over always-edge at 50 % sent (% of the gap between the models)")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9.5)
    return figure


def _points(axes: Axes, x: Sequence[float], found: Sequence[Report], factor: float) -> None:
    means = [factor * one["mean"] for one in found]
    off = [
        [factor * (one["mean"] - one["low"]) for one in found],
        [factor * (one["high"] - one["mean"]) for one in found],
    ]
    axes.errorbar(x, means, yerr=off, fmt="o", color=OURS, ms=6, lw=1.8, capsize=3)


def nouns(report: Report) -> Figure:
    """Draw the cloud's win rate and mean gap by number of nouns."""
    rows, what = report["nouns"]["rows"], report["nouns"]["counted"]
    figure, both = _axes(10.2, 3.3, 2)
    x = list(range(len(rows)))
    for axes, key, neutral, label in (
        (both[0], "cloud_wins", 50, "prompts the cloud draws better (%)"),
        (both[1], "gain", 0, "mean gain of the cloud (% of the gaps)"),
    ):
        axes.axhline(neutral, color=QUIET, lw=1.2, ls=(0, (5, 3)))
        _points(axes, x, [row[key] for row in rows], 100)
        axes.set_xticks(x, [row["nouns"] for row in rows])
        axes.set(xlabel=f"{what} in the prompt", ylabel=label)
        axes.margins(x=0.08)
    return figure


def reliability(report: Report) -> Figure:
    """Draw mean true PRS by predicted PRS."""
    figure, (axes,) = _axes(4.9, 3.6)
    bins = report["reliability"]["bins"]
    predicted = [one["predicted"] for one in bins]
    low, high = min(predicted), max(predicted)
    axes.plot([low, high], [low, high], color=QUIET, ls=(0, (5, 3)), lw=1.2, label="as predicted")
    _points(axes, predicted, [one["true"] for one in bins], 1)
    axes.set(xlabel="predicted PRS (tenths of the prompts)", ylabel="mean true PRS")
    axes.margins(y=0.15)
    axes.legend(loc="best", fontsize=9)
    return figure


def shares(report: Report) -> Figure:
    """Draw the share got beside the share asked for."""
    figure, (axes,) = _axes(4.9, 3.6)
    rows = report["shares"]
    asked = [100 * row["asked"] for row in rows]
    axes.plot([0, 100], [0, 100], color=QUIET, ls=(0, (5, 3)), lw=1.2, label="as asked")
    for key, colour, off, label in (
        ("got", OURS, -0.8, "by the quantile alone"),
        ("capped", INK, 0.8, "and never a PRS above ½"),
    ):
        found = [row[key] for row in rows]
        off_by = [
            [100 * (one["mean"] - one["low"]) for one in found],
            [100 * (one["high"] - one["mean"]) for one in found],
        ]
        axes.errorbar(
            [x + off for x in asked], [100 * one["mean"] for one in found], yerr=off_by, fmt="o",
            color=colour, ms=5, lw=1.6, capsize=3, label=label,
        )  # fmt: skip
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="share asked for (%)", ylabel="share sent (%)")
    axes.legend(loc="upper left", fontsize=9)
    return figure


def drift(report: Report) -> Figure:
    """Draw the share in windows of requests that grow harder, fixed and paced."""
    figure, both = _axes(10.2, 3.2, 2)
    facts = report["drift"]
    target, window = 100 * facts["share"], facts["window"]
    titles = {"difficulty": "sorted by what the cloud gains", "score": "sorted by the score itself"}
    for axes, (order, title) in zip(both, titles.items(), strict=True):
        axes.axhspan(target - 2, target + 2, color=ORACLE, lw=0, label="asked for, ± 2 points")
        for key, colour, line, label in (
            ("fixed", INK, "--", "fixed quantile"),
            ("paced", OURS, "-", "paced threshold"),
        ):
            y = [100 * v for v in facts[order]["uncapped"][key]["moving"]]
            x = [window + i * window / 10 for i in range(len(y))]
            axes.plot(x, y, color=colour, ls=line, lw=2.2, label=label)
        axes.set_title(title, fontsize=10.5)
        axes.set(ylim=(-3, 103), xlabel=f"request at the end of a window of {window}")
    both[0].set_ylabel("sent to the cloud (%)")
    both[0].legend(loc="upper left", fontsize=9)
    return figure


def judged(report: Report) -> Figure:
    """Draw the curves by the judge that is not CLIP."""
    label = f"{report['judge']['name']}: gain over always-edge (points)"
    return cost_quality(report, "judge", label, 100)


def cascade(report: Report) -> Figure:
    """Draw what choosing by picture gains over choosing by prompt, below the oracle of pictures."""
    figure, (axes,) = _axes(6.6, 3.6)
    share = [100 * x for x in report["grid"]]
    rows = {row["key"]: row for row in report["cascade"]["rows"]}
    for key, colour, line, width in (
        ("oracle", QUIET, "-", 1), ("after", OURS, "-", 3), ("before", INK, "--", 2),
    ):  # fmt: skip
        gain = [100 * y for y in rows[key]["curves"]["delta_p"]]
        axes.plot(share, gain, color=colour, ls=line, lw=width, label=rows[key]["name"])
    axes.set(xlim=(0, 100), xlabel="pictures asked of the cloud (%)")
    axes.set(ylabel="ΔP: gain over always-edge (%)")
    axes.legend(loc="lower right", fontsize=9)
    return figure
