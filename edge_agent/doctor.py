"""What holds on this machine: bundle, networks, cloud, settings and where each came from."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from edge_agent.bundle import Bundle, Loss, open_bundle
from edge_agent.config import OPTIONS, Settings
from edge_agent.errors import AgentError
from edge_agent.routing.critic import critic_of

Note = Callable[[str], None]


def examine(settings: Settings, measure: Note | None = None) -> dict[str, Any]:
    """Look at everything a picture needs and return it as one JSON object; raises nothing of ours.

    Asks the cloud for its health only where an address is set and `offline` is not. With `measure`
    every provider runs every network first, and the results are told to it, a line each.
    """
    bundle = _bundle(settings, measure)
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
        "runtime": _runtime(settings),
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
        f"device      {runtime['device']}; what was compiled and measured is in {runtime['cache']}",
    ]
    if runtime["conflict"]:
        lines.append(f"            {runtime['conflict']}")
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
                f"{parity['metric']} {parity['value']:.5g} (gate {parity['gate']:g})"
            )
            lines += _where(part)
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


def _where(part: dict[str, Any]) -> list[str]:
    """Lay out where a network runs, and what was measured of it."""
    if "provider" not in part:
        return []
    lines = [f"      {part['provider']}, {part['reason']}: {part['runs_on']}"]
    for provider, each in part["measured"].items():
        lines.append(f"        {provider:<14} {_measured(each)}")
    return lines


def _runtime(settings: Settings) -> dict[str, Any]:
    from edge_agent.runtime import providers
    from edge_agent.runtime.memory import peak_rss
    from edge_agent.runtime.plan import cache_folder

    return {
        "installed": providers.installed(),
        "conflict": providers.conflict(),
        "available_providers": [one.value for one in providers.available()],
        "device": providers.device_of(settings.provider),
        "cache": str(cache_folder()),
        "peak_rss_bytes": peak_rss(),
    }


def _bundle(settings: Settings, measure: Note | None) -> dict[str, Any]:
    found = {"path": str(settings.bundle), "source": settings.sources["bundle"]}
    try:
        bundle = open_bundle(settings.bundle)
        if measure is not None:
            _measure(bundle, settings.threads, measure)
        if settings.cascade:
            critic_of(bundle)
        return {**found, "ok": True, **_contents(bundle, settings)}
    except AgentError as err:
        return {**found, "ok": False, "error": str(err)}


def _measure(bundle: Bundle, threads: int | None, note: Note) -> None:
    from edge_agent.measure import measure
    from edge_agent.runtime.plan import Measured
    from edge_agent.types import Provider

    def tell(name: str, provider: Provider, found: Measured) -> None:
        note(f"{name} on {provider}: {_measured(asdict(found))}")

    measure(bundle, threads, tell)


def _measured(found: dict[str, Any]) -> str:
    if found["error"] is not None:
        return f"failed: {found['error']}"
    told = "" if found["seconds"] is None else f"{1e3 * found['seconds']:.1f} ms, "
    return f"{told}{found['psnr_db']:.0f} dB from the CPU"


def _contents(bundle: Bundle, settings: Settings) -> dict[str, Any]:
    from edge_agent.diffusion.samplers import make_sampler, sampler_name
    from edge_agent.runtime.session import default_threads

    make_sampler(bundle.diffusion.scheduler, bundle.diffusion.steps)
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
        "components": _components(bundle, settings),
    }


def _components(bundle: Bundle, settings: Settings) -> list[dict[str, Any]]:
    """Open the networks as for a picture and say of each what it is and what runs it."""
    from edge_agent.edge import Edge
    from edge_agent.runtime.networks import Networks
    from edge_agent.runtime.plan import candidates

    networks = Networks(
        bundle, provider=settings.provider, memory=settings.memory, threads=settings.threads
    )
    edge = Edge(networks)
    try:
        edge.open(drawing=True)
        # Do their answers fit what the bundle says of them?
        decision, encoded = edge.router(0.0).decide("a")
        if settings.cascade:
            from PIL import Image

            grey = Image.new("RGB", (64, 64), "grey")
            edge.critic(0.0).judge(grey, "a", encoded, decision.metrics)
        for each in networks.known:  # with --memory low one at a time, and only now
            each.open()
    finally:
        edge.close()
    known = {one.part.name: one for one in networks.known}
    backends = {name: str(backend) for name, backend in edge.backends.items()}
    found = []
    for part in bundle.components.values():
        entry = {
            "name": part.name,
            "file": part.file,
            "size_bytes": part.size_bytes,
            "precision": part.precision,
            "opset": part.opset,
            "optimized": part.optimized,
            "parity": asdict(part.parity),
            "loss": asdict(part.loss) if part.loss else None,
        }
        if one := known.get(part.name):
            measured = networks.plan.measured(part, candidates(one.precise))
            entry |= {
                "provider": one.choice.provider.value,
                "reason": one.choice.reason,
                "runs_on": backends.get(part.name, "compiled at the first picture of a size"),
                "measured": {provider: asdict(each) for provider, each in measured.items()},
            }
        found.append(entry)
    return found


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
    from edge_agent.routing.budget.ledger import Ledger, Limits

    try:
        Limits(settings.budget_pictures, settings.budget_cost, settings.cloud_cost)
        if not settings.ledger.exists():
            return {"status": f"nothing spent yet, no ledger at {settings.ledger}"}
        spent = Ledger(settings.ledger).spent()
    except AgentError as err:
        return {"status": str(err)}
    except OSError as err:
        return {"status": f"the ledger {settings.ledger} cannot be read ({err.strerror})"}
    limits = {"pictures": settings.budget_pictures, "cost": settings.budget_cost}
    left = " and ".join(f"{limit} {what}" for what, limit in limits.items() if limit is not None)
    return {
        "status": f"cloud pictures on {spent.day}: {spent.pictures}, for {spent.cost}, "
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
