"""The numbers of an evaluation on one page: tables and curves, nothing to fetch."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;"
    "border-bottom:1px solid #ccc}td:first-child,th:first-child{text-align:left}"
    "svg{max-width:100%;height:auto}"
)


def page(report: Mapping[str, Any]) -> str:
    """Return the HTML page of a report of `evaluate-recognizer`."""
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    cost = ", ".join(f"{key.replace('_', ' ')} {v:,}" for key, v in report["cost"].items())
    return (
        f"<!doctype html><meta charset=utf-8><title>ICIIA</title><style>{_STYLE}</style>"
        f"<h1>ICIIA: {html.escape(report['title'])}</h1>"
        "<p>Accuracy on the test split in per cent: the mean over seeds and its standard error. "
        "Clients' pictures are named 16 at a time, each with the others for context.</p>"
        f"{_table(report['accuracy'])}"
        "<h2>Pictures of history, clients as alike as real life makes them</h2>"
        f"{_curves(report['history'], 'earlier pictures of the client')}"
        "<h2>Heterogeneity of clients, 15 pictures of history</h2>"
        f"{_curves(report['heterogeneity'], '0: all clients alike, 1: as they are')}"
        f"{_sweep(report.get('sweep', {}))}"
        f"<h2>Cost of ICIIA-T</h2><p>{html.escape(cost)}</p>"
        f"<h2>Settings</h2><p>{html.escape(settings)}</p>"
        f"<p><code>{html.escape(report['command'])}</code></p>\n"
    )


def _table(accuracy: Mapping[str, Any]) -> str:
    base = accuracy["backbone"]["mean"]
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{shown(value)}<td>{value['mean'] - base:+.2f}"
        for name, value in accuracy.items()
    )
    return f"<table><tr><th>method<th>accuracy<th>over the backbone{rows}</table>"


def _sweep(curves: Mapping[str, Any]) -> str:
    if not curves:
        return ""
    head = "<h2>Layers N and groups P, pictures 16 at a time</h2>"
    return head + _drawn(curves, "groups P", scale="log") + _points(curves)


def _points(curves: Mapping[str, Any]) -> str:
    heads = list(next(iter(curves.values())))
    rows = "".join(
        f"<tr><td>{html.escape(name)}"
        + "".join(f"<td>{shown(curve[k]) if k in curve else ''}" for k in heads)
        for name, curve in curves.items()
    )
    return "<table><tr><th>" + "".join(f"<th>{k}" for k in heads) + rows + "</table>"


def shown(value: Mapping[str, Any]) -> str:
    """Return a mean with its standard error."""
    error = "" if value["error"] is None else f" ± {value['error']:.2f}"
    return f"{value['mean']:.2f}{error}"


def _curves(curves: Mapping[str, Any], axis: str) -> str:
    return _drawn(curves, axis) + _points(curves) if curves else "<p>No client has enough.</p>"


def _drawn(curves: Mapping[str, Any], axis: str, scale: str = "linear") -> str:
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        places = [float(k) for k in curve]
        means = [value["mean"] for value in curve.values()]
        errors = [value["error"] or 0.0 for value in curve.values()]
        axes.errorbar(places, means, errors, label=name, marker=".", capsize=2, linewidth=1.2)
    axes.set(xlabel=axis, ylabel="accuracy, %", xscale=scale)
    if scale == "log":
        ticks = sorted({float(k) for curve in curves.values() for k in curve})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
