"""What holds on this machine: bundle, networks, cloud, settings and where each came from."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

from edge_agent.bundle import Bundle, Loss, open_bundle
from edge_agent.config import OPTIONS, Settings
from edge_agent.errors import AgentError

_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-directml",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)


def examine(settings: Settings) -> dict[str, Any]:
    """Look at everything a picture needs and return it as one JSON object; raises nothing of ours.

    Asks the cloud for its health only where an address is set and `offline` is not.
    """
    bundle = _bundle(settings)
    effective = {
        name: {"value": _plain(getattr(settings, name)), "source": settings.sources[name]}
        for name in OPTIONS
    }
    for source, defaults in bundle.get("defaults", {}).items():
        for name, value in defaults.items():
            if effective[name]["value"] is None:
                effective[name] = {"value": value, "source": source}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "runtime": _runtime(),
        "bundle": bundle,
        "cloud": _cloud(settings),
        "budget": _budget(settings),
        "settings": effective,
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """Lay the report out for a person."""
    runtime, bundle, cloud = report["runtime"], report["bundle"], report["cloud"]
    lines = [
        f"python      {report['python']} on {report['platform']}",
        f"runtime     {', '.join(runtime['installed'])}; "
        f"providers {', '.join(runtime['available_providers'])}",
    ]
    if len(runtime["installed"]) > 1:
        lines.append("            several builds of onnxruntime break each other; keep one of them")
    lines.append(f"bundle      {bundle['path']} (from {bundle['source']})")
    if not bundle["ok"]:
        lines.append(f"            {bundle['error']}")
    else:
        lines.append(
            f"            format {bundle['format']}, by {bundle['created_by']} at "
            f"{bundle['created_at']}, draws with {bundle['model']}"
        )
        for part in bundle["components"]:
            parity = part["parity"]
            lines.append(
                f"  {part['name']:<24} {part['size_bytes'] / 1e6:7.2f} MB  {part['precision']}  "
                f"{parity['metric']} {parity['value']:.5g} (gate {parity['gate']:g})  "
                f"runs on {', '.join(part['providers'])}"
            )
            if part["loss"]:
                lines.append(f"    {part['precision']} costs {Loss(**part['loss'])}")
        if sum(part["loss"] is not None for part in bundle["components"]) > 1:
            lines.append(f"  together lower precision costs {Loss(**bundle['loss'])}")
    lines.append(f"cloud       {cloud['status']}")
    lines.append(f"budget      {report['budget']['status']}")
    lines.append("settings")
    for name, entry in report["settings"].items():
        value = "-" if entry["value"] is None else entry["value"]
        lines.append(f"  {name:<16} {value!s:<24} from {entry['source']}")
    return lines


def _runtime() -> dict[str, Any]:
    from edge_agent.runtime.session import runtime_facts

    installed = []
    for name in _RUNTIMES:
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return {"installed": installed, **runtime_facts()}


def _bundle(settings: Settings) -> dict[str, Any]:
    found = {"path": str(settings.bundle), "source": settings.sources["bundle"]}
    try:
        bundle = open_bundle(settings.bundle)
        return {**found, "ok": True, **_contents(bundle, settings.threads)}
    except AgentError as err:
        return {**found, "ok": False, "error": str(err)}


def _contents(bundle: Bundle, threads: int | None) -> dict[str, Any]:
    from edge_agent.agent import EdgeAgent
    from edge_agent.diffusion.samplers import make_sampler, sampler_name
    from edge_agent.runtime.session import default_threads

    make_sampler(bundle.diffusion.scheduler, bundle.diffusion.steps)
    with EdgeAgent(bundle, offline=True, threads=threads) as agent:
        agent.open()
        providers = dict(agent.providers)
    return {
        "format": bundle.format,
        "created_by": bundle.created_by,
        "created_at": bundle.created_at,
        "model": bundle.diffusion.model,
        "scheduler": bundle.diffusion.scheduler.get("_class_name"),
        "loss": asdict(bundle.loss) if bundle.loss else None,
        "defaults": {
            "the bundle": {
                "share": bundle.router.default_share,
                "size": f"{bundle.diffusion.width}x{bundle.diffusion.height}",
                "steps": bundle.diffusion.steps,
                "guidance": bundle.diffusion.guidance,
                "sampler": sampler_name(bundle.diffusion.scheduler).value,
            },
            "this machine": {"threads": default_threads()},
        },
        "components": [
            {
                "name": part.name,
                "file": part.file,
                "size_bytes": part.size_bytes,
                "precision": part.precision,
                "loss": asdict(part.loss) if part.loss else None,
                "opset": part.opset,
                "optimized": part.optimized,
                "parity": {
                    "metric": part.parity.metric,
                    "value": part.parity.value,
                    "gate": part.parity.gate,
                },
                "providers": providers.get(part.name, []),
            }
            for part in bundle.components.values()
        ],
    }


def _cloud(settings: Settings) -> dict[str, Any]:
    if settings.offline:
        return {"status": "not asked: offline", "healthy": None}
    if settings.cloud is None:
        return {"status": "none; give its address with --cloud HOST:PORT", "healthy": None}
    from edge_agent.cloud.client import CloudClient

    with CloudClient(settings.cloud) as client:
        try:
            capabilities = client.capabilities()
            healthy = client.healthy()
        except AgentError as err:
            return {"status": str(err), "healthy": False}
    models = [model.name for model in capabilities.models]
    state = "ready" if healthy else "not ready"
    return {
        "status": f"{settings.cloud} is {state}, version {capabilities.version}, "
        f"draws with {', '.join(models)}",
        "healthy": healthy,
        "version": capabilities.version,
        "models": models,
    }


def _budget(settings: Settings) -> dict[str, Any]:
    """Look into the ledger; one that nobody has used yet is not made."""
    if not settings.ledger.exists():
        return {"status": f"nothing spent yet, no ledger at {settings.ledger}"}
    from edge_agent.routing.budget.ledger import Ledger

    try:
        spent = Ledger(settings.ledger).spent()
    except AgentError as err:
        return {"status": str(err)}
    limits = {"pictures": settings.budget_pictures, "cost": settings.budget_cost}
    left = " and ".join(f"{limit} {what}" for what, limit in limits.items() if limit is not None)
    return {
        "status": f"{spent.pictures} pictures for {spent.cost} spent on {spent.day}, "
        f"{spent.unsure} of them without an answer; limit a day: {left or 'none'}",
        "day": spent.day.isoformat(),
        "pictures": spent.pictures,
        "cost": str(spent.cost),
        "unsure": spent.unsure,
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
