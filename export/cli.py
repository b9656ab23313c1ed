"""`python -m export`: the bundle that `edge-agent` opens, from models in their usual formats."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from cloud_server.starter import starter_folder
from edge_agent.bundle import default_path, open_bundle
from edge_agent.prompt import MAX_STEPS
from export.errors import ExportError
from export.precision import Precisions
from export.quiet import quiet
from export.sources import (
    Pipeline,
    RouterFolder,
    open_lora,
    open_pipeline,
    open_router,
    with_preview,
    with_vae,
)
from export.table import aligned

if TYPE_CHECKING:
    from export.build import Row, Stage

FOLDER = click.Path(path_type=Path, file_okay=False)


class Precision(click.ParamType):
    """`int8`, or `text_encoder=int8,denoiser=fp16`."""

    name = "precision"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Precisions:
        """Read it, or say what it may be."""
        try:
            return Precisions.parse(value)
        except ValueError as err:
            self.fail(str(err), param, ctx)


@click.command("export", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--starter", type=FOLDER, help="Folder of starter models; default: those shipped.")
@click.option("--edge-model", metavar="ID_OR_DIR", help="Diffusers pipeline the device draws with.")
@click.option("--vae", metavar="ID_OR_DIR", help="Autoencoder to decode with, such as TAESD.")
@click.option("--preview-vae", metavar="ID_OR_DIR", help="Small autoencoder to preview with.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="DIR[:SCALE]",
    help="LoRA merged into the edge model; may be given several times.",
)
@click.option(
    "--text-encoder",
    "--clip",
    metavar="ID_OR_DIR",
    help="What the router reads prompts with, as for train-router; default: the pipeline's own.",
)
@click.option("--router", type=FOLDER, help="Folder of the trained routing network.")
@click.option(
    "--critic",
    metavar="NAME_OR_DIR",
    help="CLIP that looks at pictures in a cascade: the one that made the router's labels, as a "
    "folder or MODEL/PRETRAINED of open_clip; default: the starter's, with its router.",
)
@click.option("--steps", type=click.IntRange(1, MAX_STEPS), help="Default number of steps.")
@click.option("--guidance", type=click.FloatRange(0), help="Default guidance.")
@click.option(
    "--recognizer", type=FOLDER, help="Folder of a recogniser that train-recognizer wrote."
)
@click.option(
    "--precision",
    type=Precision(),
    metavar="NAME|COMPONENT=NAME,...",
    default="fp32",
    show_default=True,
    help="fp32, fp16 (GPUs), w8a8 (OpenVINO), int8 or int4: for all that can have it, or for each.",
)
@click.option("--accept-loss", is_flag=True, help="Write the bundle whatever the precision costs.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Prompts to measure loss on, one a line; default: 1,000 of the starter's world.",
)
@click.option(
    "--pictures",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Pictures to measure loss on, drawn at every precision.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Also try every component at every precision; table, and sensitivity.json in the bundle.",
)
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
    vae: str | None,
    preview_vae: str | None,
    loras: tuple[str, ...],
    text_encoder: str | None,
    router: Path | None,
    critic: str | None,
    steps: int | None,
    guidance: float | None,
    recognizer: Path | None,
    precision: Precisions,
    accept_loss: bool,
    prompts: Path | None,
    pictures: int,
    sensitivity: bool,
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
        pipeline, text_encoder, network, critic = _sources(
            starter, edge_model, text_encoder, router, critic
        )
        pipeline = pipeline if vae is None else with_vae(pipeline, vae)
        pipeline = pipeline if preview_vae is None else with_preview(pipeline, preview_vae)
        pipeline = replace(pipeline, steps=steps, guidance=guidance)
        pipeline.drawing()  # what it cannot draw by is said before any work
        path, rows = _export(
            silent,
            recognizer,
            critic,
            pipeline=pipeline,
            router=network,
            out=output or default_path(),
            text_encoder=text_encoder,
            loras=[open_lora(each) for each in loras],
            precision=precision,
            accept_loss=accept_loss,
            prompts=_read_prompts(prompts) if prompts else (),
            pictures=pictures,
            sensitivity=sensitivity,
            fresh=force,
        )
    except Exception as err:
        if debug:
            traceback.print_exc()
        if isinstance(err, ExportError):
            raise click.ClickException(str(err)) from err
        if isinstance(err, ModuleNotFoundError):
            raise click.ClickException(
                f"exporting needs the package {err.name!r}, which is not installed; in a clone of "
                "the project run pip install -c constraints.txt '.[export]'"
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
        if sum(row.component.loss is not None for row in rows) > 1:
            loss = open_bundle(path, verify=False).loss
            click.echo(f"together lower precision costs {loss}", err=True)
        if sensitivity:
            from export.sensitivity import read_trials, trial_table

            click.echo("\n" + trial_table(read_trials(path)), err=True)
    click.echo(path)


def _sources(
    starter: Path | None,
    edge_model: str | None,
    text_encoder: str | None,
    router: Path | None,
    critic: str | None,
) -> tuple[Pipeline, str | None, RouterFolder, str | None]:
    """Find what is exported: whatever is not named is the starter's."""
    own = router is None
    if router is None:
        starter = starter or _starter()
        router, text_encoder = starter / "router", text_encoder or str(starter / "edge")
    if edge_model:
        pipeline = open_pipeline(edge_model)
    else:
        pipeline = open_pipeline(f"{starter or _starter()}/edge", name="starter-edge")
    network = open_router(router)
    known = network.spec.get("critic")
    if own and critic is None and known:
        critic = f"{starter}/clip"
    if critic is None and known:
        click.echo(
            f"the router's critic is left out, so there will be no cascade; pass --critic with the "
            f"CLIP '{known['clip']['name']}' that it looks through",
            err=True,
        )
    return pipeline, text_encoder, network, critic


def _export(
    silent: bool, recognizer: Path | None, critic: str | None, **job: Any
) -> tuple[Path, Sequence[Row]]:
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
            from export.critic import open_critic
            from export.recognizer import open_recognizer

            known = open_recognizer(recognizer) if recognizer else None
            looks = open_critic(critic, job["router"]) if critic else None
            return export_bundle(
                Job(critic=looks, recognizer=known, **job),
                show,
                lambda said: tqdm.write(said, sys.stderr),
            )


def _read_prompts(file: Path) -> list[str]:
    from cloud_server.errors import DataError
    from cloud_server.training.labels.prompts import read_prompts
    from edge_agent.errors import ConfigError
    from edge_agent.prompt import check_prompt

    try:
        prompts = read_prompts(file)
        for prompt in prompts:
            check_prompt(prompt)
    except (DataError, ConfigError) as err:
        raise ExportError(str(err)) from err
    return prompts


def _starter() -> Path:
    try:
        return starter_folder()
    except FileNotFoundError as err:
        raise ExportError(str(err)) from err


def table(rows: Sequence[Row]) -> str:
    """Return the closing table: component, precision, MB, parity with torch, loss, seconds."""
    lines = [("component", "precision", "MB", "parity", "loss", "seconds")]
    for row in rows:
        part = row.component
        parity = (
            f"{part.parity.value:.1f} dB"
            if part.parity.metric == "psnr_db"
            else f"{part.parity.metric} {part.parity.value:.6f}"
        )
        seconds = "kept" if row.kept else f"{row.seconds:.1f}"
        size = f"{part.size_bytes / 1e6:.1f}"
        lines.append((part.name, part.precision, size, parity, str(part.loss or "-"), seconds))
    return aligned(lines, right={2, 5})
