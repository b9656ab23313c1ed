"""`cloud-server train-starter` and `evaluate-starter`: the starter models made and measured."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from cloud_server.console import (
    check_writable,
    debug_option,
    device_option,
    one_sentence,
    threads_option,
)
from cloud_server.errors import ServerError
from cloud_server.training.loop import Budget

# On two idle cores; one run of exactly this was not seen, see models/starter/CARD.md.
DEFAULT_MINUTES = {
    "judge": 45.0, "clip": 45.0, "autoencoder": 45.0, "cloud": 240.0, "edge": 120.0,
    "distil": 120.0, "decoder": 30.0, "router": 3.0,
}  # fmt: skip
STAGES = ("scenes", "tokenizer", *DEFAULT_MINUTES)
CLIP_WEIGHTS = "open_clip_model.safetensors"


@click.command("train-starter")
@click.argument("stages", nargs=-1, type=click.Choice(STAGES))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models/starter"),
    show_default=True,
    help="Folder of the finished models.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("train"),
    show_default=True,
    help="Folder of checkpoints, caches and sample sheets; a killed run resumes from it.",
)
@click.option(
    "--eyes",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models/recognizer/emoji/backbone"),
    show_default=True,
    help="Folder of the recogniser's backbone that the stage decoder compares pictures by.",
)
@click.option(
    "--start",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of a trained model of its kind that the stage cloud or edge goes on from.",
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Minutes per stage.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps per stage.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@device_option
@threads_option
@debug_option
def train_starter(
    stages: tuple[str, ...],
    out: Path,
    work: Path,
    eyes: Path,
    start: Path | None,
    minutes: float | None,
    steps: int | None,
    seed: int,
    device: str,
    threads: int | None,
    debug: bool,
) -> None:
    """Train the STAGES (all, in order, when none is named) of the starter models.

    Each stage needs the ones before it, except that edge and cloud do not need each other. The
    judge is needed by none: it only evaluates, and goes to WORK/judge.
    """
    with one_sentence(debug=debug):
        import torch

        from cloud_server.engine import pick_device

        if threads:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high")
        chosen = pick_device(device)
        if "decoder" in (stages or STAGES) and not (eyes / "config.json").is_file():
            raise click.ClickException(  # now, and not after hours of the stages before it
                f"stage decoder needs a recogniser's backbone, and {eyes} holds none; train one "
                "with cloud-server train-recognizer emoji, or name its folder with --eyes"
            )
        if start:
            _check_start(start, stages)
        with _alone_in(work):
            for stage in STAGES:
                if stages and stage not in stages:
                    continue
                default = None if steps else DEFAULT_MINUTES.get(stage, 1.0)
                budget = Budget(steps=steps, minutes=minutes or default)
                _check_earlier_stages(stage, out, work, start)
                click.echo(f"{stage}: on {chosen}, seed {seed}", err=True)
                run_stage(stage, out, work, eyes, start, budget, seed, chosen)


@contextmanager
def _alone_in(work: Path) -> Iterator[None]:
    """Hold the folder of states; raises ServerError where another training has it."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServerError(
                f"another training is writing in {work}; wait for it or choose another --work"
            ) from error
        yield


def _check_start(start: Path, stages: tuple[str, ...]) -> None:
    if stages not in (("cloud",), ("edge",)):
        raise click.UsageError(
            f"--start is for one stage, cloud or edge, not for {', '.join(stages) or 'all'}; "
            "name that stage alone"
        )
    for part in ("unet", "vae"):
        if not (start / part / "config.json").is_file():
            raise click.ClickException(
                f"--start {start} holds no {part}/config.json; name a model's folder, such as "
                f"models/starter/{stages[0]}"
            )
    from cloud_server.training.starter.diffusion import SIZES

    unet = json.loads((start / "unet" / "config.json").read_text(encoding="utf-8"))
    widths, wanted = tuple(unet.get("block_out_channels", ())), SIZES[stages[0]].channels
    if widths != wanted:
        raise click.UsageError(
            f"--start {start} is a UNet of {widths} channels, not one of {wanted} as stage "
            f"{stages[0]} trains; name a model of its kind"
        )


def _check_earlier_stages(stage: str, out: Path, work: Path, start: Path | None) -> None:
    diffusion = {"clip": out / "clip" / CLIP_WEIGHTS}
    if not start:  # which brings its own
        diffusion["autoencoder"] = work / "autoencoder"
    needed = {
        "clip": {"tokenizer": out / "clip" / "tokenizer.json"},
        "cloud": diffusion,
        "edge": diffusion,
        "distil": {"edge": work / "edge", "cloud": out / "cloud"},
        "decoder": {"distil": out / "edge"},
        "router": {"distil": out / "edge", "cloud": out / "cloud"},
    }
    for earlier, path in needed.get(stage, {}).items():
        if not path.exists():
            raise click.ClickException(
                f"stage {stage} needs {path}, which stage {earlier} writes; "
                f"run cloud-server train-starter {earlier} first, with the same --out and --work"
            )


def run_stage(
    stage: str,
    out: Path,
    work: Path,
    eyes: Path,
    start: Path | None,
    budget: Budget,
    seed: int,
    device: str,
) -> None:
    """Run one stage; raises FontMissing where scenes are drawn without their font."""
    from cloud_server.training.starter.autoencoder import train_autoencoder
    from cloud_server.training.starter.clip import train_clip
    from cloud_server.training.starter.decoder import tune_decoder
    from cloud_server.training.starter.diffusion import distil, train_diffusion
    from cloud_server.training.starter.judge import train_judge
    from cloud_server.training.starter.router import train_starter_router
    from cloud_server.training.starter.scenes import write_sheet
    from cloud_server.training.starter.tokenizer import train_tokenizer

    match stage:
        case "scenes":
            write_sheet(work / "scenes.png", seed)
        case "tokenizer":
            train_tokenizer(out / "clip", seed)
        case "judge":
            train_judge(work / "judge", work, budget, seed, device)
        case "clip":
            train_clip(out / "clip", work, budget, seed, device)
        case "autoencoder":
            train_autoencoder(work / "autoencoder", work, budget, seed, device)
        case "edge" | "cloud":
            train_diffusion(stage, out, work, budget, seed, device, start)
        case "distil":
            distil(out, work, budget, seed, device)
        case "decoder":
            tune_decoder(out, eyes, work, budget, seed, device)
        case "router":
            train_starter_router(out, out / "router", work, budget, seed, device)


@click.command("evaluate-starter")
@click.option(
    "--models",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models/starter"),
    show_default=True,
    help="Folder of the models.",
)
@click.option(
    "--judge",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models/judge"),
    show_default=True,
    help="Folder of the judge, which train-starter writes to WORK/judge.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1000, show_default=True)
@device_option
@click.option(
    "--pictures",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Pictures of each kind for every number of objects; each model draws 15 times as many.",
)
@click.option(
    "--compared",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Pictures for every number of objects by which edge and cloud are compared.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Write the numbers as JSON to a file, or to - for stdout, instead of tables.",
)
@click.option(
    "--card",
    "card_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Markdown file; the numbers between its marks are replaced.",
)
@debug_option
def evaluate_starter(
    models: Path,
    judge: Path,
    seed: int,
    device: str,
    pictures: int,
    compared: int,
    json_file: Path | None,
    card_file: Path | None,
    debug: bool,
) -> None:
    """Measure the starter models on fresh scenes, each number with a 95 % interval."""
    with one_sentence(debug=debug):
        from cloud_server.engine import pick_device
        from cloud_server.training.starter.card import MARKERS, card, has_place, rewrite
        from cloud_server.training.starter.evaluate import evaluate

        chosen = pick_device(device)
        command = (
            f"cloud-server evaluate-starter --models {models} --judge {judge} --seed {seed} "
            f"--device {chosen} --pictures {pictures} --compared {compared}"
        )
        check_writable(*(file.parent for file in (json_file, card_file) if file))
        if card_file and not has_place(_text_of(card_file)):
            raise click.ClickException(
                f"{card_file} has no place for the numbers; add the lines {' and '.join(MARKERS)}"
            )
        report = {"command": command, **evaluate(models, judge, seed, chosen, pictures, compared)}
    numbers = card(report)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    if json_file is None:
        click.echo(numbers)
    elif str(json_file) == "-":
        click.echo(text, nl=False)
    else:
        json_file.write_text(text, encoding="utf-8")
    if card_file:  # as it is now: somebody may have written in it meanwhile
        card_file.write_text(rewrite(_text_of(card_file), numbers), encoding="utf-8")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise click.ClickException(f"{file} is not UTF-8 ({error}); convert it") from error
