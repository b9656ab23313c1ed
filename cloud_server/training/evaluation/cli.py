"""`cloud-server evaluate-router`: what a router is worth, as one JSON file and one page."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloud_server.console import (
    check_writable,
    debug_option,
    device_option,
    given_command,
    one_sentence,
    threads_option,
)
from cloud_server.errors import ConfigError, DataError
from cloud_server.training.router_source import Source, source_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cloud_server.training.evaluation.pictures import Kept
    from cloud_server.training.evaluation.splits import Plan
    from cloud_server.training.labels import Labels

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_THERE = click.Path(path_type=Path, file_okay=False, exists=True)
_NEW_FILE = click.Path(path_type=Path, dir_okay=False)
_COUNT = click.IntRange(min=1)
_VERSIONS = ("routet2i-edge", "numpy", "torch", "scikit-learn")


@click.command("evaluate-router")
@source_options
@click.option("--router", type=_THERE, help="Evaluate this router instead of training ours.")
@click.option("-o", "--out", type=_NEW_FILE, help="Write a page of tables and figures (HTML).")
@click.option("--json", "json_file", type=_NEW_FILE, help="Write all numbers as JSON.")
@click.option(
    "--held-out",
    type=_COUNT,
    help="Prompts kept from training, to judge by; default: a third, of 1,500 prompts or more.",
)
@click.option(
    "--seeds", type=_COUNT, default=3, show_default=True, help="Trainings with --held-out."
)
@click.option(
    "--folds",
    type=click.IntRange(min=2),
    help="Folds of cross-validation over prompts, where none are held out; default: 5.",
)
@click.option(
    "--repeats", type=_COUNT, default=5, show_default=True, help="Repeats of cross-validation."
)
@click.option("--pictures", type=_THERE, help="Folder of pictures that label --pictures kept.")
@click.option(
    "--judge",
    type=_THERE,
    help="Network that judges --pictures a second time, and prompts with pictures alone; starter "
    "world.",
)
@click.option(
    "--judge-scores", type=_FILE, help="Labels of the same prompts by a second judge, instead."
)
@click.option(
    "--predictor",
    type=click.Choice(["auto", "gated", "linear", "mixed"]),
    default="auto",
    show_default=True,
    help="As in train-router.",
)
@click.option(
    "--ablations/--no-ablations",
    default=None,
    help="Also train without each idea of the paper; default: with --held-out and several metrics.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Minutes of one training at most; default: 30.",
)
@click.option("--steps", type=_COUNT, help="Steps of one network at most.")
@click.option(
    "--work",
    type=_FOLDER,
    default=Path("train"),
    show_default=True,
    help="Folder of checkpoints; a killed run resumes from it.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@device_option
@threads_option
@debug_option
def evaluate_router_command(
    source: Source,
    router: Path | None,
    out: Path | None,
    json_file: Path | None,
    held_out: int | None,
    seeds: int,
    folds: int | None,
    repeats: int,
    pictures: Path | None,
    judge: Path | None,
    judge_scores: Path | None,
    predictor: str,
    ablations: bool | None,
    minutes: float | None,
    steps: int | None,
    work: Path,
    seed: int,
    device: str,
    threads: int | None,
    debug: bool,
) -> None:
    """Measure a router beside simpler ways to choose, with intervals, on prompts it never saw.

    Prints the verdict, and writes all numbers with --json, and a page of tables and figures with
    --out. Prompts that are judged are kept from every training, near-duplicates with them.
    """
    with one_sentence(debug=debug):
        _check(out, json_file, held_out, folds, judge, judge_scores, pictures)
        check_writable(work, *(file.parent for file in (out, json_file) if file))

        import torch

        from cloud_server.engine import pick_device
        from cloud_server.training.encoders import open_encoder
        from cloud_server.training.evaluation.evaluate import evaluate
        from cloud_server.training.evaluation.learned import Given, Network, kinds_said
        from cloud_server.training.evaluation.methods import all_methods
        from cloud_server.training.evaluation.nouns import count_nouns
        from cloud_server.training.evaluation.truth import Case
        from cloud_server.training.loop import Budget
        from cloud_server.training.router import Settings
        from cloud_server.training.router import check as check_labels

        if threads:
            torch.set_num_threads(threads)
        where = pick_device(device)
        material = source.material()
        known = material.labels
        check_labels(known)
        fresh = _never_seen_by(router, known) if router else None
        kept = _kept(known, pictures)
        plan = _plan(known, held_out, seeds, folds, repeats, seed, fresh, kept if judge else None)
        features = open_encoder(source.encoder()).encode(known.prompts, where)
        kinds: list[str] = []
        network = Network(
            "ours",
            "ours",
            features,
            known,
            known.weights,
            Settings(predictor),
            work,
            Budget(steps=steps, minutes=minutes or (None if steps else 30.0)),
            where,
            material.related,
            kinds,
        )
        nouns, counted = count_nouns(known.prompts)
        case = Case(
            known,
            known.weights,
            _model_names(known),
            nouns,
            counted,
            *_judged(known, plan, judge, judge_scores, kept, where),
        )
        several = len(known.metrics) > 1
        wanted = (several and len(plan.runs[0]) == 1) if ablations is None else ablations
        report = evaluate(
            case,
            plan,
            all_methods(case, network, Given(router, features, where) if router else network),
            network.ablations() if wanted and not router else [],
            # A router that is given may know the judged prompts, which no critic trained here does.
            router=None if router else network,
            seed=seed,
            progress=lambda name: click.echo(f"{name} ...", err=True),
        )
        report |= {
            "command": given_command(),
            "versions": {"python": platform.python_version(), **{k: version(k) for k in _VERSIONS}},
            "given_router": bool(router),
            "predictors": kinds_said(kinds),
            "judge": _judge_said(judge, judge_scores),
        }
        if router and fresh is None:
            report["verdict"]["sentences"].append(
                "Whether this router learnt from these very prompts is not known; if it did, it "
                "looks better here than it is."
            )
        _write(report, kept, known, out, json_file)
        click.echo("\n".join(report["verdict"]["sentences"]))


def _check(
    out: Path | None,
    json_file: Path | None,
    held_out: int | None,
    folds: int | None,
    judge: Path | None,
    judge_scores: Path | None,
    pictures: Path | None,
) -> None:
    """Raise ConfigError for options that do not go together, before anything is loaded."""
    if held_out and folds:
        raise ConfigError("--held-out and --folds are both given; choose one way to split")
    if judge and judge_scores:
        raise ConfigError("--judge and --judge-scores are both given; choose one")
    if judge and not pictures:
        raise ConfigError("--judge reads pictures; pass the folder that label --pictures filled")
    for file in (out, json_file):
        if file and not file.parent.is_dir():
            raise ConfigError(
                f"the folder {file.parent} does not exist; create it or change {file}"
            )


def _never_seen_by(router: Path, labels: Labels) -> NDArray[np.int64] | None:
    """Return which prompts (ascending) a router was not trained on, None where nobody knows."""
    from cloud_server.training.evaluation.learned import facts_of
    from cloud_server.training.router_folder import held_out_by

    return held_out_by(facts_of(router), labels)


def _plan(
    labels: Labels,
    judged: int | None,
    seeds: int,
    folds: int | None,
    repeats: int,
    seed: int,
    fresh: NDArray[np.int64] | None,
    shown: Kept | None,
) -> Plan:
    """Return which prompts are judged; of a given router those, if known, that are fresh to it.

    With `shown` only those whose pictures are there, so that a second judge can read them; if none
    are, all, and that judge will say what it lacks.
    """
    import numpy as np

    from cloud_server.training.evaluation.splits import SMALL, cross_validation, held_out, these

    # A prompt that lacks pictures which others have is too noisy to judge by.
    among = np.flatnonzero(labels.drawn.all((0, 2)))
    if shown is not None:
        kept = [row for row in among if shown.whole(int(row), labels.seeds)]
        among = np.array(kept) if kept else among
    if fresh is not None:
        among = np.intersect1d(among, fresh)
        if judged or folds:
            raise ConfigError(
                f"this router is judged on the {len(among)} prompts that its training held out; "
                "leave --held-out and --folds away"
            )
    if len(among) < 2:
        raise DataError(
            "no two prompts of these labels have every seed by both models, so none can be judged; "
            "pass the file with most seeds alone, or label some with as many seeds of both"
        )
    if fresh is not None:
        return these(labels.prompts, among, 1, seed)
    if judged or (len(among) >= SMALL and not folds):
        return held_out(labels.prompts, judged or len(among) // 3, seeds, seed, among)
    return cross_validation(labels.prompts, folds or 5, repeats, seed, among)


def _models(labels: Labels) -> list[dict[str, Any]]:
    known: dict[str, dict[str, Any]] = labels.origin.get("models", {})
    return [known.get(side, {}) for side in ("edge", "cloud")]


def _model_names(labels: Labels) -> tuple[str, str]:
    """Return what the models are called, with the start of a digest where one is known."""
    names = []
    for side, model in zip(("edge", "cloud"), _models(labels), strict=True):
        digest = str(model.get("digest", ""))[:12]
        names.append("@".join(part for part in (str(model.get("name", side)), digest) if part))
    return names[0], names[1]


def _named(labels: Labels) -> str:
    return " and ".join(_model_names(labels))


def _kept(labels: Labels, folder: Path | None) -> Kept | None:
    from cloud_server.training.evaluation.pictures import Kept

    if folder is None:
        return None
    edge, cloud = (str(model.get("digest", "")) for model in _models(labels))
    if not (edge and cloud):
        raise DataError("these labels do not say which models drew; leave --pictures away")
    return Kept(folder, (edge, cloud), labels.prompts)


def _judged(
    labels: Labels,
    plan: Plan,
    judge: Path | None,
    scores: Path | None,
    kept: Kept | None,
    device: str,
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Return what a Case has of the other judge, if there is one: by prompt, and by picture.

    Scores in a file are of the same prompts by the same models, and maybe of other pictures.
    """
    import numpy as np

    if judge:
        from cloud_server.training.evaluation.pictures import judged_gain
        from cloud_server.training.starter.judge import Judge

        assert kept is not None  # checked with the options
        by_picture = judged_gain(Judge.open(judge, device), kept, plan.rows, labels.seeds)
        return by_picture.mean(1), by_picture
    if scores:
        from cloud_server.training.labels import judge_of, read

        other = read(scores)
        models, others = (one.origin.get("models") for one in (labels, other))
        if models and others and models != others:
            raise DataError(
                f"{scores} is of other models ({_named(other)}) than the labels "
                f"({_named(labels)}); judge pictures of the same"
            )
        scored_alike = "scorer" in labels.origin and judge_of(other) == judge_of(labels)
        if scored_alike or other.digest == labels.digest:
            raise DataError(
                f"{scores} was scored as the labels were; another judge is another --clip or "
                "--metrics of cloud-server label"
            )
        at = {prompt: row for row, prompt in enumerate(other.prompts)}
        missing = [p for p in (labels.prompts[row] for row in plan.rows) if p not in at]
        if missing:
            raise DataError(f"{scores} has no scores of {missing[0]!r}; judge the same prompts")
        gain = (other.mean[1] - other.mean[0]) @ other.weights
        return np.array([gain[at[p]] if p in at else np.nan for p in labels.prompts]), None
    return None, None


def _judge_said(judge: Path | None, scores: Path | None) -> dict[str, str] | None:
    if judge:
        return {"name": "Objects right", "by": f"by the network in {judge}, which is not CLIP"}
    return {"name": "Mean score", "by": f"by {scores}"} if scores else None


def _write(
    report: dict[str, Any],
    kept: Kept | None,
    labels: Labels,
    out: Path | None,
    json_file: Path | None,
) -> None:
    if json_file:
        text = json.dumps(report, indent=1, allow_nan=False)
        json_file.write_text(text + "\n", encoding="utf-8")
    if out:
        from cloud_server.training.evaluation.report import page

        rows = [one["row"] for one in report["regrets"]] if kept else []
        pictures = {row: kept.pair(row, labels.seeds[0]) for row in rows} if kept else {}
        out.write_text(page(report, pictures), encoding="utf-8")
