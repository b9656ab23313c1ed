"""`cloud-server train-recognizer` and `evaluate-recognizer`: ICIIA trained once, and measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloud_server.errors import ModelError
from cloud_server.training.loop import Budget
from cloud_server.training.starter.scenes import FontMissing

if TYPE_CHECKING:
    from cloud_server.training.iciia.learn import Optimizer

FOLDER = click.Path(path_type=Path, file_okay=False)
_SHARED = (
    click.argument("source", metavar="emoji|omniglot|MANIFEST"),
    click.option(
        "--omniglot",
        type=FOLDER,
        default=Path("omniglot"),
        show_default=True,
        help="Folder of Omniglot's images_background_small1.zip and 2.",
    ),
    click.option(
        "--clients",
        help="Who counts as a client: subgroup or random for emoji, alphabet or drawer for "
        "omniglot; default: the first. A manifest says it itself.",
    ),
    click.option(
        "--work",
        type=FOLDER,
        default=Path("train/recognizer"),
        show_default=True,
        help="Folder of checkpoints and cached features; a killed run resumes from it.",
    ),
    click.option(
        "--layers", type=click.IntRange(1, 12), default=2, show_default=True, help="N of ICIIA."
    ),
    click.option(
        "--groups",
        type=click.IntRange(min=1),
        help="P of ICIIA-T; default: 256, or the most that the backbone's width allows.",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["sgd", "adamw"]),
        default="sgd",
        show_default=True,
        help="The paper's, or one that needs fewer epochs.",
    ),
    click.option(
        "--learning-rate",
        type=click.FloatRange(min=0, min_open=True),
        default=0.01,
        show_default=True,
    ),
    click.option(
        "--clients-at-once",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Whose batches make one step, side by side.",
    ),
    click.option(
        "--epochs",
        type=click.IntRange(min=1),
        default=100,
        show_default=True,
        help="With sgd at most: ten without a gain end it before.",
    ),
    click.option("--device", help="cpu, cuda or cuda:N; default: cuda where there is one."),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores."),
)


def _shared(command):  # type: ignore[no-untyped-def]  # click's decorators keep no type
    for add in reversed(_SHARED):
        command = add(command)
    return command


@click.command("train-recognizer")
@_shared
@click.option("-o", "--out", type=FOLDER, required=True, help="Folder of the finished recogniser.")
@click.option(
    "--backbone",
    help="A folder that timm saved or a name that it knows, trained on the same classes; "
    "default: a small one, trained here first.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=25.0,
    show_default=True,
    help="Time to train the small backbone.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Its training steps, instead of time.")
@click.option(
    "--form",
    type=click.Choice(["tiny", "base"]),
    default="tiny",
    show_default=True,
    help="ICIIA-T with 256 groups, or the most that the width allows, or ICIIA-B with one.",
)
@click.option(
    "--heterogeneity",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Share of a client's pictures that are its own; the others are dealt at random.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def train_recognizer(
    source: str,
    omniglot: Path,
    clients: str | None,
    work: Path,
    layers: int,
    groups: int | None,
    optimizer: Optimizer,
    learning_rate: float,
    clients_at_once: int,
    epochs: int,
    device: str | None,
    threads: int | None,
    out: Path,
    backbone: str | None,
    minutes: float,
    steps: int | None,
    form: str,
    heterogeneity: float,
    seed: int,
) -> None:
    """Train a recogniser on the pictures of many clients: once, for all of them.

    The pictures are those of a MANIFEST, a CSV of image,label,client,split beside its image
    folder, or of one of two worlds that need no labels of yours: emoji, or omniglot.
    """
    from cloud_server.training.iciia.learn import Schedule
    from cloud_server.training.iciia.train import Plan, train

    budget = Budget(steps=steps) if steps else Budget(minutes=minutes)
    with _one_sentence():
        plan = Plan(
            source=source,
            omniglot=omniglot,
            clients=clients,
            work=work,
            layers=layers,
            groups=groups,
            schedule=Schedule(optimizer, learning_rate, clients_at_once, epochs=epochs),
            device=_device(device, threads),
            backbone=backbone,
            backbone_budget=budget,
            form=form,
            heterogeneity=heterogeneity,
            seed=seed,
        )
        for line in train(plan, out):
            click.echo(line, err=True)
    click.echo(out)


@click.command("evaluate-recognizer")
@_shared
@click.option(
    "--recognizer",
    type=FOLDER,
    required=True,
    help="Folder that train-recognizer wrote; its backbone is the one that all is measured on.",
)
@click.option(
    "--seeds", type=click.IntRange(1, 20), default=3, show_default=True, help="Trainings of each."
)
@click.option(
    "--sweep", is_flag=True, help="Other numbers of layers and of groups too: many more trainings."
)
@click.option(
    "-o", "--out", type=FOLDER, required=True, help="Folder for report.json and report.html."
)
def evaluate_recognizer(
    source: str,
    omniglot: Path,
    clients: str | None,
    work: Path,
    layers: int,
    groups: int | None,
    optimizer: Optimizer,
    learning_rate: float,
    clients_at_once: int,
    epochs: int,
    device: str | None,
    threads: int | None,
    recognizer: Path,
    seeds: int,
    sweep: bool,
    out: Path,
) -> None:
    """Measure ICIIA beside its baselines and ablations, each trained here with several seeds.

    The backbone stays the recogniser's. What was trained is kept in --work, and a second run
    takes it from there.
    """
    from cloud_server.training.iciia.evaluate import Subject, evaluate
    from cloud_server.training.iciia.learn import Schedule
    from cloud_server.training.iciia.recognizer import Recognizer
    from cloud_server.training.iciia.report import page
    from cloud_server.training.iciia.train import cohort_with

    chosen = _device(device, threads)
    with _one_sentence():
        model = Recognizer.load(recognizer)
        cohort = cohort_with(model.backbone, source, omniglot, clients, work, chosen)
        subject = Subject(
            cohort=cohort,
            classifier=model.backbone.classifier,
            layers=layers,
            groups=groups,
            schedule=Schedule(optimizer, learning_rate, clients_at_once, epochs=epochs),
            seeds=tuple(range(seeds)),
            work=work,
            sweep=sweep,
        )
        report = evaluate(subject, lambda what: click.echo(what, err=True))
    name = f"{Path(source).stem}, clients by {clients}" if clients else Path(source).stem
    command = (
        f"cloud-server evaluate-recognizer {source} --recognizer {recognizer} --layers {layers} "
        f"--optimizer {optimizer} --learning-rate {learning_rate:g} "
        f"--clients-at-once {clients_at_once} --epochs {epochs} --seeds {seeds}"
        + (f" --groups {groups}" if groups else "")
        + (f" --clients {clients}" if clients else "")
        + (" --sweep" if sweep else "")
    )
    report = {"title": name, "command": command, **report}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.html").write_text(page(report), encoding="utf-8")
    click.echo(out / "report.html")


def _device(device: str | None, threads: int | None) -> str:
    import torch

    if threads:
        torch.set_num_threads(threads)
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except (FontMissing, ModelError) as err:
        raise click.ClickException(str(err)) from err
