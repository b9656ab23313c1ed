"""The numbers of an evaluation as Markdown, for people and for the card of the models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from cloud_server.training.starter.evaluate import OBJECTS, Report
from cloud_server.training.starter.reading import MEASURES

MARKERS: Final = ("<!-- numbers -->", "<!-- /numbers -->")
_PLACE: Final = re.compile(".*?".join(map(re.escape, MARKERS)), re.DOTALL)
DRAWN: Final = {
    "truth": "true pictures",
    "decoded": "the same through the autoencoder",
    "edge": "edge",
    "cloud": "cloud",
}
PRS: Final = {"looks": "the ten looks", "router": "with alignment"}
WRONG: Final = {
    "any": "one thing wrong",
    "relation": "relation turned round",
    "colour": "colours exchanged",
}


def card(report: Report) -> str:
    """Return a report of `evaluate` as Markdown tables; in brackets are 95 % intervals."""
    clip, models = report["clip"], report["models"]
    wrong = clip["wrong_preferred"]
    general = [
        ["autoencoder, PSNR in dB", _number(report["autoencoder"]["psnr"], "{:.1f}")],
        ["CLIP, a picture's own caption nearest among 256, %", _percent(clip["retrieval"])],
        *([f"CLIP, wrong caption preferred: {what}, %", _percent(wrong[kind])] for kind, what in
          WRONG.items()),
        *([f"{name}, parameters of the UNet in millions", f"{count / 1e6:.1f}"]
          for name, count in models["parameters"].items()),
        *([f"{name}, seconds a picture in batches on {report['device']}", f"{seconds:.3f}"]
          for name, seconds in report["seconds"].items()),
        ["all files, MB", f"{models['megabytes']:.0f}"],
    ]  # fmt: skip
    columns = [*map(str, OBJECTS), "all"]
    by_count = {what: report["right"][name] for name, what in DRAWN.items()}
    by_count["cloud minus edge"] = report["gain"]
    right = [
        [f"{measure}: {what}", *(_percent(measures[measure][k]) for k in columns)]
        for measure in MEASURES
        for what, measures in by_count.items()
    ]
    better = [
        [what, *(_percent(report["cloud_better"][kind][k]) for k in columns)]
        for kind, what in PRS.items()
    ]
    sides = ["unseen", "seen", "difference"]
    unseen = [
        [f"{measure}: {DRAWN[name]}", *(_percent(measures[measure][side]) for side in sides)]
        for measure in MEASURES
        if measure != "places"  # which are in no pairing
        for name, measures in report["unseen"].items()
    ]
    metrics = [
        [name, _number(clip["auroc"][name]), _number(clip["order"][name])] for name in clip["auroc"]
    ]
    names = [name for name in clip["auroc"] if name != "mean"]
    across = [
        [spoilt, *(f"{clip['across'][spoilt][name]['mean']:.2f}" for name in names)]
        for spoilt in names
    ]
    return "\n".join(
        [
            f"`{report['command']}`; edge {models['edge']}, cloud {models['cloud']}, CLIP "
            f"{models['clip']}, judge {models['judge']}. In brackets are 95 % intervals.\n",
            _table(["what", "number"], general),
            f"What the judge finds right, in % of what {report['pictures']} captions a column ask "
            "for, by the number of objects:\n",
            _table(["what", *columns], right),
            "How often the cloud's picture is better than the edge's by PRS, in % of "
            f"{report['compared']} other captions a column:\n",
            _table(["by", *columns], better),
            f"What the judge finds right, in % of {len(OBJECTS) * report['pictures']} scenes with "
            "a pairing that training never saw, and of as many of the same form without one:\n",
            _table(["what", *sides], unseen),
            "Each quality metric on its own degradation: AUROC at strength 0.5, and minus the rank "
            "correlation of a picture's score with strength:\n",
            _table(["metric", "AUROC", "order"], metrics),
            "Does each metric measure its own thing? AUROC of every metric (columns) at strength "
            "0.5 of every degradation (rows, named by the metric that each is made for):\n",
            _table(["spoilt", *names], across),
        ]
    ).rstrip()


def has_place(text: str) -> bool:
    """Return whether a card has the marks between which its numbers stand."""
    return _PLACE.search(text) is not None


def rewrite(text: str, numbers: str) -> str:
    """Return a card with `numbers` between its marks."""
    return _PLACE.sub(lambda _: f"{MARKERS[0]}\n{numbers}\n{MARKERS[1]}", text, count=1)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(estimate: dict[str, Any] | None, form: str = "{:z.2f}", scale: float = 1.0) -> str:
    if estimate is None:
        return ""
    mean, low, high = (form.format(scale * estimate[key]) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _percent(estimate: dict[str, Any] | None) -> str:
    return _number(estimate, "{:z.0f}", 100.0)
