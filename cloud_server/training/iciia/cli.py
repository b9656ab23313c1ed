"""`cloud-server train-recognizer` and `evaluate-recognizer`: ICIIA trained once, and measured."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cloud_server.console import check_writable, given_command, one_sentence
from cloud_server.training.iciia.options import Setup, setup_options
from cloud_server.training.loop import Budget

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command("train-recognizer")
@setup_options
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
    setup: Setup,
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
    from cloud_server.training.iciia.train import Plan, train

    budget = Budget(steps=steps) if steps else Budget(minutes=minutes)
    with one_sentence(debug=setup.debug):
        check_writable(out, setup.work)
        plan = Plan(
            source=setup.source,
            omniglot=setup.omniglot,
            clients=setup.clients,
            work=setup.work,
            layers=setup.layers,
            groups=setup.groups,
            dropout=setup.dropout,
            schedule=setup.schedule(),
            device=setup.open_device(),
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
@setup_options
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
@click.option("--brief", is_flag=True, help="ICIIA-T alone: no baselines and no ablations.")
@click.option(
    "-o", "--out", type=FOLDER, required=True, help="Folder for report.json and report.html."
)
def evaluate_recognizer(
    setup: Setup, recognizer: Path, seeds: int, sweep: bool, brief: bool, out: Path
) -> None:
    """Measure ICIIA beside its baselines and ablations, each trained here with several seeds.

    The backbone stays the recogniser's. What was trained is kept in --work, and a second run
    takes it from there.
    """
    from cloud_server.training.iciia.evaluate import Subject, evaluate
    from cloud_server.training.iciia.recognizer import Recognizer
    from cloud_server.training.iciia.report import page
    from cloud_server.training.iciia.train import cohort_with

    with one_sentence(debug=setup.debug):
        device = setup.open_device()
        check_writable(out, setup.work)
        model = Recognizer.load(recognizer)
        tiny = setup.tiny(model.backbone.width, len(model.classes))
        cohort = cohort_with(
            model.backbone, setup.source, setup.omniglot, setup.clients, setup.work, device
        )
        subject = Subject(
            cohort=cohort,
            classifier=model.backbone.classifier,
            tiny=tiny,
            schedule=setup.schedule(),
            seeds=tuple(range(seeds)),
            work=setup.work,
            sweep=sweep,
            brief=brief,
        )
        report = evaluate(subject, lambda what: click.echo(what, err=True))
        name = Path(setup.source).stem + (f", clients by {setup.clients}" if setup.clients else "")
        report = {"title": name, "command": given_command(), **report}
        text = json.dumps(report, indent=1, allow_nan=False)
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(text + "\n", encoding="utf-8")
        (out / "report.html").write_text(page(report), encoding="utf-8")
    click.echo(out / "report.html")
