"""`python -m export`: the bundle that `edge-agent` opens, from models in their usual formats."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from cloud_server.starter import starter_folder
from edge_agent.bundle import default_path
from export.errors import ExportError
from export.quiet import quiet
from export.sources import open_pipeline, open_router

if TYPE_CHECKING:
    from export.build import Row, Stage

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command("export", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--starter", type=FOLDER, help="Folder of starter models; default: those shipped.")
@click.option("--edge-model", metavar="ID_OR_DIR", help="Diffusers pipeline the device draws with.")
@click.option("--clip", type=FOLDER, help="open_clip folder that the router reads prompts with.")
@click.option("--router", type=FOLDER, help="Folder of the trained routing network.")
@click.option(
    "--recognizer", type=FOLDER, help="Folder of a recogniser that train-recognizer wrote."
)
@click.option("--precision", type=click.Choice(["fp32"]), default="fp32", show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    envvar="EDGE_AGENT_BUNDLE",
    help="The bundle's folder; default: EDGE_AGENT_BUNDLE, else in the user's data folder.",
)
@click.option("--force", is_flag=True, help="Make every component again.")
@click.option("--quiet", "silent", is_flag=True, help="No progress bar and no table.")
@click.option("--debug", is_flag=True, help="Show the whole traceback of an error.")
def main(
    starter: Path | None,
    edge_model: str | None,
    clip: Path | None,
    router: Path | None,
    recognizer: Path | None,
    precision: str,
    output: Path | None,
    force: bool,
    silent: bool,
    debug: bool,
) -> None:
    """Write the bundle that edge-agent opens, and print its folder.

    Without options the starter models are exported. Components whose source has not changed are
    kept, and an export that was stopped goes on where it was.
    """
    try:
        path, rows = _export(
            starter, edge_model, clip, router, recognizer, precision, output, force, silent
        )
    except Exception as err:
        if debug:
            traceback.print_exc()
        if isinstance(err, ExportError):
            raise click.ClickException(str(err)) from err
        if isinstance(err, ModuleNotFoundError):
            raise click.ClickException(
                f"exporting needs the package {err.name!r}, which is not installed; run "
                "pip install -c constraints.txt 'routet2i-edge[export]'"
            ) from err
        raise click.ClickException(
            f"the export failed unexpectedly ({type(err).__name__}: {err}); run it with --debug "
            "and report what it prints"
        ) from err
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on from here", err=True)
        sys.exit(130)
    if not silent:
        click.echo(table(rows), err=True)
    click.echo(path)


def _export(
    starter: Path | None,
    edge_model: str | None,
    clip: Path | None,
    router: Path | None,
    recognizer: Path | None,
    precision: str,
    output: Path | None,
    force: bool,
    silent: bool,
) -> tuple[Path, Sequence[Row]]:
    if edge_model and router and not starter:
        pipeline = open_pipeline(edge_model)
    else:
        starter = starter or _starter()
        clip, router = clip or starter / "clip", router or starter / "router"
        pipeline = (
            open_pipeline(edge_model)
            if edge_model
            else open_pipeline(str(starter / "edge"), name="starter-edge")
        )
    network = open_router(router)
    with tqdm(
        desc="load models",
        bar_format="{desc:<30} {bar:30} {elapsed}",
        disable=True if silent else None,
        leave=False,
    ) as bar:

        def show(stage: Stage) -> None:
            bar.total, bar.n = stage.total, stage.index
            bar.set_description_str(f"{stage.name} {stage.component}")

        with quiet():
            # Imported late: torch and diffusers take seconds, and a wrong folder should not.
            from export.build import Job, export_bundle
            from export.recognizer import open_recognizer

            job = Job(
                pipeline=pipeline,
                router=network,
                out=output or default_path(),
                clip=clip,
                recognizer=open_recognizer(recognizer) if recognizer else None,
                precision=precision,
                fresh=force,
            )
            return export_bundle(job, show)


def _starter() -> Path:
    try:
        return starter_folder()
    except FileNotFoundError as err:
        raise ExportError(str(err)) from err


def table(rows: Sequence[Row]) -> str:
    """Return the closing table: component, file, MB, parity with torch, seconds."""
    lines = [("component", "file", "MB", "parity", "seconds")]
    for row in rows:
        part = row.component
        parity = (
            f"{part.parity.value:.1f} dB"
            if part.parity.metric == "psnr_db"
            else f"{part.parity.metric} {part.parity.value:.6f}"
        )
        seconds = "kept" if row.kept else f"{row.seconds:.1f}"
        lines.append((part.name, part.file, f"{part.size_bytes / 1e6:.1f}", parity, seconds))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = (
        "  ".join(
            cell.rjust(width) if i in (2, 4) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)
