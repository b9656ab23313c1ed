"""`cloud-server train-router`: a router for the owner's own pair of models."""

from __future__ import annotations

from pathlib import Path

import click

from cloud_server.console import (
    check_writable,
    debug_option,
    device_option,
    one_sentence,
    threads_option,
)
from cloud_server.errors import ConfigError
from cloud_server.training.router_source import Source, source_options

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_COUNT = click.IntRange(min=1)


@click.command("train-router")
@source_options
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
    type=click.Choice(["auto", "gated", "linear", "mixed"]),
    default="auto",
    show_default=True,
    help="The paper's, a linear one, both mixed, or which of the last two suits better.",
)
@click.option("--single-gate", is_flag=True, help="Ablation: no negative gate.")
@click.option("--all-tokens", is_flag=True, help="Ablation: no token selection.")
@click.option("--single-metric", is_flag=True, help="Ablation: one head, on PRS.")
@click.option("--top-k", type=_COUNT, default=8, show_default=True, help="Tokens an expert picks.")
@click.option("--hidden", type=_COUNT, default=192, show_default=True, help="Width of an expert.")
@click.option("--low-rank", type=_COUNT, default=32, show_default=True, help="Rank of an expert.")
@click.option(
    "--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Minutes of training at most, of all networks together.",
)
@click.option("--steps", type=_COUNT, help="Steps of one network at most.")
@device_option
@threads_option
@debug_option
def train_router_command(
    source: Source,
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
        named = source.encoder()

        import torch

        from cloud_server.engine import pick_device
        from cloud_server.training.encoders import open_encoder
        from cloud_server.training.loop import Budget
        from cloud_server.training.router import Settings
        from cloud_server.training.router_folder import check_replaceable, report, train_router

        if threads:
            torch.set_num_threads(threads)
        out = out.resolve()
        work = work or out.with_name(out.name + ".work")
        check_replaceable(out)
        check_writable(out.parent, work)
        material = source.material(calibration)
        settings = Settings(
            predictor, hidden, low_rank, top_k, dropout, single_gate, all_tokens, single_metric
        )
        trained = train_router(
            material,
            open_encoder(named),
            out,
            work,
            Budget(steps=steps, minutes=minutes or (None if steps else 30.0)),
            seed,
            pick_device(device),
            settings,
        )
        click.echo(report(trained, material), err=True)
        click.echo(out)
