"""`cloud-server label`: what the two models of a router are worth on its owner's prompts."""

from __future__ import annotations

from pathlib import Path

import click

from cloud_server.console import check_writable, debug_option, device_option, one_sentence
from cloud_server.errors import ConfigError, DataError, ModelError
from cloud_server.starter import starter_folder
from cloud_server.training.labels.table import Labels, write
from cloud_server.training.quality import ALIGNMENT_WEIGHT, DISTRACTORS

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command("label")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("labels.parquet"),
    show_default=True,
    help="The file of labels.",
)
@click.option(
    "--prompts", "file", type=_FILE, help="One prompt a line; of .csv and .tsv, column `prompt`."
)
@click.option(
    "--starter-prompts",
    type=click.IntRange(min=2),
    help="Label this many captions of the starter world, instead of --prompts.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Draws the captions of --starter-prompts, and the prompts that alignment compares with.",
)
@click.option("--edge", help="Diffusers folder or hub id.  [default: the starter's]")
@click.option("--cloud", help="Diffusers folder or hub id.  [default: the starter's]")
@click.option("--cloud-address", help="HOST:PORT of a cloud-server that draws in its place.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Pictures of every prompt by either model.",
)
@click.option(
    "--edge-seeds",
    type=click.IntRange(min=1),
    help="Pictures of every prompt by the edge, where more: that makes labels less noisy.",
)
@click.option("--clip", help="Open_clip folder or name that judges.  [default: the starter's]")
@click.option("--pretrained", help="Weights that go with a name in --clip.")
@click.option("--metrics", type=_FILE, help="TOML file of metrics.  [default: the ten]")
@click.option(
    "--alignment",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=ALIGNMENT_WEIGHT,
    show_default=True,
    help="Weight of whether a picture shows its prompt, beside the metrics' 1 - WEIGHT; 0: off.",
)
@click.option(
    "--distractors",
    type=click.IntRange(min=0),
    default=DISTRACTORS,
    show_default=True,
    help="Other prompts that alignment compares with; 0: the cosine of picture and prompt.",
)
@click.option(
    "--work",
    type=_FOLDER,
    help="Folder of the scores so far; a killed run resumes from it.  [default: OUT.work]",
)
@click.option(
    "--pictures", type=_FOLDER, help="Keep pictures in this folder, and reuse what is in it."
)
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes, each with models of its own.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="CPU threads of one worker.",
)
@device_option
@click.option("--ray", is_flag=True, help="Spread the workers over a Ray cluster.")
@debug_option
def label_command(
    out: Path,
    file: Path | None,
    starter_prompts: int | None,
    seed: int,
    edge: str | None,
    cloud: str | None,
    cloud_address: str | None,
    seeds: int,
    edge_seeds: int | None,
    clip: str | None,
    pretrained: str | None,
    metrics: Path | None,
    alignment: float,
    distractors: int,
    work: Path | None,
    pictures: Path | None,
    batch: int,
    workers: int,
    threads: int,
    device: str,
    ray: bool,
    debug: bool,
) -> None:
    """Draw prompts with an edge and a cloud model and score every picture, into one Parquet file.

    A run that was killed goes on where it stopped when it is started again.
    """
    with one_sentence(debug=debug):
        if cloud and cloud_address:
            raise ConfigError("--cloud and --cloud-address are both given; choose one")
        if edge_seeds is not None and edge_seeds < seeds:
            raise ConfigError(
                f"--edge-seeds {edge_seeds} is below --seeds {seeds}; give more or leave it out"
            )
        prompts = _prompts(file, starter_prompts, seed)
        if not out.parent.is_dir():
            raise DataError(f"the folder {out.parent} does not exist; create it or change --out")
        work = work or out.with_name(out.name + ".work")
        check_writable(out.parent, work)

        import torch

        from cloud_server.engine import pick_device
        from cloud_server.training.labels.label import label
        from cloud_server.training.labels.painters import KeptPainter, Painter, PipelinePainter
        from cloud_server.training.labels.remote import RemotePainter
        from cloud_server.training.labels.work import here, in_processes
        from cloud_server.training.quality import Alignment, Clip, QualityScorer, load_metrics

        torch.set_num_threads(threads)
        where = pick_device(device)
        scorer = QualityScorer(
            Clip(clip or _starter("clip"), pretrained, where),
            load_metrics(metrics),
            Alignment(alignment, tuple(prompts), distractors, seed) if alignment else None,
        )
        first: Painter = PipelinePainter(edge or _starter("edge"), where)
        second: Painter = (
            RemotePainter(cloud_address)
            if cloud_address
            else PipelinePainter(cloud or _starter("cloud"), where)
        )
        if isinstance(second, RemotePainter):
            second.check(prompts)  # before the edge draws for hours
        if pictures:
            first, second = KeptPainter(first, pictures), KeptPainter(second, pictures)
        spread = here if workers == 1 else in_processes(workers, threads)
        if ray:
            from cloud_server.training.labels.on_ray import on_ray

            spread = on_ray(workers, threads, gpus=float(where.startswith("cuda")))
        labels = label(
            first,
            second,
            scorer,
            prompts,
            range(seeds),
            work,
            edge_seeds=None if edge_seeds is None else range(edge_seeds),
            batch=batch,
            spread=spread,
        )
        write(labels, out)
        _report(labels)
        click.echo(out)


def _prompts(file: Path | None, starter: int | None, seed: int) -> list[str]:
    from cloud_server.training.labels.prompts import read_prompts, sample_prompts

    if (file is None) == (starter is None):
        raise ConfigError("give either --prompts FILE or --starter-prompts NUMBER")
    if file is not None:
        return read_prompts(file)
    return [prompt.text for prompt in sample_prompts(starter or 0, seed)]


def _starter(name: str) -> str:
    try:
        return str(starter_folder() / name)
    except FileNotFoundError as error:
        raise ModelError(str(error)) from error


def _report(labels: Labels) -> None:
    """Say on stderr, by metric, the means and on how many prompts the cloud is ahead."""
    click.echo(f"{'metric':<14}{'edge':>8}{'cloud':>8}   cloud ahead", err=True)
    for name, edge, cloud in zip(labels.metrics, *labels.mean.transpose(0, 2, 1), strict=True):
        ahead = f"{(cloud > edge).mean():.0%} of {len(labels.prompts)} prompts"
        click.echo(f"{name:<14}{edge.mean():>8.3f}{cloud.mean():>8.3f}   {ahead}", err=True)
