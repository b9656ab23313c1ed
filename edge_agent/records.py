"""Decisions and results as JSON objects: for `--json`, the demo's report and a picture's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.types import Decision, Result

if TYPE_CHECKING:
    from edge_agent.recognition.recognizer import Label

Tags = Sequence["Label"] | None  # what is seen in a picture; None where nobody looks


def decision_to_json(
    prompt: str, decision: Decision, timings_ms: Mapping[str, float]
) -> dict[str, Any]:
    """Return a decision as `edge-agent route --json` prints it."""
    return {
        "prompt": prompt,
        **_decision(decision),
        "timings_ms": _rounded(timings_ms, 3),
    }


def result_to_json(result: Result, file: Path | None = None, tags: Tags = None) -> dict[str, Any]:
    """Return a result, with the path of its picture, as `edge-agent generate --json` prints it."""
    picture = result.picture
    return {
        "request_id": result.request_id,
        "file": None if file is None else str(file),
        **_settings(result),
        "decision": _decision(result.decision),
        "drawn_on": result.drawn_on.value,
        "fallback_from": None if result.fallback_from is None else result.fallback_from.value,
        "fallback_reason": result.fallback_reason,
        "models": dict(result.models),
        "backends": dict(result.backends),
        "timings_ms": _rounded(result.timings_ms, 3),
        "drawing_ms": _rounded(picture.timings_ms, 3),
        "peak_rss_bytes": result.peak_rss,
        **_tags(tags),
    }


def png_record(result: Result, tags: Tags = None) -> dict[str, Any]:
    """Return what a picture says of itself.

    Times and request ids are left out, so that one request drawn twice gives equal files.
    """
    return {
        "software": "routet2i-edge",
        **_settings(result),
        "decision": _decision(result.decision),
        "drawn_on": result.drawn_on.value,
        "fallback_from": None if result.fallback_from is None else result.fallback_from.value,
        "models": dict(result.models),
        "backends": dict(result.backends),
        **_tags(tags),
    }


def _tags(tags: Tags) -> dict[str, Any]:
    if tags is None:
        return {}
    return {"tags": [{"name": t.name, "probability": round(t.probability, 4)} for t in tags]}


def _settings(result: Result) -> dict[str, Any]:
    picture = result.picture
    return {
        "prompt": result.prompt,
        "negative_prompt": result.negative_prompt,
        "seed": picture.seed,
        "width": picture.width,
        "height": picture.height,
        "steps": picture.steps,
        "guidance": picture.guidance,
        "sampler": None if picture.sampler is None else picture.sampler.value,
        "model": picture.model,
    }


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "route": decision.route.value,
        "prs": round(decision.prs, 6),
        "score": round(decision.score, 6),
        "threshold": round(decision.threshold, 6),
        "share": decision.share,
        "reason": decision.reason,
        "metrics": _rounded(decision.metrics, 6),
        "ignored_tokens": decision.ignored_tokens,
        **({"quality": _rounded(decision.quality, 6)} if decision.quality else {}),
    }


def _rounded(values: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}
