"""The report as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from cloud_server.training.evaluation.figures import figures
from cloud_server.training.evaluation.verdict import interval, turned

Report = dict[str, Any]

# Heading, key, factor, digits.
Column = tuple[str, str, float, int]
MAIN: Final[Sequence[Column]] = (
    ("ΔP at 25 %", "delta_p_25", 100, 1),
    ("ΔP at 50 %", "delta_p_50", 100, 1),
    ("APGR", "apgr", 1, 3),
    ("gain area G, %", "gain_area", 100, 1),
    ("efficiency η", "efficiency", 1, 2),
)
SAVINGS: Final[Sequence[Column]] = (
    ("saved at ΔP 40 %", "saved_40", 100, 1),
    ("at ΔP 50 %", "saved_50", 100, 1),
    ("at ΔP 60 %", "saved_60", 100, 1),
    ("CPT 50 %", "cpt_50", 100, 1),
    ("CPT 80 %", "cpt_80", 100, 1),
    ("CPT 95 %", "cpt_95", 100, 1),
)
CHOICES: Final[Sequence[Column]] = (
    ("Δw at 40 %", "delta_w_40", 100, 1),
    ("at 50 %", "delta_w_50", 100, 1),
    ("at 80 %", "delta_w_80", 100, 1),
    ("regretful, %", "regretful_50", 100, 1),
    ("worst metric, ΔP", "worst_metric_50", 100, 1),
    ("plain mean, points", "plain_50", 100, 2),
)
JUDGED: Final[Sequence[Column]] = (
    ("gain at 25 %, points", "judge_25", 100, 2),
    ("gain at 50 %, points", "judge_50", 100, 2),
    ("APGR", "judge_apgr", 1, 3),
)

CASCADE: Final[Sequence[Column]] = (
    ("ΔP at 10 %", "delta_p_10", 100, 1),
    ("at 25 %", "delta_p_25", 100, 1),
    ("at 50 %", "delta_p_50", 100, 1),
    ("APGR", "apgr", 1, 3),
    ("calls saved at ΔP 50 %, %", "saved_50", 100, 1),
    ("judge: gain at 25 %, points", "judge_25", 100, 2),
    ("at 50 %, points", "judge_50", 100, 2),
)


def page(report: Report, pictures: Mapping[int, tuple[Path | None, Path | None]]) -> str:
    """Return the page; `pictures` has the edge's and the cloud's picture of some rows."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cloud_server.training.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    environment.filters["said"] = interval
    environment.filters["counted"] = counted
    environment.filters["signed"] = signed
    environment.filters["turned"] = turned
    drawn = {name: Markup(svg) for name, svg in figures(report).items()}
    return environment.get_template("report.html.j2").render(
        r=report,
        methods=sorted(report["methods"], key=_rank),
        figures=drawn,
        main=MAIN,
        savings=SAVINGS,
        choices=CHOICES,
        judged=JUDGED,
        cascade=CASCADE,
        pictures={row: tuple(map(_embedded, pair)) for row, pair in pictures.items()},
    )


def counted(number: int, what: str) -> str:
    """Return "1 picture" or "2 pictures"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def _rank(row: Report) -> float:
    """Order rows by what they reach at half of the prompts."""
    return -float(row["numbers"]["delta_p_50"]["mean"])


def number(estimate: Report | None, factor: float = 1, digits: int = 3) -> Markup:
    """Return an estimate for a cell, its interval smaller beside it."""
    return _cell(interval(estimate, factor, digits))


def signed(estimate: Report | None, factor: float = 1, digits: int = 3) -> Markup:
    """Return a difference for a cell, with its sign, bold where the interval is clear of 0."""
    cell = _cell(interval(estimate, factor, digits, sign=True))
    if estimate is None or None in (estimate["low"], estimate["high"]):
        return cell
    kind = "up" if estimate["low"] > 0 else "down" if estimate["high"] < 0 else None
    return Markup('<b class="{}">{}</b>').format(kind, cell) if kind else cell


def _cell(text: str) -> Markup:
    mean, _, ends = text.partition(" ")
    return Markup("{}<small>{}</small>").format(mean, ends) if ends else Markup("{}").format(mean)


def _embedded(picture: Path | None) -> str | None:
    if picture is None or not picture.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")
