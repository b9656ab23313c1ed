"""`cloud-server train-router`: a router for the owner's own pair of models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloud_server.console import DEVICES, Device, one_sentence
from cloud_server.errors import ConfigError, ModelError
from cloud_server.starter import starter_folder

if TYPE_CHECKING:
    from cloud_server.training.router_folder import Material

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_COUNT = click.IntRange(min=1)


@click.command("train-router")
@click.option("--labels", type=_FILE, help="What cloud-server label wrote.")
@click.option(
    "--scores",
    type=_FILE,
    help="Or a CSV table of ratings: prompt, model, metric and score, from 0 to 1.",
)
@click.option("--edge-model", help="The model of --scores that draws on the device.")
@click.option("--cloud-model", help="The model of --scores that draws in the cloud.")
@click.option(
    "--metric", "metrics", multiple=True, help="A metric of --scores; may be repeated.  [all]"
)
@click.option(
    "--text-encoder",
    metavar="ID_OR_DIR",
    help="What reads prompts, in Hugging Face or open_clip format.  [the starter models']",
)
@click.option(
    "--calibration", type=_FILE, help="More prompts, a line each, to set the threshold by."
)
@click.option(
    "-o", "--out", type=_FOLDER, default=Path("router"), show_default=True, help="The router."
)
@click.option("--work", type=_FOLDER, help="Folder of the training's state.  [OUT.work]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--predictor",
    type=click.Choice(["auto", "gated", "linear"]),
    default="auto",
    show_default=True,
    help="The paper's, a linear one, or what cross-validation finds better.",
)
@click.option("--single-gate", is_flag=True, help="Ablation: no negative gate.")
@click.option("--all-tokens", is_flag=True, help="Ablation: no token selection.")
@click.option("--single-metric", is_flag=True, help="Ablation: one head, on PRS.")
@click.option("--top-k", type=_COUNT, default=4, show_default=True, help="Tokens an expert picks.")
@click.option("--hidden", type=_COUNT, default=192, show_default=True, help="Width of an expert.")
@click.option("--low-rank", type=_COUNT, default=32, show_default=True, help="Rank of an expert.")
@click.option(
    "--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True
)
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="Time to train at most."
)
@click.option("--steps", type=_COUNT, help="Steps of a fit at most.")
@click.option("--device", type=Device(), default="auto", show_default=True, help=str(DEVICES))
@click.option("--threads", type=_COUNT, help="CPU threads.  [torch's]")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def train_router_command(
    labels: Path | None,
    scores: Path | None,
    edge_model: str | None,
    cloud_model: str | None,
    metrics: tuple[str, ...],
    text_encoder: str | None,
    calibration: Path | None,
    out: Path,
    work: Path | None,
    seed: int,
    predictor: str,
    single_gate: bool,
    all_tokens: bool,
    single_metric: bool,
    top_k: int,
    hidden: int,
    low_rank: int,
    dropout: float,
    minutes: float | None,
    steps: int | None,
    device: str,
    threads: int | None,
    debug: bool,
) -> None:
    """Learn from labels, or a table of ratings, which prompts gain by the cloud.

    Prints what was measured on held-out prompts, and the router's folder, which python -m export
    takes as --router. A run that was killed goes on where it stopped when it is started again.
    """
    with one_sentence(debug=debug):
        if predictor != "gated" and (single_gate or all_tokens or single_metric):
            raise ConfigError(
                f"the ablations are of the gated predictor, not of {predictor}; "
                "add --predictor gated"
            )
        source = text_encoder or starter_encoder()

        import torch

        from cloud_server.engine import pick_device
        from cloud_server.training.encoders import open_encoder
        from cloud_server.training.loop import Budget
        from cloud_server.training.router import Settings
        from cloud_server.training.router_folder import report, train_router

        if threads:
            torch.set_num_threads(threads)
        material = open_material(labels, scores, edge_model, cloud_model, metrics, calibration)
        settings = Settings(
            predictor, hidden, low_rank, top_k, dropout, single_gate, all_tokens, single_metric
        )
        trained = train_router(
            material,
            open_encoder(source),
            out,
            work or out.with_name(out.name + ".work"),
            Budget(steps=steps, minutes=minutes or (None if steps else 30.0)),
            seed,
            pick_device(device),
            settings,
        )
        click.echo(report(trained, material), err=True)
        click.echo(out)


def open_material(
    labels_file: Path | None,
    scores_file: Path | None,
    edge_model: str | None,
    cloud_model: str | None,
    metrics: tuple[str, ...],
    calibration: Path | None,
) -> Material:
    """Read what is to be learnt from: labels, or two models of a table of scores.

    Raises ConfigError unless exactly one of the two is named, and DataError for bad files.
    """
    from cloud_server.training.labels import read_for_training, read_prompts
    from cloud_server.training.router_folder import Material

    if (labels_file is None) == (scores_file is None):
        raise ConfigError("give either --labels FILE or --scores FILE")
    fresh = read_prompts(calibration) if calibration else []
    if labels_file is not None:
        if edge_model or cloud_model or metrics:
            raise ConfigError(
                "--edge-model, --cloud-model and --metric choose from --scores; labels are of one "
                "pair already"
            )
        return _fresh_only(Material(read_for_training(labels_file), fresh))
    assert scores_file is not None
    if not (edge_model and cloud_model):
        raise ConfigError("--scores needs --edge-model and --cloud-model, two of its models")

    from cloud_server.training.scores import read_scores

    scores = read_scores(scores_file)
    pair = scores.pair(edge_model, cloud_model, metrics)
    if left_out := len(scores.prompts) - len(pair.prompts):
        click.echo(
            f"{left_out} of {len(scores.prompts)} prompts lack a rating of {edge_model} or "
            f"{cloud_model} and are left out",
            err=True,
        )
    return _fresh_only(Material(pair, fresh, scores.related(pair, edge_model, cloud_model)))


def _fresh_only(material: Material) -> Material:
    """Drop calibration prompts that are labelled: the predictor may know their answers."""
    known = set(material.labels.prompts)
    fresh = [prompt for prompt in material.calibration if prompt not in known]
    if material.calibration and not fresh:
        raise ConfigError(
            "every prompt of --calibration is labelled already; pass others, or leave it out"
        )
    return replace(material, calibration=fresh)


def starter_encoder() -> Path:
    """Return the folder whose text encoder reads prompts where none is named; raises ModelError."""
    try:
        return starter_folder() / "edge"
    except FileNotFoundError as error:
        raise ModelError(f"{error}, or pass --text-encoder") from error
