"""`python -m demo`: prompts routed one by one, drawn on both sides, and once more without a cloud.

Writes pictures/, contact-sheet.png and report.json beside this file; exits 1 with one sentence if
anything fails.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click
from PIL import Image
from tqdm import tqdm

from cloud_server.starter import starter_folder
from demo.server import DemoError, Server, cloud_server
from demo.sheet import Tile, contact_sheet
from edge_agent import (
    AgentError,
    CloudClient,
    Decision,
    EdgeAgent,
    Request,
    Result,
    Route,
    open_bundle,
    write_png,
)
from edge_agent.records import png_record, result_to_json
from edge_agent.types import Event, Step

HERE = Path(__file__).parent
PROMPTS = (
    "a cat",
    "a sunflower in the snow",
    "a red car on the beach",
    "a small castle at sunset",
    "a robot in space",
    "two yellow balloons under a blue sky",
    "a dog to the left of a house on grass",
    "a rocket above a moon in space",
    "a big elephant and a rabbit in the desert",
    "three pink tulips below a butterfly on grass",
    "two red apples to the left of a cat",
    "a train, a bus and a bicycle in the forest",
    "two red apples to the left of a cat and a house at night",
    "two turtles, a frog, a fish and a mushroom on the beach",
    "a lion, a horse, a pig, a dog and a cat in the snow",
)
DEADLINE_S = 120.0
COLOURS = {"edge": (46, 125, 90), "cloud": (58, 96, 190), "fallback": (190, 112, 16)}


@click.command("demo")
@click.option("--share", type=click.FloatRange(0, 1), default=0.5, show_default=True)
@click.option("--cascade", is_flag=True, help="Draw here first, and decide by the picture.")
@click.option("--seed", type=click.IntRange(min=0), default=7, show_default=True)
@click.option(
    "--starter",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of starter models; default: those shipped.",
)
def main(share: float, cascade: bool, seed: int, starter: Path | None) -> None:
    """Route prompts, draw them on the device and in the cloud, lose the cloud, draw on."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so servers are ended
    try:
        run(starter or starter_folder(), share, seed, cascade=cascade)
    except (AgentError, DemoError, OSError) as err:
        raise click.ClickException(str(err)) from err
    except KeyboardInterrupt:
        sys.exit(130)


def run(starter: Path, share: float, seed: int, *, cascade: bool = False) -> None:
    """Do the whole demonstration."""
    bundle = open_bundle(ensure_bundle(starter, HERE / "bundle"))
    pictures = HERE / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    with cloud_server(starter / "cloud", HERE / "cloud-server.log") as server:
        cloud = CloudClient(server.address)
        with closing(EdgeAgent(bundle, cloud=cloud, share=share, cascade=cascade)) as agent:
            agent.open()
            results = _draw_all(agent, seed)
            results.append(_draw_without_cloud(agent, server, results, seed))
    files = [_write(pictures, number, result) for number, result in enumerate(results, 1)]
    sheet = HERE / "contact-sheet.png"
    _sheet(results, share, cascade=cascade).save(sheet)
    report = HERE / "report.json"
    records = [result_to_json(r, f.relative_to(HERE)) for r, f in zip(results, files, strict=True)]
    report.write_text(json.dumps({"share": share, "seed": seed, "results": records}, indent=2))
    for written in (pictures, sheet, report):
        click.echo(f"wrote {written.relative_to(HERE.parent)}")


def ensure_bundle(starter: Path, bundle: Path) -> Path:
    """Export the starter models to `bundle` unless it was made of them as they are now."""
    manifest, source = bundle / "bundle.json", bundle.with_name("bundle-of.txt")
    if manifest.is_file() and source.is_file() and source.read_text() == str(starter.resolve()):
        newest = max(file.stat().st_mtime for file in starter.rglob("*") if file.is_file())
        if newest < manifest.stat().st_mtime:
            return bundle
    click.echo("Exporting the starter models for the device (once)")
    command = [sys.executable, "-m", "export", "--starter", str(starter), "-o", str(bundle)]
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
        raise DemoError("the export of the starter models failed, as said above")
    source.write_text(str(starter.resolve()))
    return bundle


def _draw_all(agent: EdgeAgent, seed: int) -> list[Result]:
    columns = [max(map(len, PROMPTS)), 5, 5, 34, 5, 6]
    click.echo(_row(columns, ("prompt", "route", "prs", "decided by", "drawn", "ms")))
    click.echo("  ".join("-" * width for width in columns))
    results = []
    with tqdm(total=len(PROMPTS), unit="picture", leave=False, disable=None) as bar:
        for prompt in PROMPTS:
            result = _draw(agent, Request(prompt, seed=seed, deadline_s=DEADLINE_S), bar)
            results.append(result)
            decision = result.decision
            cells = (
                prompt,
                decision.route.value,
                f"{decision.prs:.3f}",
                deciding_metrics(decision),
                result.drawn_on.value,
                f"{result.timings_ms['total']:.0f}",
            )
            bar.write(_row(columns, cells))
            bar.update()
    threshold, share = results[0].decision.threshold, results[0].decision.share
    sent = sum(result.decision.route is Route.CLOUD for result in results)
    click.echo(
        f"\nTo the cloud below prs {1 - threshold:.3f} (share {share:g}): {sent} of {len(results)}."
        " D beside a metric: above 0.5 the device is expected to do better there."
    )
    return results


def _draw(agent: EdgeAgent, request: Request, bar: tqdm) -> Result:
    def on_event(event: Event) -> None:
        if isinstance(event, Step):
            bar.set_postfix_str(f"step {event.index}/{event.total}")

    return agent.generate(request, on_event)


def _draw_without_cloud(
    agent: EdgeAgent, server: Server, results: Sequence[Result], seed: int
) -> Result:
    """Stop the server, then draw again the prompt that wanted the cloud most."""
    server.stop()
    hardest = max(results, key=lambda result: result.decision.score)
    request = Request(hardest.prompt, seed=seed, deadline_s=DEADLINE_S)
    if hardest.decision.route is not Route.CLOUD:  # the share was too small for any prompt
        request = replace(request, route=Route.CLOUD)
    result = agent.generate(request)
    if result.drawn_on is not Route.EDGE or not result.fallback_reason:
        raise DemoError("the server was stopped and yet the picture did not fall back")
    click.echo(
        f"\nThe server is stopped. '{result.prompt}' wants the {result.decision.route.value} and is"
        f" drawn on the device in {result.timings_ms['total']:.0f} ms, because\n"
        f"  {result.fallback_reason}\n"
    )
    return result


def deciding_metrics(decision: Decision, count: int = 2) -> str:
    """Return the metrics that spoke loudest for the side that was chosen."""
    sign = 1 if decision.route is Route.CLOUD else -1
    loudest = sorted(decision.metrics.items(), key=lambda item: sign * item[1])[:count]
    return ", ".join(f"{name} {value:.2f}" for name, value in loudest)


def _row(widths: Sequence[int], cells: Sequence[str]) -> str:
    right = (2, len(cells) - 1)  # numbers
    return "  ".join(
        cell.rjust(width) if i in right else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def _write(folder: Path, number: int, result: Result) -> Path:
    words = "-".join("".join(c if c.isalnum() else " " for c in result.prompt).split())
    side = "fallback" if result.fallback_from else result.drawn_on.value
    file = folder / f"{number:02d}-{words[:40].rstrip('-')}-{side}.png"
    write_png(file, result.picture.image, png_record(result))
    return file


def _sheet(results: Sequence[Result], share: float, *, cascade: bool) -> Image.Image:
    tiles = []
    for result in results:
        kind, label = (
            ("fallback", "device, cloud was gone")
            if result.fallback_from
            else ("edge", "device")
            if result.drawn_on is Route.EDGE
            else ("cloud", "cloud")
        )
        note = f"prs {result.decision.prs:.2f}"
        tiles.append(Tile(result.picture.image, result.prompt, label, COLOURS[kind], note))
    how = (
        "Drawn on the device first, and in the cloud where that picture fell short"
        if cascade
        else "Drawn on the device where it is good enough, in the cloud where that buys quality"
    )
    subtitle = f"{how} (share {share:g}); the last one after the cloud was stopped."
    return contact_sheet(tiles, "RouteT2I Edge", subtitle)


if __name__ == "__main__":
    main()
